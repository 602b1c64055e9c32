"""What the base model and the adapters predict for a prompt at one latent and noise level, and what follows from it.

The statistics themselves are `unguide_core.probe`'s; here are the host's conditionings that they are taken of. Knows
neither where the latent comes from (a probe's own trajectory, or the sampling run's) nor what is done with a decision.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch

from ..unguide_core.probe import (
    STATISTICS,
    Decision,
    Statistic,
    alignment,
    alignment_statistic,
    decide_by,
    influence,
    influence_statistic,
    paper_statistic,
)
from .blending import RUN, Run
from .erasure import Conditioning, ErasureLora

log = logging.getLogger(__name__)

AUTO = "auto"
# measured over ten concepts: see docs/gate.md
DEFAULT_THRESHOLDS = {"alignment": 0.5, "influence": 0.68, "paper": 1.0}

# how far the noise level of a look may be from that of a card's calibration: a schedule of 30 steps has no step at just
# the level of one of 20
SIGMA_TOLERANCE = 0.1

Entry = dict[str, Any]

# what says where and when a conditioning acts, and what it says; the rest (ControlNet, ...) is kept for comparison
_WHERE = ("area", "mask", "mask_strength", "strength", "set_area_to_bounds", "default")
_WHEN = ("timestep_start", "timestep_end", "start_percent", "end_percent", "clip_start_percent", "clip_end_percent")
_REGION = frozenset((*_WHERE, *_WHEN))
_TEXT = frozenset(("cross_attn", "pooled_output", "model_conds", "uuid"))


@dataclass(frozen=True)
class ProbeSettings:
    """How the probe looks and decides.

    Args:
        statistic: "alignment", "influence", "paper", or "auto": the first of them that the inputs allow; and besides
            alignment also influence, where the adapter's card has a threshold that was measured for it.
        threshold: score at or above which the concept counts as detected; 0 takes the card's or the statistic's own.
        repeats: noise seeds, evaluated as one latent batch.
        probe_steps: denoising steps before the statistics are taken.
        schedule_steps: steps of the whole schedule that these are the first of.
        seed: of the probe's noise.
        weight_detected, weight_otherwise: the base model's weight in the blend, by the decision.
    """

    statistic: str = AUTO
    threshold: float = 0.0
    repeats: int = 2
    probe_steps: int = 2
    schedule_steps: int = 20
    seed: int = 0
    weight_detected: float = 0.0
    weight_otherwise: float = 1.0

    def __post_init__(self) -> None:
        if self.statistic not in (AUTO, *STATISTICS):
            raise ValueError(f"unknown statistic {self.statistic!r}; expected auto, {', '.join(STATISTICS)}")
        if self.repeats < 1:
            raise ValueError(f"the probe's repeats are {self.repeats}; expected at least 1")
        if not 1 <= self.probe_steps < self.schedule_steps:
            raise ValueError(
                f"probe_steps is {self.probe_steps} of {self.schedule_steps} schedule_steps; expected at least 1 and "
                "fewer than the schedule has"
            )


@dataclass(frozen=True)
class Context:
    """A sampling run of the host, in the middle of which to look.

    Args:
        guider: the host's guider (its conds processed, its model loaded).
        run: the state that the blending wrapper reads; evaluations are counted there.
        model_options: the sampling function's, `run` in their transformer options.
        latent_image, denoise_mask: the run's, for models that take them as conditioning.
    """

    guider: Any
    run: Run
    model_options: dict[str, Any]
    latent_image: torch.Tensor | None = None
    denoise_mask: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.guider.model_patcher.load_device

    @property
    def prompt(self) -> list[Entry]:
        """All entries of the prompt; guiders with a second one (DualCFGGuider) keep it under another key.

        Raises: ValueError if the guider has none.
        """
        conds = getattr(self.guider, "conds", {})
        entries = [entry for key in conds if key != "negative" for entry in conds[key]]
        if not entries:
            raise ValueError(
                f"the guider {type(self.guider).__name__} has no positive conditioning to probe; use a guider with one "
                "(CFGGuider, BasicGuider, DualCFGGuider, ...), or the gate mode 'fixed'"
            )
        return entries

    @property
    def negative(self) -> list[Entry]:
        return self.guider.conds.get("negative") or []


def carrying(extra_args: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Copies of a sampling function's `extra_args` whose transformer options carry the run."""
    options = extra_args["model_options"]
    return {
        **extra_args,
        "model_options": {**options, "transformer_options": {**options.get("transformer_options", {}), RUN: run}},
    }


@dataclass(frozen=True)
class Measured:
    """One statistic's values per sample, before anything is held against a threshold.

    Args:
        prompt: for each entry of the prompt, [B].
        neutral, concept: what they are compared with, [B] or the card's one number; None where unused.
    """

    name: str
    prompt: tuple[torch.Tensor, ...]
    neutral: torch.Tensor | None = None
    concept: torch.Tensor | None = None

    def statistic(self, threshold: float, sample: int | None = None) -> Statistic:
        """The statistic of one sample, or of all as repeats; of several entries that which carries the concept most."""
        found = [self._of(_at(values, sample), threshold, sample) for values in self.prompt]
        return max(found, key=lambda statistic: statistic.score)

    def _of(self, values: torch.Tensor, threshold: float, sample: int | None) -> Statistic:
        if self.name == "alignment":
            return alignment_statistic(values, threshold)
        if self.name == "influence":
            assert self.concept is not None
            return influence_statistic(values, _at(self.concept, sample), threshold)
        assert self.neutral is not None
        return paper_statistic(values, _at(self.neutral, sample))


def _at(values: torch.Tensor, sample: int | None) -> torch.Tensor:
    return values if sample is None or len(values) == 1 else values[sample : sample + 1]


class Look:
    """The statistics of a prompt at one latent.

    Args:
        context: the sampling run.
        settings: which statistic, which threshold, which weights.
        latent: at the noise level `sigma`, [B, C, ...].
        neutral: the neutral conditioning, None for the erasure LoRA's own.
        known: predictions of the base model at this latent that are there already, by the id of the entry.
    """

    def __init__(
        self,
        context: Context,
        settings: ProbeSettings,
        latent: torch.Tensor,
        sigma: float,
        neutral: Conditioning | None = None,
        known: Mapping[int, torch.Tensor] | None = None,
    ):
        self.context, self.settings = context, settings
        self.latent, self.sigma = latent, sigma
        self.neutral_override = neutral
        self.known = dict(known or {})
        self._references: dict[tuple[int, ...], torch.Tensor] = {}

    def decide(self, index: int, lora: ErasureLora, *, everything: bool = False) -> Decision:
        """Whether the prompt carries the concept of erasure LoRA `index` of the run; the samples are repeats of it.

        Args:
            everything: take all statistics that the inputs allow, not the deciding one alone.
        Raises: ValueError if the statistic asked for lacks an input, or a prediction is NaN or infinite.
        """
        deciding, reason = self._deciding(lora)
        available = [name for name in STATISTICS if self.missing(name, lora) is None]
        others = [name for name in available if everything and name not in deciding]
        measured = {name: self._measure(name, index, lora) for name in (*deciding, *others)}
        found = self._statistics([measured[name] for name in deciding], lora)
        beside = self._statistics([measured[name] for name in others], lora)
        return self._decision([*_detecting_first(found), *beside], lora, reason)

    def decide_each(self, index: int, lora: ErasureLora) -> tuple[Decision, ...]:
        """The same for every sample of the batch by itself."""
        deciding, reason = self._deciding(lora)
        measured = [self._measure(name, index, lora) for name in deciding]
        by_sample = [self._statistics(measured, lora, sample) for sample in range(len(self.latent))]
        return tuple(self._decision(_detecting_first(statistics), lora, reason) for statistics in by_sample)

    def _statistics(
        self, measured: Sequence[Measured], lora: ErasureLora, sample: int | None = None
    ) -> list[Statistic]:
        return [one.statistic(self._threshold(one.name, lora), sample) for one in measured]

    def _decision(self, statistics: Sequence[Statistic], lora: ErasureLora, reason: str) -> Decision:
        weights = (self.settings.weight_detected, self.settings.weight_otherwise)
        return decide_by(statistics, *weights, reason=reason, adapter_key=lora.key)

    # the statistics

    def _measure(self, name: str, index: int, lora: ErasureLora) -> Measured:
        if name == "alignment":
            return Measured(name, tuple(self._alignment(entry, lora) for entry in self.context.prompt))
        influences = tuple(self._displacement(index, entry) for entry in self.context.prompt)
        if name == "influence":
            return Measured(name, influences, concept=self._concept_influence(index, lora))
        return Measured(name, influences, neutral=self._neutral_influence(index, lora))

    def _alignment(self, entry: Entry, lora: ErasureLora) -> torch.Tensor:
        neutral = self._neutral(lora)
        assert lora.concept is not None
        assert neutral is not None
        pull = self._base(entry)
        return alignment(pull, self._reference(entry, neutral), self._reference(entry, lora.concept))

    def _concept_influence(self, index: int, lora: ErasureLora) -> torch.Tensor:
        """The adapter's influence on its own concept: the card's where it fits, else measured."""
        calibration = self._calibration(lora)
        if calibration:
            return torch.tensor([float(calibration["mean"])])
        assert lora.concept is not None
        return self.influence_on(index, self._retargeted(self.context.prompt[0], lora.concept))

    def _neutral_influence(self, index: int, lora: ErasureLora) -> torch.Tensor:
        conditioning = self._neutral(lora)
        if conditioning is None:
            return self.influence_on(index, [everywhere(entry) for entry in self.context.negative])
        return self.influence_on(index, self._retargeted(self.context.prompt[0], conditioning))

    def influence_on(self, index: int, entries: list[Entry]) -> torch.Tensor:
        """The adapter's influence on another conditioning, [B], eps units."""
        return self.displacement(index, entries, self.latent)

    def displacement(self, index: int, entries: list[Entry], latent: torch.Tensor) -> torch.Tensor:
        """||adapted - base||, [B], in eps units: that of x0, divided by sigma."""
        base, adapted = self.predict(entries, latent), self.predict(entries, latent, adapter=index)
        return influence(base, adapted) / self.sigma

    def _displacement(self, index: int, entry: Entry) -> torch.Tensor:
        adapted = self.predict([everywhere(entry)], self.latent, adapter=index)
        return influence(self._base(entry), adapted) / self.sigma

    # predictions

    def predict(self, entries: list[Entry], latent: torch.Tensor, adapter: int | None = None) -> torch.Tensor:
        """The conditional x0 prediction of the base model, or of the model that `adapter` makes of it."""
        run, model = self.context.run, self.context.guider.inner_model
        sigma = torch.full((latent.shape[0],), self.sigma, device=latent.device)
        with run.base_only() if adapter is None else run.adapted_only(adapter):
            return comfy.samplers.calc_cond_batch(model, [entries], latent, sigma, self.context.model_options)[0]

    def _base(self, entry: Entry) -> torch.Tensor:
        """The base model's prediction for an entry of the prompt, everywhere and at all times."""
        if id(entry) not in self.known:
            self.known[id(entry)] = self.predict([everywhere(entry)], self.latent)
        return self.known[id(entry)]

    def _reference(self, entry: Entry, conditioning: Conditioning) -> torch.Tensor:
        """The base model's prediction for another prompt in place of an entry's, once for entries alike but in text."""
        for other in self.context.negative:
            if id(other) in self.known and _same_text(other, conditioning) and _kept(other) == _kept(entry):
                return self.known[id(other)]
        key = (id(conditioning), *_kept(entry))
        if key not in self._references:
            self._references[key] = self.predict(self._retargeted(entry, conditioning), self.latent)
        return self._references[key]

    def _retargeted(self, entry: Entry, conditioning: Conditioning) -> list[Entry]:
        """A processed entry with another prompt: the same ControlNet and the like, everywhere and at all times."""
        kept = {name: value for name, value in entry.items() if name not in _REGION | _TEXT}
        others = [
            {
                **kept,
                **options,
                **({} if text is None else {"cross_attn": text}),
                "model_conds": {},
                "uuid": uuid.uuid4(),
            }
            for text, options in conditioning
        ]
        return comfy.samplers.encode_model_conds(
            self.context.guider.inner_model.extra_conds,
            others,
            self.latent,
            self.context.device,
            "positive",
            latent_image=self.context.latent_image,
            denoise_mask=self.context.denoise_mask,
            seed=self.settings.seed,
        )

    def _neutral(self, lora: ErasureLora) -> Conditioning | None:
        return self.neutral_override if self.neutral_override is not None else lora.neutral

    def _calibration(self, lora: ErasureLora) -> Mapping[str, Any]:
        """The card's calibration, where it holds for this strength, latent and noise level; else empty."""
        card = lora.adapter.card.calibration
        same = (
            lora.strength == 1.0
            and list(card.get("latent", ())) == list(self.latent.shape[1:])
            and abs(float(card.get("sigma", 0.0)) / self.sigma - 1.0) < SIGMA_TOLERANCE
        )
        return card if same and "mean" in card else {}

    # which statistic

    def _threshold(self, statistic: str, lora: ErasureLora) -> float:
        """The settings' threshold, else the one measured for this adapter's influence, else the statistic's default."""
        measured = self._calibration(lora).get("threshold") if statistic == "influence" else None
        return self.settings.threshold or measured or DEFAULT_THRESHOLDS[statistic]

    def missing(self, statistic: str, lora: ErasureLora) -> str | None:
        """What a statistic lacks, as words for a person; None if it can be taken."""
        if statistic == "alignment":
            if lora.concept is None:
                return (
                    "the concept's own prompt, encoded: connect a CLIP to Load Erasure LoRA and name the concept there"
                )
            if self._neutral(lora) is None:
                return (
                    "the neutral (empty) prompt: connect a CLIP to Load Erasure LoRA, or an encoded empty prompt here"
                )
        if statistic == "influence" and lora.concept is None and not self._calibration(lora):
            return (
                f"the adapter's influence on its own concept, at latent {list(self.latent.shape[1:])} and sigma "
                f"{self.sigma:.3f}: the card has none that fits; connect a CLIP to Load Erasure LoRA"
            )
        if statistic == "paper" and self._neutral(lora) is None and not self.context.negative:
            return "a neutral prompt: connect an encoded empty prompt as 'neutral', or a CLIP to Load Erasure LoRA"
        return None

    def _deciding(self, lora: ErasureLora) -> tuple[list[str], str]:
        """The statistics of which one that detects suffices, and why it is these."""
        asked = self.settings.statistic
        if asked != AUTO:
            lacking = self.missing(asked, lora)
            if lacking:
                raise ValueError(f"the statistic {asked!r} of erasure LoRA {lora.name!r} needs {lacking}")
            return [asked], self._reason([asked], lora, "as chosen")
        available = [name for name in STATISTICS if self.missing(name, lora) is None]
        if not available:
            raise ValueError(f"no gate for erasure LoRA {lora.name!r}: it needs {self.missing('paper', lora)}")
        names = available[:1]
        if names == ["alignment"] and "threshold" in self._calibration(lora):
            names.append("influence")
        return names, self._reason(names, lora, "the best that the inputs allow")

    def _reason(self, names: Sequence[str], lora: ErasureLora, why: str) -> str:
        reason = f"{' or '.join(names)}, {why}"
        if "paper" in names and self._neutral(lora) is None:
            reason += "; the negative prompt stood in for the neutral one"
            log.warning("UnGuide: %s has no neutral prompt; the negative prompt stands in for it", lora.name)
        return reason


def _detecting_first(statistics: Sequence[Statistic]) -> list[Statistic]:
    """Statistics of which one that detects suffices, so that the first one decides."""
    return sorted(statistics, key=lambda statistic: not statistic.detected)


def everywhere(entry: Entry) -> Entry:
    """A processed entry without its area, mask, strength and time range: what its prompt does to the whole picture."""
    return {name: value for name, value in entry.items() if name not in _REGION}


def is_everywhere(entry: Entry) -> bool:
    """Whether an entry acts on the whole picture, at all times, with its full strength."""
    return not any(name in entry for name in _REGION)


def _kept(entry: Entry) -> tuple[int, ...]:
    """Identifies what an entry has besides its text, place and time: ControlNet and the like."""
    return tuple(id(value) for name, value in sorted(entry.items()) if name not in _REGION | _TEXT)


def _same_text(entry: Entry, conditioning: Conditioning) -> bool:
    """Whether an entry says what a conditioning says."""
    text = entry.get("cross_attn")
    if len(conditioning) != 1 or text is None or conditioning[0][0] is None:
        return False
    other, options = conditioning[0]
    pooled, other_pooled = entry.get("pooled_output"), options.get("pooled_output")
    same_pooled = pooled is other_pooled or (
        pooled is not None and other_pooled is not None and torch.equal(pooled.cpu(), other_pooled.cpu())
    )
    return same_pooled and text.shape == other.shape and torch.equal(text.cpu(), other.cpu())
