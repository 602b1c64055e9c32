"""The text stage in the host: what an adapter does to the text states that a run reads, without an evaluation.

Present for adapters all of whose layers read text alone, where the network reads the states of the conditioning as they
are: the cross-attention keys and values of SD 1.x, 2.x and SDXL. SDXL's layer of the pooled state may be among them;
the statistics are of the others. `unguide_core.probe.text` has the statistics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ...unguide_core.adapter import LowRank
from ...unguide_core.probe import AUTOMATIC, Decision, Statistic, decide_by
from ...unguide_core.probe.calibration import CalibrationPrompts
from ...unguide_core.probe.text import TextCalibration, calibrated_text, text_map, text_norms, text_scores
from ..lora.load import Conditioning, ErasureLora
from ..model.weights import dequantized, unpatched_weights
from .baseline import valid_calibration
from .conds import Context, Entry
from .settings import Settings

READS_TEXT = re.compile(r"diffusion_model\.(input_blocks|middle_block|output_blocks)\..*\.attn2\.to_[kv]")
"""Paths of the modules that read text states as the conditioning has them, and nothing else."""

READS_POOLED = re.compile(r"diffusion_model\.label_emb\..*")
"""Paths of the modules that read SDXL's pooled text state."""


def reads_text_alone(paths: Iterable[str]) -> bool:
    """Return whether the modules at these paths read text states, and nothing besides but the pooled one."""
    rest = [path for path in paths if not READS_POOLED.fullmatch(path)]
    return bool(rest) and all(READS_TEXT.fullmatch(path) for path in rest)


def text_statistics(
    context: Context, index: int, lora: ErasureLora, settings: Settings, samples: int | None = None
) -> list[tuple[Statistic, ...]]:
    """Return what the text stage says of each sample, the leading statistic first; nothing where it is absent.

    A function of the conditioning and of the adapter with its metadata. All entries of all prompts that act on the
    image are read, wherever and whenever they act, and the one with the highest score counts.

    Args:
        index: the erasure LoRA's number in the run.
        samples: size of the batch; None for one result, of the strongest row of a batch of prompts.
    """
    nothing: list[tuple[Statistic, ...]] = [()] * (samples or 1)
    calibration = _calibration(context, lora, settings)
    if calibration is None:
        return nothing
    states = [_states(entry) for entry in context.prompt]
    if any(each is None or each.shape[-1] != len(calibration.direction) for each in states):
        return nothing
    layers = context.run.layers[index]
    rate, adapters = settings.false_positive_rate, len(context.run.loras)
    scores = {"text": [text_scores(each, calibration.vector) for each in states if each is not None]}
    spreads = {"text": calibration.text}
    if settings.resist_adversarial:
        seen = text_map_of(context.guider.model_patcher, layers)
        scores["text norm"] = [text_norms(each, seen) / calibration.norm for each in states if each is not None]
        spreads["text norm"] = calibration.text_norm
    thresholds = {name: spread.thresholds(rate, adapters) for name, spread in spreads.items()}
    clears = settings.text_clears and not settings.resist_adversarial and not settings.recheck_every
    by_name = [
        _by_sample(name, scores[name], found, clears, samples)
        for name, found in thresholds.items()
        if found is not None
    ]
    return [tuple(sorted(each, key=_lead, reverse=True)) for each in zip(*by_name, strict=True)] or nothing


def text_decision(
    context: Context, lora: ErasureLora, settings: Settings, statistics: Sequence[Statistic]
) -> Decision | None:
    """Return the decision that follows from the text stage's statistics of a sample; None where it leaves that open."""
    if not any(one.detected or one.cleared for one in statistics):
        return None
    return decide_by(
        statistics,
        settings.weight_detected,
        settings.weight_otherwise,
        reason=f"{statistics[0].name}, calibrated: what the adapter does to the prompt's text",
        model_key=context.model_key,
        adapter_key=lora.key,
    )


def text_calibration(
    model: Any, layers: Mapping[str, LowRank], prompts: CalibrationPrompts[Conditioning]
) -> TextCalibration | None:
    """Return the calibration of the text stage, without an evaluation.

    None where a layer reads more than text, and where the concept's own prompt is the only one with it: how the scores
    of such prompts are distributed is not known then.

    Args:
        model: a `ModelPatcher`.
        layers: the adapter's, by module path, as matched with the model.
    Raises: ValueError for fewer than two prompts without the concept, or an adapter that does not change its concept's.
    """
    if not reads_text_alone(layers) or not prompts.concept:
        return None
    own, *concept = map(_tokens, (prompts.own, *prompts.concept))
    return calibrated_text(text_map_of(model, layers), own, concept, list(map(_tokens, prompts.others)))


def text_map_of(model: Any, layers: Mapping[str, LowRank]) -> torch.Tensor:
    """Return `unguide_core.probe.text.text_map` of layers on a `ModelPatcher`, by its weights without patches.

    Of the layers that read text states; the pooled one is not among them.
    """
    weights, read = unpatched_weights(model), [path for path in layers if READS_TEXT.fullmatch(path)]
    norms = [float(dequantized(weights[f"{path}.weight"]).float().norm()) for path in read]
    return text_map([layers[path] for path in read], norms)


def _calibration(context: Context, lora: ErasureLora, settings: Settings) -> TextCalibration | None:
    """The text stage's calibration where it holds, and no other statistic or threshold was asked for."""
    if settings.statistic != AUTOMATIC or settings.threshold is not None:
        return None
    calibration, _ = valid_calibration(context, lora)
    return None if calibration is None else calibration.text


def _states(entry: Entry) -> torch.Tensor | None:
    """The text states that the network reads for an entry, [rows, tokens, width]; None where it reads none."""
    states = getattr(entry.get("model_conds", {}).get("c_crossattn"), "cond", None)
    return states if isinstance(states, torch.Tensor) and states.ndim == 3 else None


def _tokens(conditioning: Conditioning) -> torch.Tensor:
    """The text states of all entries of a conditioning, [tokens, width]."""
    return torch.cat([text.float().cpu().flatten(0, 1) for text, _ in conditioning])


def _by_sample(
    name: str,
    scores: Sequence[torch.Tensor],
    thresholds: tuple[float, float],
    clears: bool,
    samples: int | None,
) -> list[Statistic]:
    """A statistic of each sample, or one of all; a prompt of fewer rows than the batch repeats them, as in the host."""
    lower, upper = thresholds
    rows = [each.tolist() for each in scores]
    values = [max(map(max, rows))] if samples is None else [max(r[i % len(r)] for r in rows) for i in range(samples)]
    return [
        Statistic(name, value, upper, value >= upper, (value,), lower=lower if clears else None) for value in values
    ]


def _lead(statistic: Statistic) -> tuple[bool, float]:
    return statistic.detected, statistic.score - statistic.threshold
