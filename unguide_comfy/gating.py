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
from .looking import Context, Look, ProbeSettings, carrying
from .matching import match_layers
from .probing import Probe, ProbeSampler, probe_sigmas
from .watching import Restart, Watch, watched_conditionals

log = logging.getLogger(__name__)

KEY = "unguide"
PROBE, TRAJECTORY, FIXED = "probe", "trajectory", "fixed"
MODES = (PROBE, TRAJECTORY, FIXED)
CONTINUE, RESTART = "continue", "restart"
ON_DETECTION = (CONTINUE, RESTART)


@dataclass(frozen=True)
class Gate:
    """When and how an erasure LoRA's weight is chosen.

    Args:
        mode: "probe" decides before the first step; "trajectory" during sampling, at the noise level where the probe
            would look, sample by sample; "fixed" always uses `settings.weight_detected`.
        settings: of the probe, and the two weights.
        neutral: the neutral prompt's conditioning, None for the erasure LoRA's own.
        on_detection: of the mode "trajectory": "continue" after the step of the decision, or "restart" from the first.
    """

    mode: str = PROBE
    settings: ProbeSettings = field(default_factory=ProbeSettings)
    neutral: Conditioning | None = None
    on_detection: str = CONTINUE

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown gate mode {self.mode!r}; expected one of {', '.join(MODES)}")
        if self.on_detection not in ON_DETECTION:
            raise ValueError(f"unknown on_detection {self.on_detection!r}; expected one of {', '.join(ON_DETECTION)}")


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
    """What one sampling run did with one erasure LoRA.

    Args:
        decisions: one for the whole batch, or one per sample; empty in the gate mode "fixed", and where sampling ended
            before the noise level of the decision.
        weights: the base model's in the blend, likewise.
    """

    lora: str
    concept: str
    mode: str
    decisions: tuple[Decision, ...]
    weights: tuple[float, ...]

    @property
    def decision(self) -> Decision | None:
        """The decision that says most: of the sample that carries the concept most."""
        return leading(self.decisions) if self.decisions else None


@dataclass(frozen=True)
class RunReport:
    """What one sampling run did, and what it cost.

    Args:
        outcomes: one per erasure LoRA.
        evaluations: UNet evaluations per latent of the batch, by kind: "base" and "adapted" of the sampling itself,
            "probe" of the gates, "wasted" of a run that began again. One evaluation: one latent, one conditioning.
        seconds: wall time of gates and sampling.
    """

    outcomes: tuple[Outcome, ...]
    evaluations: dict[str, float]
    seconds: float


def leading(decisions: Sequence[Decision]) -> Decision:
    """Of several decisions the one that found something, with the highest score."""
    return max(decisions, key=lambda decision: (decision.detected, decision.score))


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
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, watched_conditionals)
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, sampling)
    return clone


def without_gates(model: Any) -> tuple[Any, GatedSampling | None]:
    """A clone of the model without our wrappers, and the gates it carried."""
    clone = model.clone()
    carried = clone.get_wrappers(WrappersMP.SAMPLER_SAMPLE, KEY)
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.CALC_COND_BATCH, WrappersMP.SAMPLER_SAMPLE):
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
    everything: bool = True,
) -> tuple[list[Decision], RunReport]:
    """The stability probe as a run of its own: the decisions, and what they cost.

    Args:
        model: a `ModelPatcher`; gates that it carries do not take part.
        guider: makes the host's guider for a model: `guider(model)`, conditioning and cfg set.
        latent: whose shape the probe uses, [B, C, ...].
        everything: take all statistics that the inputs allow, not the deciding ones alone.
    """
    started = time.perf_counter()
    base, _ = without_gates(model)
    run = Run(tuple(matched(lora, base) for lora in loras))
    base.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, blended_prediction)
    sampler = ProbeSampler(run, loras, settings, neutral, everything)
    one = latent[:1]
    guider(base).sample(torch.zeros_like(one), one, sampler, torch.ones(2), seed=settings.seed)
    decisions = [replace(decision, model_key=model_key(base)) for decision in sampler.decisions]
    outcomes = tuple(
        Outcome(lora.name, lora.concept_prompt, PROBE, (decision,), (decision.weight,))
        for lora, decision in zip(loras, decisions, strict=True)
    )
    report = RunReport(outcomes, {"probe": float(sum(run.evaluated.values()))}, time.perf_counter() - started)
    return decisions, report


class GatedSampling:
    """The `SAMPLER_SAMPLE` wrapper: every branch's gate decides before or during sampling, the blend follows."""

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
        context = Context(guider, run, extra_args["model_options"], latent_image, denoise_mask)
        gates = GatedRun(self.branches, context)
        gates.decide_before(noise.shape)
        gates.decide_during()
        random = torch.get_rng_state()
        try:
            latent = executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        except Restart:
            torch.set_rng_state(random)
            gates.account("wasted")
            latent = executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        if self.observer is not None:
            self.observer(gates.report(noise.shape[0], time.perf_counter() - started))
        return latent


class GatedRun:
    """The gates of one sampling run: their decisions so far, and what was spent on them."""

    def __init__(self, branches: Sequence[Branch], context: Context):
        self.branches, self.context, self.run = branches, context, context.run
        self.decisions: list[tuple[Decision, ...]] = [
            () if branch.decision is None else (branch.decision,) for branch in branches
        ]
        self.spent = {"probe": 0, "wasted": 0}
        self.run.weights = [
            branch.gate.settings.weight_detected if branch.gate.mode == FIXED else 1.0 for branch in branches
        ]
        for index, decisions in enumerate(self.decisions):
            if decisions:
                self.run.weights[index] = decisions[0].weight

    def undecided(self, mode: str) -> list[int]:
        """The branches of a gate mode that still wait for a decision."""
        return [i for i, branch in enumerate(self.branches) if branch.gate.mode == mode and not self.decisions[i]]

    def decide_before(self, shape: Sequence[int]) -> None:
        """Decides the branches of the mode "probe"; those with equal settings share one probe."""
        self._decide(
            self.undecided(PROBE),
            lambda settings, neutral: Probe(self.context, settings, shape[1:], neutral),
            lambda look, index: (look.decide(index, self.branches[index].lora),),
        )
        if not self.undecided(TRAJECTORY):
            show(self.outcomes())

    def decide_during(self) -> None:
        """Lets the sampling run be watched for the branches of the mode "trajectory"."""
        waiting = self.undecided(TRAJECTORY)
        if waiting:
            model = self.context.guider.inner_model
            sigma = max(float(probe_sigmas(model, self.branches[i].gate.settings)[-1]) for i in waiting)
            self.run.watch = Watch(self.context, sigma, self._decide_at)

    def _decide_at(self, look_at: Callable[..., Look]) -> None:
        """Decides, sample by sample, at the sampling run's own latent. Raises: Restart, where a gate wants that."""
        waiting = self.undecided(TRAJECTORY)
        self._decide(waiting, look_at, lambda look, index: look.decide_each(index, self.branches[index].lora))
        show(self.outcomes())
        found = [i for i in waiting if leading(self.decisions[i]).detected]
        if any(self.branches[i].gate.on_detection == RESTART for i in found):
            raise Restart

    def _decide(
        self,
        indices: Sequence[int],
        look_at: Callable[[ProbeSettings, Conditioning | None], Look],
        decide: Callable[[Look, int], tuple[Decision, ...]],
    ) -> None:
        before = dict(self.run.evaluated)
        looks: dict[tuple[ProbeSettings, int], Look] = {}
        for index in indices:
            gate = self.branches[index].gate
            key = (gate.settings, id(gate.neutral))
            if key not in looks:
                looks[key] = look_at(gate.settings, gate.neutral)
            self.decisions[index] = decide(looks[key], index)
        for index in indices:
            self.run.weights[index] = _as_weight([decision.weight for decision in self.decisions[index]])
        self.spent["probe"] += sum(self.run.evaluated.values()) - sum(before.values())
        self.run.evaluated = before

    def account(self, kind: str) -> None:
        """Books what the run has evaluated so far under another kind."""
        self.spent[kind] += sum(self.run.evaluated.values())
        self.run.evaluated = dict.fromkeys(self.run.evaluated, 0)

    def outcomes(self) -> tuple[Outcome, ...]:
        return tuple(
            Outcome(branch.lora.name, branch.lora.concept_prompt, branch.gate.mode, decisions, _weights(weight))
            for branch, decisions, weight in zip(self.branches, self.decisions, self.run.weights, strict=True)
        )

    def report(self, samples: int, seconds: float) -> RunReport:
        spent = {kind: rows / samples for kind, rows in {**self.run.evaluated, **self.spent}.items()}
        return RunReport(self.outcomes(), spent, seconds)


def _as_weight(weights: Sequence[float]) -> Weight:
    """One number where all samples agree, else one per sample, [B]."""
    return weights[0] if len(set(weights)) == 1 else torch.tensor(weights)


def _weights(weight: Weight) -> tuple[float, ...]:
    return tuple(weight.tolist()) if isinstance(weight, torch.Tensor) else (weight,)


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
    decision = outcome.decision
    weights = ", ".join(f"{weight:g}" for weight in outcome.weights)
    if decision is None:
        how = "fixed" if outcome.mode == FIXED else "no decision, sampling ended above its noise level:"
        return f"{outcome.lora}: {how} weight {weights}"
    found = "concept found" if decision.detected else "nothing found"
    return (
        f"{outcome.lora}: {found}, {decision.statistic} {decision.score:.3f} (threshold {decision.threshold:g}), "
        f"weight {weights}"
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
