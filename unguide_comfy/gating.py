"""A model that carries erasure LoRAs, each behind a gate: the wrappers that make any sampler node an UnGuide sampler.

`guided` attaches them to a clone of the model. When sampling starts, every gate decides its weight; the blending
wrapper then uses the weights in every step. The state of a run lives in an object of that run only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ..unguide_core.adapter import LowRank
from ..unguide_core.probe import Decision
from .blending import Run, Weight, blended_prediction
from .context import Context, carrying
from .deciding import Found, Judge, ProbeSettings
from .displacing import CONCEPT, DISPLACEMENTS, PROMPT, Displacing
from .erasure import Conditioning, ErasureLora
from .identity import model_key
from .looking import Look
from .matching import match_layers
from .official import OfficialSampling, Start, decide_officially
from .outcomes import FIXED, MODES, OFFICIAL, PROBE, TRAJECTORY, Outcome, RunReport, show
from .probing import ProbeSampler, look_ahead, probe_sigmas
from .watching import Restart, Watch, watched_conditionals

KEY = "unguide"
CONTINUE, RESTART = "continue", "restart"
ON_DETECTION = (CONTINUE, RESTART)


@dataclass(frozen=True)
class Gate:
    """When and how an erasure LoRA's weight is chosen.

    Args:
        mode: "trajectory" decides during sampling, at the noise level where the probe would look, sample by sample;
            "probe" before the first step, on trajectories of its own; "official" as the research code does, schedule
            and weights included; "fixed" always uses `settings.weight_detected`.
        settings: of the probe, and the two weights.
        neutral: the neutral prompt's conditioning, None for the erasure LoRA's own.
        on_detection: of the mode "trajectory": "continue" from the step of the decision on, or "restart" the picture.
        look_again: of the mode "trajectory": steps after which to look again where nothing was found; 0 looks once.
        displacement: whose displacement by the adapter erases: the "prompt"'s own, as in the paper, or that of the
            "concept"'s own prompt, against text that was optimised to get past the adapter. Not of the mode "official".
        low_memory: never compute base and adapted rows in one forward.
        start: of the mode "official": what its probe otherwise draws at random.
    """

    mode: str = TRAJECTORY
    settings: ProbeSettings = field(default_factory=ProbeSettings)
    neutral: Conditioning | None = None
    on_detection: str = CONTINUE
    look_again: int = 0
    displacement: str = PROMPT
    low_memory: bool = False
    start: Start | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown gate mode {self.mode!r}; expected one of {', '.join(MODES)}")
        if self.on_detection not in ON_DETECTION:
            raise ValueError(f"unknown on_detection {self.on_detection!r}; expected one of {', '.join(ON_DETECTION)}")
        if self.displacement not in DISPLACEMENTS:
            known = ", ".join(DISPLACEMENTS)
            raise ValueError(f"unknown displacement {self.displacement!r}; expected one of {known}")
        if self.displacement == CONCEPT and self.mode == OFFICIAL:
            raise ValueError("the gate mode 'official' knows no displacement on the concept's prompt; use 'prompt'")
        if self.look_again < 0:
            raise ValueError(f"look_again is {self.look_again}; expected 0 (look once) or a number of steps")


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
        adapter, or the gate needs the concept's prompt and has none.
    """
    for lora in loras:
        if gate.displacement == CONCEPT and lora.concept is None:
            raise ValueError(
                f"the displacement on the concept's prompt needs that prompt for {lora.name!r}, encoded: connect a "
                "CLIP to Load Erasure LoRA, and name the concept there"
            )
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
) -> tuple[list[Decision], RunReport]:
    """The stability probe as a run of its own: the decisions, and what they cost.

    Args:
        model: a `ModelPatcher`; gates that it carries do not take part.
        guider: makes the host's guider for a model: `guider(model)`, conditioning and cfg set.
        latent: whose shape the probe uses, [B, C, ...].
    """
    started = time.perf_counter()
    base, _ = without_gates(model)
    run = Run(tuple(matched(lora, base) for lora in loras))
    base.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, blended_prediction)
    sampler = ProbeSampler(run, model_key(base), loras, settings, neutral)
    one = latent[:1]
    guider(base).sample(torch.zeros_like(one), one, sampler, torch.ones(2), seed=settings.seed)
    outcomes = tuple(
        Outcome(lora.name, lora.concept_prompt, PROBE, found.decisions, (found.decisions[0].weight,), found)
        for lora, found in zip(loras, sampler.found, strict=True)
    )
    evaluations = {"probe": float(sum(run.evaluated.values()))}
    report = RunReport(outcomes, evaluations, 0.0, time.perf_counter() - started)
    return [found.decisions[0] for found in sampler.found], report


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
        run = Run(
            tuple(branch.layers for branch in self.branches),
            batchable=not any(branch.gate.low_memory for branch in self.branches),
            elsewhere=frozenset(i for i, b in enumerate(self.branches) if b.gate.displacement == CONCEPT),
        )
        extra_args = carrying(extra_args, run)
        key = model_key(guider.model_patcher)
        context = Context(guider, run, extra_args["model_options"], key, latent_image, denoise_mask)
        run.displace = Displacing(context, [b.lora for b in self.branches]) if run.elsewhere else None
        gates = GatedRun(self.branches, context)

        def sample() -> torch.Tensor:
            official = OfficialSampling.replacing(context, sigmas, noise, latent_image) if gates.official else None
            levels, start = (sigmas, noise) if official is None else (official.sigmas, official.noise)
            gates.watch(levels)
            found = executor(guider, levels, extra_args, callback, start, latent_image, denoise_mask, disable_pbar)
            return found if official is None else official.finished(found)

        gates.decide_before(noise.shape)
        rewind = _random_state()
        try:
            latent = sample()
        except Restart:
            rewind()
            gates.account("wasted")
            latent = sample()
        show(gates.outcomes(), finished=True)
        if self.observer is not None:
            self.observer(gates.report(noise.shape[0], time.perf_counter() - started))
        return latent


def _random_state() -> Callable[[], None]:
    """Notes the global random numbers, the GPUs' as well; returns what brings them back."""
    cpu, gpus = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def rewind() -> None:
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)

    return rewind


class GatedRun:
    """The gates of one sampling run: their decisions so far, and what was spent on them."""

    def __init__(self, branches: Sequence[Branch], context: Context):
        self.branches, self.context, self.run = branches, context, context.run
        self.found: list[Found | None] = [None] * len(branches)
        self.decisions: list[tuple[Decision, ...]] = [
            () if branch.decision is None else (branch.decision,) for branch in branches
        ]
        self.steps: list[int | None] = [None] * len(branches)
        self.spent = {"probe": 0, "wasted": 0}
        self.restarted = False
        self.run.weights = [
            branch.gate.settings.weight_detected if branch.gate.mode == FIXED else 1.0 for branch in branches
        ]
        for index, decisions in enumerate(self.decisions):
            if decisions:
                self.run.weights[index] = decisions[0].weight

    @property
    def official(self) -> bool:
        """Whether the official schedule replaces the run's."""
        return any(branch.gate.mode == OFFICIAL for branch in self.branches)

    def undecided(self, mode: str) -> list[int]:
        """The branches of a gate mode that still wait for a decision."""
        return [i for i, branch in enumerate(self.branches) if branch.gate.mode == mode and not self.decisions[i]]

    def decide_before(self, shape: Sequence[int]) -> None:
        """Decides the branches of the modes "probe" and "official"; those with equal settings share one probe."""
        for indices in self._alike(self.undecided(PROBE)):
            gate = self.branches[indices[0]].gate
            with self._probing():
                judge = Judge(self.context, gate.settings, gate.neutral)
                look = look_ahead(self.context, gate.settings, shape[1:])
                self._take(indices, judge.decide(look, self._loras(indices)))
        for indices in self._alike(self.undecided(OFFICIAL)):
            gate = self.branches[indices[0]].gate
            with self._probing():
                loras, drawn = self._loras(indices), gate.start
                found = decide_officially(self.context, gate.settings, shape[1:], loras, gate.neutral, drawn)
                self._take(indices, found)
        show(self.outcomes())

    def watch(self, sigmas: torch.Tensor) -> None:
        """Lets a sampling run be watched for the branches of the mode "trajectory"."""
        self.run.watch, waiting = None, self._open()
        if not waiting:
            return
        gates = [self.branches[i].gate for i in waiting]
        level = max(float(probe_sigmas(self.context, gate.settings)[-1]) for gate in gates)
        again = [gate.look_again for gate in gates if gate.look_again]
        self.run.watch = Watch(self.context, sigmas, level, min(again, default=0), self._decide_at)
        if any(self.decisions[i] for i in waiting):  # a run that began again has had its first look
            self.run.watch.next_step = max(step for step in self.steps if step is not None) + self.run.watch.again

    def _open(self) -> list[int]:
        """The watched branches that wait for their decision, or may look again."""
        return [
            i
            for i, branch in enumerate(self.branches)
            if branch.gate.mode == TRAJECTORY
            and branch.decision is None
            and (not self.decisions[i] or (branch.gate.look_again and not all(d.detected for d in self.decisions[i])))
        ]

    def _decide_at(self, look: Look, step: int) -> bool:
        """Decides, sample by sample, at the sampling run's own latent; returns whether anything is left to decide.

        Raises: Restart, where a gate wants that.
        """
        waiting, before = self._open(), list(self.decisions)
        for indices in self._alike(waiting):
            gate = self.branches[indices[0]].gate
            with self._probing():
                judge = Judge(self.context, gate.settings, gate.neutral, by_sample=True)
                self._take(indices, judge.decide(look, self._loras(indices)), step)
        show(self.outcomes())
        newly = [i for i in waiting if _detected(self.decisions[i]) > _detected(before[i])]
        if not self.restarted and any(self.branches[i].gate.on_detection == RESTART for i in newly):
            self.restarted = True
            raise Restart
        return bool(self._open())

    def _alike(self, indices: Sequence[int]) -> list[list[int]]:
        """The branches by their gate's settings and neutral prompt."""
        groups: dict[tuple[ProbeSettings, int], list[int]] = {}
        for i in indices:
            gate = self.branches[i].gate
            groups.setdefault((gate.settings, id(gate.neutral)), []).append(i)
        return list(groups.values())

    def _loras(self, indices: Sequence[int]) -> list[tuple[int, ErasureLora]]:
        return [(i, self.branches[i].lora) for i in indices]

    def _take(self, indices: Sequence[int], found: Sequence[Found], step: int | None = None) -> None:
        """Takes decisions over; of a sample that was detected before, that one stays."""
        for index, new in zip(indices, found, strict=True):
            old = self.decisions[index]
            kept = [a if a.detected else b for a, b in zip(old, new.decisions, strict=True)] if old else new.decisions
            if _detected(kept) > _detected(old) or not old:
                self.found[index], self.steps[index] = new, step
            self.decisions[index] = tuple(kept)
            self.run.weights[index] = _as_weight([decision.weight for decision in kept])

    @contextmanager
    def _probing(self) -> Iterator[None]:
        """Books what is evaluated within the block under "probe"."""
        before = dict(self.run.evaluated)
        try:
            yield
        finally:
            self.spent["probe"] += sum(self.run.evaluated.values()) - sum(before.values())
            self.run.evaluated = before

    def account(self, kind: str) -> None:
        """Books what the run has evaluated so far under another kind."""
        self.spent[kind] += sum(self.run.evaluated.values())
        self.run.evaluated = dict.fromkeys(self.run.evaluated, 0)
        self.run.asked_for = 0

    def outcomes(self) -> tuple[Outcome, ...]:
        return tuple(
            Outcome(
                branch.lora.name,
                branch.lora.concept_prompt,
                branch.gate.mode,
                self.decisions[i],
                _weights(self.run.weights[i]),
                self.found[i],
                self.steps[i],
                branch.gate.displacement,
            )
            for i, branch in enumerate(self.branches)
        )

    def report(self, samples: int, seconds: float) -> RunReport:
        spent = {kind: rows / samples for kind, rows in {**self.run.evaluated, **self.spent}.items()}
        return RunReport(self.outcomes(), spent, self.run.asked_for / samples, seconds)


def _detected(decisions: Sequence[Decision]) -> int:
    return sum(decision.detected for decision in decisions)


def _as_weight(weights: Sequence[float]) -> Weight:
    """One number where all samples agree, else one per sample, [B]."""
    return weights[0] if len(set(weights)) == 1 else torch.tensor(weights)


def _weights(weight: Weight) -> tuple[float, ...]:
    return tuple(weight.tolist()) if isinstance(weight, torch.Tensor) else (weight,)


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
