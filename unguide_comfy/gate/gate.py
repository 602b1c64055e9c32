"""The gate of one sampling run: the one object that decides for every erasure LoRA on the model.

It asks the stages of the cascade (stages.py). What the prompt's text leaves open is decided by the sampling run itself:
its first steps with the base model are the image's. At one of them the gate has the base model's predictions for the
prompt and, as a rule, for the neutral prompt at hand. A run that detects nothing goes on as it would without a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...unguide_core.adapter import LowRank
from ...unguide_core.probe import AUTOMATIC, Decision
from ..blend.state import Weight
from ..lora.load import ErasureLora
from ..probe.conds import Context, is_everywhere
from ..probe.predictions import Predictions
from ..probe.rollout import schedule
from ..probe.settings import ALWAYS, AS_PAPER, BEFORE, DURING, RESTART, Settings
from ..report.progress import show
from ..report.records import Cost, Verdict
from .before import predictions_before
from .concept_delta import ConceptDelta
from .image import ImageStage
from .official import Start, decide_as_paper
from .stages import STAGES, TRAJECTORY, Evidence
from .steps import is_settled, starts_from_image, step_of

GATE = "unguide_gate"
"""Key of the gate in the transformer options."""


class Restart(Exception):
    """Raised through the sampler: the run starts again, now that its weights are known."""


@dataclass(frozen=True)
class Branch:
    """One erasure LoRA on a model.

    Args:
        layers: as matched with the model, by module path.
        decision: made before (by the Stability Probe node), used instead of a probe.
        start: what the official probe otherwise draws at random.
        node: the id of the UnGuide node that put the erasure LoRA on the model; "" where another node did.
    """

    lora: ErasureLora
    layers: dict[str, LowRank]
    settings: Settings
    decision: Decision | None = None
    start: Start | None = None
    node: str = ""


class Gate:
    """Decides for one sampling run.

    Args:
        branches: the erasure LoRAs on the model, in the order of `context.run`.
        context: the sampling run; its weights are set here, and nowhere else.
        announce: called with all verdicts after every decision; may raise to end the run.
    """

    def __init__(
        self, branches: Sequence[Branch], context: Context, announce: Callable[[Sequence[Verdict]], None] = show
    ):
        self.branches, self.context, self.run = tuple(branches), context, context.run
        self.announce = announce
        self.delta = ConceptDelta(context)
        self.images = ImageStage(context, [(b.lora, None if self.as_paper else b.settings) for b in self.branches])
        self.decisions: list[tuple[Decision | None, ...]] = []
        """Of each branch, one for the batch or one per sample; None where a sample is still open, () where all are."""
        for index, branch in enumerate(self.branches):
            always = branch.settings.decide == ALWAYS
            self.run.weights[index] = branch.settings.weight_detected if always else 1.0
            self.decisions.append(())
            if branch.decision is not None:
                self._take([index], [(branch.decision,)])
        self._sigmas = torch.zeros(1)
        self._bypassed = self._from_image = False
        self._next: dict[tuple[str, int], int] = {}
        """The step at which a stage is asked for a branch, by the stage's name and the branch."""
        self.passed = False
        """Whether the run has passed through `gated_conditionals`, where the concept's change is added."""
        self.windowed = False
        """Whether the host cuts the latent into context windows, so that `gated_windows` probes and not each window."""

    @property
    def as_paper(self) -> bool:
        """Whether the official schedule replaces the run's."""
        return any(branch.settings.decide == AS_PAPER for branch in self.branches)

    # before sampling

    def decide_before(self, shape: Sequence[int], sigmas: torch.Tensor, latent_image: torch.Tensor | None) -> None:
        """Decide the branches that do not wait for the image's own steps; those with equal settings share a probe.

        Args:
            shape: of the latent batch, [B, C, ...].
            sigmas: the run's noise levels. A run that starts from an image tells nothing of its prompt in its first
                steps: they are denoised from another image's latents. So rollouts from noise decide it.
            latent_image: what the run starts from.
        """
        bypassed = "sampler_calc_cond_batch_function" in self.context.model_options
        if bypassed:
            self._leave_conditionals()
        self._decide_at_once(shape[0])
        sigma_max = float(self.context.model.model_sampling.sigma_max)
        self._from_image = starts_from_image(sigmas, sigma_max, latent_image)
        self._decide_ahead(self._undecided(*((BEFORE, DURING) if bypassed or self._from_image else (BEFORE,))), shape)
        for indices in self._alike(self._undecided(AS_PAPER)):
            branch = self.branches[indices[0]]
            with self.run.evaluations.of("probe"):
                loras = self._loras(indices)
                found = decide_as_paper(self.context, branch.settings, shape[1:], loras, branch.start)
            self._take(indices, found)
        self.announce(self.verdicts())

    def decide_rest(self, shape: Sequence[int]) -> bool:
        """Decide after sampling what the run left undecided; return whether the image has to be generated again."""
        before = self.run.active(), list(map(_plain, self.run.weights))
        if not self.passed:
            self._leave_conditionals()
        self._decide_ahead(self._undecided(DURING), shape)
        return (self.run.active(), list(map(_plain, self.run.weights))) != before

    def _leave_conditionals(self) -> None:
        """Erase in the network's forward alone, because the run does not pass through `gated_conditionals`."""
        self.run.outside, self._bypassed = frozenset(), True

    def erase_images(self) -> None:
        """Erase from the first step on what the images were seen to show; the run has to be started again."""
        self.images.erase()
        for index in self.images.erased:
            self._weigh(index)
        if not self._bypassed:
            self.run.outside |= frozenset(self.images.erased)

    def _decide_at_once(self, samples: int) -> None:
        """Ask the stages that need no latent."""
        for stage in STAGES:
            for alike in self._alike(self._undecided(BEFORE, DURING) if stage.step is None else ()):
                settings = self.branches[alike[0]].settings
                evidence = Evidence(self.context, settings, self._samples(settings, samples))
                with self.run.evaluations.of("probe"):
                    self._take(alike, stage.decide(evidence, self._loras(alike)))

    def _decide_ahead(self, indices: Sequence[int], shape: Sequence[int]) -> None:
        """Ask the trajectory stage on rollouts: of the prompt, or of each sample."""
        for alike in self._alike(indices):
            settings = self.branches[alike[0]].settings
            samples = self._samples(settings, shape[0])
            with self.run.evaluations.of("probe"):
                predictions = predictions_before(self.context, settings, shape[1:], samples or settings.repeats)
                evidence = Evidence(self.context, settings, samples, predictions)
                self._take(alike, TRAJECTORY.decide(evidence, self._loras(alike)))

    def _samples(self, settings: Settings, samples: int) -> int | None:
        """How many samples are decided one by one; None where the prompt or a video is."""
        whole = self.context.model_options.get("context_handler") is not None
        return None if whole or settings.decide == BEFORE else samples

    # during sampling

    def watch(self, sigmas: torch.Tensor) -> None:
        """Set the steps of a run through these noise levels at which stages are asked."""
        self._sigmas = sigmas
        self.images.watch(sigmas)
        for stage in STAGES:
            if stage.step is None:
                continue
            for index in self._open():
                settings, known = self.branches[index].settings, self.decisions[index]
                if known and None not in known:  # the run started again, and this one was probed before
                    self._next[stage.name, index] = max(map(_step, known)) + settings.recheck_every
                else:
                    levels = schedule(self.context, settings.probe_schedule_steps)
                    self._next[stage.name, index] = stage.step(sigmas, levels, settings)

    def observe(
        self,
        conds: Sequence[Any],
        out: Sequence[torch.Tensor],
        x: torch.Tensor,
        sigma: torch.Tensor,
        *,
        together: bool = False,
    ) -> bool:
        """Decide, sample by sample, where it is time to; return whether a weight has changed.

        Args:
            conds, out: the run's conditionings and the predictions for them at this latent, x0 [B, C, ...] each.
            x, sigma: the latent and its noise level.
            together: whether the samples are parts of one image or video, which is erased if one of them is detected.
        Raises: Restart, where the image has to be generated from its first step again.
        """
        step = step_of(self._sigmas, float(sigma.max()))
        due = [
            (stage, [i for i in self._open() if step >= self._next.get((stage.name, i), step + 1)]) for stage in STAGES
        ]
        asked = sorted({index for _, indices in due for index in indices})
        if not asked:
            return False
        before, detected = list(map(_plain, self.run.weights)), list(map(_detected, self.decisions))
        base = not self.run.active()  # `out` is the base model's
        pairs = zip(conds, out, strict=True)
        known = {id(entries[0]): x0 for entries, x0 in pairs if base and is_everywhere(entries)}
        predictions = Predictions(self.context, x, sigma, known)
        for stage, indices in due:
            for alike in self._alike(indices):
                evidence = Evidence(self.context, self.branches[alike[0]].settings, len(x), predictions, step)
                with self.run.evaluations.of("probe"):
                    found = stage.decide(evidence, self._loras(alike))
                self._take(alike, [(_leading(each),) if together else self.images.of_kept(each) for each in found])
            for index in indices:
                self._next[stage.name, index] = step + self.branches[index].settings.recheck_every
        self.announce(self.verdicts())
        newly = [index for index in asked if _detected(self.decisions[index]) > detected[index]]
        if step > 0 and any(self._restarts(index, float(sigma.max())) for index in newly):
            raise Restart
        return list(map(_plain, self.run.weights)) != before

    def _restarts(self, index: int, sigma: float) -> bool:
        """Whether a detection at a noise level starts the image again."""
        settings = self.branches[index].settings
        if settings.on_detection != AUTOMATIC:
            return settings.on_detection == RESTART
        return is_settled(schedule(self.context, settings.probe_schedule_steps), sigma)

    # the decisions

    def _open(self) -> list[int]:
        """The branches that decide at the run's own steps and wait for a decision, or may be probed again."""
        return [
            index
            for index, branch in enumerate(self.branches)
            if branch.settings.decide == DURING
            and branch.decision is None
            and not self._from_image
            and (
                not self._is_decided(index)
                or (branch.settings.recheck_every and not all(map(_is_detected, self.decisions[index])))
            )
        ]

    def _undecided(self, *decide: str) -> list[int]:
        """The branches of some ways to decide that still wait for a decision."""
        return [i for i, b in enumerate(self.branches) if b.settings.decide in decide and not self._is_decided(i)]

    def _is_decided(self, index: int) -> bool:
        """Whether every sample of a branch is decided."""
        return self.images.is_erased(index) or (bool(self.decisions[index]) and None not in self.decisions[index])

    def _alike(self, indices: Sequence[int]) -> list[list[int]]:
        """The branches by their settings, those with equal ones together."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index in indices:
            settings = self.branches[index].settings
            groups.setdefault((replace(settings, neutral=None), id(settings.neutral)), []).append(index)
        return list(groups.values())

    def _loras(self, indices: Sequence[int]) -> list[tuple[int, ErasureLora]]:
        return [(index, self.branches[index].lora) for index in indices]

    def _take(self, indices: Sequence[int], decided: Sequence[tuple[Decision | None, ...]]) -> None:
        """Take a stage's decisions over. What is decided stays so unless it is probed again; detections always do."""
        for index, new in zip(indices, decided, strict=True):
            old = self.decisions[index] or (None,)
            samples = max(len(old), len(new))
            old, new = (each if len(each) == samples else each * samples for each in (old, new))
            again = bool(self.branches[index].settings.recheck_every)
            kept = tuple(_kept(a, b, again) for a, b in zip(old, new, strict=True))
            self.decisions[index] = kept
            self._weigh(index)

    def _weigh(self, index: int) -> None:
        """Set the weights that follow from what is decided so far."""
        decided = [1.0 if one is None else one.weight for one in self.decisions[index]]
        self.run.weights[index] = _as_weight(self.images.weights(index, decided or [1.0]))

    # what the user sees

    def verdicts(self) -> tuple[Verdict, ...]:
        """Return what was decided so far."""
        return tuple(
            Verdict(
                branch.lora,
                branch.settings.decide,
                _known(self.images.decisions(index, self.decisions[index])),
                _numbers(self.run.weights[index]),
                branch.node,
                tuple(self.images.checks[index]),
                self.images.notes[index],
            )
            for index, branch in enumerate(self.branches)
        )

    def cost(self, samples: int, seconds: float) -> Cost:
        """Return what was spent so far, per latent of a batch."""
        evaluations = self.run.evaluations
        spent = {kind: rows / samples for kind, rows in evaluations.spent.items()}
        return Cost(spent, evaluations.plain / samples, seconds, len(self._sigmas) - 1)


def gated_conditionals(
    executor: Callable[..., list[torch.Tensor]],
    model: Any,
    conds: Sequence[Any],
    x: torch.Tensor,
    sigma: torch.Tensor,
    model_options: dict[str, Any],
) -> list[torch.Tensor]:
    """Return the predictions for all conditionings; the host's signature of a `CALC_COND_BATCH` wrapper.

    What the gate detects is erased from this very prediction on, which is then computed again.
    """
    gate: Gate | None = model_options.get("transformer_options", {}).get(GATE)
    if gate is None or gate.run.predicting is not None or model is not gate.context.model:
        return executor(model, conds, x, sigma, model_options)
    gate.passed = True
    with gate.images.reading(sigma) as features:
        out = executor(model, conds, x, sigma, model_options)
    if features is not None and gate.windowed:
        gate.images.skip("the host cuts the latent into context windows")
    elif features is not None:
        gate.images.read(features, conds, sigma)
    if not gate.windowed and gate.observe(conds, out, x, sigma) and gate.run.active():
        with gate.run.evaluations.of(None):
            out = executor(model, conds, x, sigma, model_options)
    return gate.delta.added(conds, out, x, sigma)


def gated_windows(
    executor: Callable[..., torch.Tensor],
    x: torch.Tensor,
    sigma: torch.Tensor,
    model_options: dict[str, Any] | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    """Return the guided prediction; the host's signature of a `PREDICT_NOISE` wrapper.

    Where the host cuts the latent into context windows, the gate decides for all of them on the whole latent, before
    the first one is predicted.
    """
    given = model_options or {}
    gate: Gate | None = given.get("transformer_options", {}).get(GATE)
    handler = given.get("context_handler")
    if gate is not None and gate.run.predicting is None and handler is not None:
        conds = list(executor.class_obj.conds.values())  # type: ignore[attr-defined]
        gate.windowed = handler.should_use_context(gate.context.model, conds, x, sigma, given)
        if gate.windowed:
            gate.observe((), (), x, sigma, together=getattr(handler, "dim", None) == 0)
    return executor(x, sigma, given, seed)


def _is_detected(decision: Decision | None) -> bool:
    return decision is not None and decision.detected


def _detected(decisions: Sequence[Decision | None]) -> int:
    return sum(map(_is_detected, decisions))


def _leading(decisions: Sequence[Decision | None]) -> Decision | None:
    """The decision that says most; None where all are open."""
    known = [one for one in decisions if one is not None]
    return max(known, key=lambda one: (one.detected, one.score - one.threshold), default=None)


def _kept(old: Decision | None, new: Decision | None, again: bool) -> Decision | None:
    """Which of two decisions on a sample holds; `again`: whether what was not detected is probed again."""
    return old if new is None or (old is not None and (old.detected or not again)) else new


def _known(decisions: Sequence[Decision | None]) -> tuple[Decision, ...]:
    """The decisions made, where none is open or one has detected something."""
    known = tuple(decision for decision in decisions if decision is not None)
    return known if len(known) == len(decisions) or _detected(known) else ()


def _step(decision: Decision | None) -> int:
    return 0 if decision is None or decision.step is None else decision.step


def _as_weight(weights: Sequence[float]) -> Weight:
    """One number where all samples agree, else one per sample, [B]."""
    return weights[0] if len(set(weights)) == 1 else torch.tensor(weights)


def _numbers(weight: Weight) -> tuple[float, ...]:
    return tuple(weight.tolist()) if isinstance(weight, torch.Tensor) else (weight,)


def _plain(weight: Weight) -> Any:
    """A weight as numbers, to compare."""
    return torch.as_tensor(weight).tolist()
