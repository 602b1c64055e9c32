"""A model that carries erasure LoRAs, each behind a gate: the wrappers that make any sampler node an UnGuide sampler.

`guided` attaches them to a clone of the model. When sampling starts, every gate decides its weight; the blending
wrapper then uses the weights in every step. The state of a run lives in an object of that run only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..unguide_core.adapter import LowRank
from ..unguide_core.probe import Decision
from .blending import Run, Weight, blended_prediction
from .erasure import Conditioning, ErasureLora
from .identity import model_key
from .matching import match_layers
from .probing import Probe, ProbeSampler, ProbeSettings, carrying

log = logging.getLogger(__name__)

KEY = "unguide"
PROBE, FIXED = "probe", "fixed"
MODES = (PROBE, FIXED)


@dataclass(frozen=True)
class Gate:
    """When and how an erasure LoRA's weight is chosen.

    Args:
        mode: "probe" decides before the first step; "fixed" always uses `settings.weight_detected`.
        settings: of the probe, and the two weights.
        neutral: the neutral prompt's conditioning, None for the erasure LoRA's own.
    """

    mode: str = PROBE
    settings: ProbeSettings = field(default_factory=ProbeSettings)
    neutral: Conditioning | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown gate mode {self.mode!r}; expected one of {', '.join(MODES)}")


@dataclass(frozen=True)
class Branch:
    """One erasure LoRA on a model: its layers as matched with that model, and its gate.

    Args:
        decision: one made before (by the Stability Probe node), used instead of a probe.
    """

    lora: ErasureLora
    layers: dict[str, LowRank]
    gate: Gate
    decision: Decision | None = None


@dataclass(frozen=True)
class Outcome:
    """What one sampling run did with one erasure LoRA. `decision` is None in the gate mode "fixed"."""

    lora: str
    concept: str
    mode: str
    weight: Weight
    decision: Decision | None


@dataclass(frozen=True)
class RunReport:
    """What one sampling run did, and what it cost.

    Args:
        outcomes: one per erasure LoRA.
        evaluations: UNet evaluations per latent of the batch, by kind: "base" and "adapted" of the sampling itself,
            "probe" of the gates. One evaluation is one latent under one conditioning.
        seconds: wall time of gates and sampling.
    """

    outcomes: tuple[Outcome, ...]
    evaluations: dict[str, float]
    seconds: float


Observer = Callable[[RunReport], None]


def guided(
    model: Any,
    loras: Sequence[ErasureLora],
    gate: Gate,
    decisions: Sequence[Decision] | None = None,
    observer: Observer | None = None,
) -> Any:
    """A clone of a `ModelPatcher` that samples with the erasure LoRAs, each behind the gate.

    On a model that already carries erasure LoRAs the new ones join them: one blend, never nested ones.

    Args:
        decisions: made before (by the Stability Probe node), one per erasure LoRA, used instead of probes.
        observer: called with the report after every sampling run.
    Raises: AdapterError if an adapter does not fit the model; ValueError if a decision was made for another model or
        adapter.
    """
    clone, earlier = without_gates(model)
    if decisions is not None:
        _check_decisions(decisions, loras, clone)
    made = decisions or [None] * len(loras)
    branches = [Branch(lora, matched(lora, clone), gate, decision) for lora, decision in zip(loras, made, strict=True)]
    sampling = GatedSampling((*(earlier.branches if earlier else ()), *branches), observer)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, blended_prediction)
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, sampling)
    return clone


def without_gates(model: Any) -> tuple[Any, GatedSampling | None]:
    """A clone of the model without our wrappers, and the gates it carried."""
    clone = model.clone()
    carried = clone.get_wrappers(WrappersMP.SAMPLER_SAMPLE, KEY)
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.SAMPLER_SAMPLE):
        clone.remove_wrappers_with_key(kind, KEY)
    return clone, carried[0] if carried else None


def matched(lora: ErasureLora, model: Any) -> dict[str, LowRank]:
    """The erasure LoRA's layers by module path of the model, its strength in their scale."""
    layers = match_layers(lora.adapter, model.model, lora.name)
    return {path: replace(layer, scale=layer.scale * lora.strength) for path, layer in layers.items()}


def probe_prompt(
    model: Any,
    loras: Sequence[ErasureLora],
    settings: ProbeSettings,
    guider: Any,
    latent: torch.Tensor,
    neutral: Conditioning | None = None,
) -> tuple[list[Decision], float, RunReport]:
    """The stability probe as a run of its own, all statistics: decisions, their noise level, what it cost.

    Args:
        model: a `ModelPatcher`; gates that it carries do not take part.
        guider: makes the host's guider for a model: `guider(model)`, conditioning and cfg set.
        latent: whose shape the probe uses, [B, C, ...].
    """
    started = time.perf_counter()
    base, _ = without_gates(model)
    run = Run(tuple(matched(lora, base) for lora in loras))
    base.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, blended_prediction)
    sampler = ProbeSampler(run, loras, settings, neutral)
    one = latent[:1]
    guider(base).sample(torch.zeros_like(one), one, sampler, torch.ones(2), seed=settings.seed)
    decisions = [replace(decision, model_key=model_key(base)) for decision in sampler.decisions]
    outcomes = tuple(
        Outcome(lora.name, lora.concept_prompt, PROBE, decision.weight, decision)
        for lora, decision in zip(loras, decisions, strict=True)
    )
    report = RunReport(outcomes, {"probe": float(sum(run.evaluated.values()))}, time.perf_counter() - started)
    return decisions, sampler.sigma, report


class GatedSampling:
    """The `SAMPLER_SAMPLE` wrapper: decides every branch's weight, then samples with them."""

    def __init__(self, branches: Sequence[Branch], observer: Observer | None = None):
        self.branches = tuple(branches)
        self.observer = observer

    def __call__(
        self,
        executor: Callable[..., torch.Tensor],
        guider: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """The sampled latent; the host's signature of a `SAMPLER_SAMPLE` wrapper."""
        started = time.perf_counter()
        run = Run(tuple(branch.layers for branch in self.branches))
        extra_args = carrying(extra_args, run)
        decisions = self._decide(guider, run, extra_args, noise, latent_image, denoise_mask)
        run.weights = [
            branch.gate.settings.weight_detected if decision is None else decision.weight
            for branch, decision in zip(self.branches, decisions, strict=True)
        ]
        show(self._outcomes(run, decisions))
        probed = sum(run.evaluated.values())
        run.evaluated = dict.fromkeys(run.evaluated, 0)
        latent = executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        spent = {kind: rows / noise.shape[0] for kind, rows in {**run.evaluated, "probe": probed}.items()}
        self._report(run, decisions, spent, time.perf_counter() - started)
        return latent

    def _decide(
        self,
        guider: Any,
        run: Run,
        extra_args: dict[str, Any],
        noise: torch.Tensor,
        latent_image: torch.Tensor | None,
        denoise_mask: torch.Tensor | None,
    ) -> list[Decision | None]:
        """One decision per branch; branches with equal probe settings share one probe."""
        probes: dict[tuple[ProbeSettings, int], Probe] = {}
        decisions: list[Decision | None] = []
        for index, branch in enumerate(self.branches):
            gate = branch.gate
            if gate.mode == FIXED or branch.decision is not None:
                decisions.append(branch.decision)
                continue
            key = (gate.settings, id(gate.neutral))
            if key not in probes:
                probes[key] = Probe(
                    guider, run, extra_args, noise.shape, gate.settings, gate.neutral, latent_image, denoise_mask
                )
            decisions.append(probes[key].decide(index, branch.lora))
        return decisions

    def _report(self, run: Run, decisions: list[Decision | None], spent: dict[str, float], seconds: float) -> None:
        if self.observer is not None:
            self.observer(RunReport(self._outcomes(run, decisions), spent, seconds))

    def _outcomes(self, run: Run, decisions: list[Decision | None]) -> tuple[Outcome, ...]:
        return tuple(
            Outcome(branch.lora.name, branch.lora.concept_prompt, branch.gate.mode, weight, decision)
            for branch, decision, weight in zip(self.branches, decisions, run.weights, strict=True)
        )


def show(outcomes: Sequence[Outcome]) -> None:
    """Says what was decided, in the log and on the node that is being executed."""
    lines = [summary(outcome) for outcome in outcomes]
    for line in lines:
        log.info("UnGuide: %s", line)
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is not None and server is not None:
        server.send_progress_text("\n".join(lines), context.node_id)


def summary(outcome: Outcome) -> str:
    """The outcome in one line, for a log or a node's status."""
    if outcome.decision is None:
        return f"{outcome.lora}: fixed weight {outcome.weight:g}"
    decision = outcome.decision
    found = "concept found" if decision.detected else "nothing found"
    return (
        f"{outcome.lora}: {found}, {decision.statistic} {decision.score:.3f} (threshold {decision.threshold:g}), "
        f"weight {outcome.weight:g}"
    )


def _check_decisions(decisions: Sequence[Decision], loras: Sequence[ErasureLora], model: Any) -> None:
    if len(decisions) != len(loras):
        raise ValueError(
            f"got {len(decisions)} decisions and {len(loras)} erasure LoRAs; connect the same Load Erasure LoRA to the "
            "Stability Probe and here"
        )
    key = model_key(model)
    for decision, lora in zip(decisions, loras, strict=True):
        if decision.adapter_key != lora.key:
            raise ValueError(
                f"the decision was made for another erasure LoRA than {lora.name!r}, or another strength of it; "
                "connect the same Load Erasure LoRA to the Stability Probe and here"
            )
        if decision.model_key != key:
            raise ValueError(
                f"the decision was made for another model (key {decision.model_key}) than this one (key {key}); "
                "connect the same model, with the same patches, to the Stability Probe and here"
            )
