"""From predictions to decisions: which statistics the inputs allow, which one decides, and against which threshold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...unguide_core.probe import (
    AUTOMATIC,
    STATISTICS,
    Decision,
    Statistic,
    alignment_statistic,
    decide_by,
    influence_statistic,
    paper_statistic,
)
from ...unguide_core.probe.calibration import UNCALIBRATED, tells_apart
from ..lora.load import Conditioning, ErasureLora
from .baseline import influence_on_entries, influence_on_prompt, read_calibration
from .conds import Entry
from .predictions import Predictions, Wanted
from .settings import Settings

EITHER = ("influence", "alignment")
WEAK, UNCALIBRATED_HERE = "weak gate", "not calibrated"
"""Caveats of a decision."""


def decide(
    predictions: Predictions,
    loras: Sequence[tuple[int, ErasureLora]],
    settings: Settings,
    *,
    step: int | None = None,
    by_sample: bool = False,
    all_statistics: bool = False,
) -> list[tuple[Decision, ...]]:
    """Return for each erasure LoRA whether the prompt asks for its concept, from predictions at one latent.

    Args:
        loras: with their numbers in the run.
        step: the sampling step that the latent belongs to, from 0; None before the first.
        by_sample: decide each sample by itself; else they are repeats of one prompt, and there is one decision.
        all_statistics: take all statistics that the inputs allow, and not only those that decide.
    Raises: ValueError if the statistic asked for lacks an input, or a prediction is NaN or infinite.
    """
    probes = [_Probe(predictions, index, lora, settings, all_statistics) for index, lora in loras]
    predictions.fetch(wanted for probe in probes for wanted in probe.wanted())
    samples = range(len(predictions.latent)) if by_sample else [None]
    return [tuple(probe.decision(sample, step) for sample in samples) for probe in probes]


class _Probe:
    """One erasure LoRA, probed at one latent."""

    def __init__(
        self, predictions: Predictions, index: int, lora: ErasureLora, settings: Settings, all_statistics: bool
    ):
        self.predictions, self.index, self.lora, self.settings = predictions, index, lora, settings
        self.entries = predictions.context.prompt
        self.adapters = len(predictions.context.run.loras)
        self.neutral = settings.neutral if settings.neutral is not None else lora.neutral
        self.calibrated = read_calibration(predictions, lora)
        self.deciding, self.reason = self._choose()
        others = [name for name in STATISTICS if name not in self.deciding and self._missing(name) is None]
        self.statistics = (*self.deciding, *(others if all_statistics else ()))

    # which statistic decides

    def _choose(self) -> tuple[tuple[str, ...], str]:
        """The statistics that decide, and why."""
        names: tuple[str, ...]
        if self.settings.resist_adversarial:
            names, why = EITHER, "or alignment, to resist adversarial text"
        elif self.settings.statistic != AUTOMATIC:
            names, why = (self.settings.statistic,), "as chosen"
        else:
            names, why = (self._best(),), "the best that inputs and calibration allow"
        for name in names:
            if missing := self._missing(name):
                raise ValueError(f"the statistic {name!r} of erasure LoRA {self.lora.name!r} needs {missing}")
        parts = [f"{names[0]}, {why}"]
        if self.calibrated.note:
            parts.append(self.calibrated.note)
        if names == ("paper",) and self.neutral is None:
            parts.append("the negative prompt stands in for the neutral one")
        if self.caveat == WEAK:
            missing = (
                "connect a CLIP to it" if self.lora.neutral is None else "the file names no concept; name it there"
            )
            parts.append(f"a weak rule, for want of the concept's own prompt in Load Erasure LoRA: {missing}")
        return names, "; ".join(parts)

    @property
    def caveat(self) -> str:
        """What the user should know about a decision that the gate had to make with too little."""
        if self.settings.statistic != AUTOMATIC or self.settings.resist_adversarial:
            return ""
        if self._best() == "paper":
            return WEAK
        return "" if self.calibrated.influence is not None else UNCALIBRATED_HERE

    def _best(self) -> str:
        """The best statistic that inputs and calibration allow; the paper's where they allow no other."""
        influence, alignment = self.calibrated.influence, self.calibrated.alignment
        calibrated = influence is not None and tells_apart(
            influence, alignment, self.settings.false_positive_rate, self.adapters
        )
        order = (*(("influence",) if calibrated else ()), "alignment", "influence", "paper")
        return next((name for name in order if self._missing(name) is None), "paper")

    def _missing(self, statistic: str) -> str | None:
        """What a statistic lacks, in words; None if it can be taken."""
        concept, neutral = self.lora.concept, self.neutral
        if statistic == "alignment" and concept is None:
            return "the concept's own prompt, encoded: connect a CLIP to Load Erasure LoRA and name the concept there"
        if statistic == "alignment" and neutral is None:
            return (
                "the neutral (empty) prompt: connect a CLIP to Load Erasure LoRA, or an encoded empty prompt to "
                "UnGuide Settings"
            )
        if statistic == "influence" and concept is None and self.calibrated.baseline is None:
            return (
                f"the adapter's influence on its own concept at latent {list(self.predictions.latent.shape[1:])} and "
                f"sigma {self.predictions.level:.3f} ({self.calibrated.note}); connect a CLIP to Load Erasure LoRA"
            )
        if statistic == "paper" and neutral is None and not self.predictions.context.negative:
            return (
                "a neutral prompt: connect a CLIP to Load Erasure LoRA, or an encoded empty prompt to UnGuide Settings"
            )
        return None

    # the values

    def wanted(self) -> Iterator[Wanted]:
        """The predictions that the statistics take."""
        for entry in self.entries:
            if "alignment" in self.statistics:
                yield from self.predictions.aligned(entry, *self._references())
            if self._adapted:
                subject = self.predictions.prompt(entry)
                yield from ((subject, None), (subject, self.index))

    def decision(self, sample: int | None, step: int | None) -> Decision:
        """The decision for one sample, or for all of them as repeats."""
        statistics = [self._statistic(name, sample) for name in self.statistics]
        count = len(self.deciding)
        leading = sorted(statistics[:count], key=lambda one: (one.detected, one.score - one.threshold), reverse=True)
        return decide_by(
            [*leading, *statistics[count:]],
            self.settings.weight_detected,
            self.settings.weight_otherwise,
            reason=self.reason,
            model_key=self.predictions.context.model_key,
            adapter_key=self.lora.key,
            sigma=self.predictions.level,
            step=step,
            influence_map=self._map(sample),
            caveat=self.caveat,
        )

    def _statistic(self, name: str, sample: int | None) -> Statistic:
        """A statistic of one sample, or of all as repeats; of several entries the one with the highest score."""
        values = (self._values(name, entry) for entry in self.entries)
        chosen = (each if sample is None else each[sample : sample + 1] for each in values)
        return max((self._held_against(name, each) for each in chosen), key=lambda statistic: statistic.score)

    def _values(self, name: str, entry: Entry) -> torch.Tensor:
        """A statistic's raw values for an entry of the prompt, [B]."""
        if name == "alignment":
            return self.predictions.alignment(entry, *self._references())
        return self.predictions.influence(self.predictions.prompt(entry), self.index)

    def _held_against(self, name: str, values: torch.Tensor) -> Statistic:
        """Raw values against what they are compared with, and against the threshold."""
        if name == "paper":
            return paper_statistic(values, self._neutral_influence())
        if name == "alignment":
            return alignment_statistic(values, self._threshold(name))
        return influence_statistic(values, self._concept_influence(), self._threshold(name))

    def _threshold(self, name: str) -> float:
        """The settings' threshold, else the calibration's (of influence), else the statistic's default."""
        if self.settings.threshold is not None:
            return self.settings.threshold
        level = self.calibrated.influence if name == "influence" else None
        return (
            UNCALIBRATED[name] if level is None else level.threshold(self.settings.false_positive_rate, self.adapters)
        )

    def _references(self) -> tuple[Conditioning, Conditioning]:
        """The concept's own prompt and the neutral one, which `_missing` has found to be there."""
        assert self.lora.concept is not None
        assert self.neutral is not None
        return self.lora.concept, self.neutral

    def _concept_influence(self) -> tuple[float, ...]:
        """The adapter's influence on its own concept: the calibration's where it holds, else measured once."""
        if self.calibrated.baseline is not None:
            return (self.calibrated.baseline,)
        assert self.lora.concept is not None
        return influence_on_prompt(self.predictions, self.index, self.lora, self.settings, self.lora.concept)

    def _neutral_influence(self) -> tuple[float, ...]:
        if self.neutral is not None:
            return influence_on_prompt(self.predictions, self.index, self.lora, self.settings, self.neutral)
        negative = self.predictions.context.negative
        return influence_on_entries(self.predictions, self.index, self.lora, self.settings, negative)

    @property
    def _adapted(self) -> bool:
        """Whether a statistic takes the adapter's predictions."""
        return any(name != "alignment" for name in self.statistics)

    def _map(self, sample: int | None) -> torch.Tensor | None:
        """Where the adapter acts on the prompt, [H, W]; 1 is its mean effect on the concept's own prompt."""
        if not self._adapted or self._missing("influence"):
            return None
        found = [self.predictions.influence_map(self.predictions.prompt(entry), self.index) for entry in self.entries]
        maps = torch.stack(found).amax(dim=0)
        values = self._concept_influence()
        positions = self.predictions.latent[0, 0].numel()
        unit = sum(values) / len(values) / positions**0.5
        return (maps.mean(dim=0) if sample is None else maps[sample]).cpu() / unit
