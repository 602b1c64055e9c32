"""Deciding before a sampling run, on rollouts of the prompt by the base model from noise of their own.

The rollouts follow a schedule of their own, because the user's may be partial (img2img, start_at_step).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...unguide_core.probe import Decision
from ..blend.state import RUN, Run
from ..blend.wrapper import blending, carrying
from ..lora.load import ErasureLora
from ..lora.match import Matcher
from ..model.key import model_key
from ..model.task import run_on_model
from ..probe.baseline import hash_ahead
from ..probe.conds import Context
from ..probe.decide import decide
from ..probe.predictions import Predictions
from ..probe.rollout import noise_at, probe_sigmas, rollout
from ..probe.settings import BEFORE, Settings
from ..probe.text import text_decision, text_statistics
from ..report.records import Cost, Verdict


def predictions_before(context: Context, settings: Settings, shape: Sequence[int], rollouts: int) -> Predictions:
    """Return predictions at the end of the probe's rollouts of the prompt.

    Args:
        shape: of one sample, [C, ...].
        rollouts: how many.
    """
    sigmas = probe_sigmas(context, settings)
    start = noise_at(context, float(sigmas[0]), (rollouts, *shape), settings.seed)
    return Predictions(context, rollout(context, start, sigmas, seed=settings.seed), float(sigmas[-1]))


def probe_prompt(
    model: Any,
    loras: Sequence[ErasureLora],
    settings: Settings,
    guider: Callable[[Any], Any],
    latent: torch.Tensor,
) -> tuple[list[Decision], list[Verdict], Cost]:
    """Return the stability probe's decision for each erasure LoRA, as a run of its own, with all its statistics.

    What the text stage decides is decided by it, as in a gate; the statistics of predictions are measured all the same.

    Args:
        model: a `ModelPatcher`; gates that it has take no part.
        guider: makes the host's guider for a model, conditioning and cfg set.
        latent: whose shape the probe uses, [B, C, ...].
    """
    started = time.perf_counter()
    base = blending(model)
    hash_ahead(base, loras)
    key = model_key(base)
    matcher = Matcher(base.model)
    run = Run(tuple(loras), tuple(matcher.match(lora.adapter, lora.name).layers for lora in loras))

    def probe(guider: Any, extra_args: dict[str, Any], shape: torch.Size) -> list[tuple[Decision, ...]]:
        context = Context(guider, run, carrying(extra_args, **{RUN: run})["model_options"], key)
        predictions = predictions_before(context, settings, shape, settings.repeats)
        found = decide(predictions, list(enumerate(loras)), settings, all_statistics=True)
        return [
            (_with_text(context, index, lora, settings, decision),)
            for (index, lora), (decision,) in zip(enumerate(loras), found, strict=True)
        ]

    with run.evaluations.of("probe"):
        decisions = [one for (one,) in run_on_model(guider(base), latent, settings.seed, probe)]
    verdicts = [
        Verdict(lora, BEFORE, (decision,), (decision.weight,)) for lora, decision in zip(loras, decisions, strict=True)
    ]
    spent = {"probe": float(run.evaluations.spent["probe"])}
    return decisions, verdicts, Cost(spent, 0.0, time.perf_counter() - started)


def _with_text(context: Context, index: int, lora: ErasureLora, settings: Settings, decision: Decision) -> Decision:
    """The text stage's decision where there is one, else that of the predictions; with the statistics of both."""
    (text,) = text_statistics(context, index, lora, settings)
    by_text = text_decision(context, lora, settings, text)
    if by_text is None:
        return replace(decision, statistics=(*decision.statistics, *text))
    statistics = (*by_text.statistics, *decision.statistics)
    return replace(by_text, statistics=statistics, influence_map=decision.influence_map)
