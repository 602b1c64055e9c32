"""From a look to decisions: which statistics the inputs allow, which one decides, and against which threshold."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..unguide_core.calibration import UNCALIBRATED, Threshold, tells_apart
from ..unguide_core.probe import (
    BINARY,
    POLICIES,
    STATISTICS,
    Decision,
    Statistic,
    alignment_statistic,
    decide_by,
    influence_statistic,
    paper_statistic,
)
from .baselines import Measurement, read_card
from .context import Context, Entry
from .erasure import Conditioning, ErasureLora
from .looking import Look, Wanted

log = logging.getLogger(__name__)

AUTO, EITHER = "auto", "either"
CHOICES = (AUTO, EITHER, *STATISTICS)
RELATIVE = ("patch", "influence")


@dataclass(frozen=True)
class ProbeSettings:
    """How the probe looks and decides.

    Args:
        statistic: "patch", "influence", "alignment", "paper", or "auto": influence where the card's calibration
            tells the concept from other prompts better than alignment does, else alignment, else what the inputs
            allow; "either" of influence and alignment: text that was optimised to get past an adapter hardly moves it,
            and still pulls the picture.
        threshold: score at or above which the concept counts as detected; 0 takes the calibration's, or the
            statistic's own.
        false_alarm_rate: share of other prompts that a calibrated threshold may take for the concept.
        repeats: noise seeds, evaluated as one latent batch.
        probe_steps: denoising steps before the statistics are taken.
        schedule_steps: steps of the whole schedule that these are the first of.
        seed: of the probe's noise.
        weight_detected, weight_otherwise: the base model's weight in the blend, by the decision.
        policy: "binary", or "smooth": between the two weights, by the confidence.
    """

    statistic: str = AUTO
    threshold: float = 0.0
    false_alarm_rate: float = 0.01
    repeats: int = 2
    probe_steps: int = 2
    schedule_steps: int = 20
    seed: int = 0
    weight_detected: float = 0.0
    weight_otherwise: float = 1.0
    policy: str = BINARY

    def __post_init__(self) -> None:
        if self.statistic not in CHOICES:
            raise ValueError(f"unknown statistic {self.statistic!r}; expected one of {', '.join(CHOICES)}")
        if self.policy not in POLICIES:
            raise ValueError(f"unknown policy {self.policy!r}; expected one of {', '.join(POLICIES)}")
        if not 0.0 < self.false_alarm_rate < 1.0:
            raise ValueError(f"false_alarm_rate is {self.false_alarm_rate}; expected a share between 0 and 1")
        if self.repeats < 1:
            raise ValueError(f"the probe's repeats are {self.repeats}; expected at least 1")
        if not 1 <= self.probe_steps < self.schedule_steps:
            raise ValueError(
                f"probe_steps is {self.probe_steps} of {self.schedule_steps} schedule_steps; expected at least 1 and "
                "fewer than the schedule has"
            )


@dataclass(frozen=True)
class Found:
    """What a look decided for one erasure LoRA.

    Args:
        decisions: one for all samples as repeats, or one per sample.
        maps: where the concept is being drawn, one per decision, [H, W] relative to the concept's own prompt (1 is its
            strongest patch); None where no adapter was evaluated.
        sigma: the noise level of the look.
    """

    decisions: tuple[Decision, ...]
    maps: tuple[torch.Tensor, ...] | None
    sigma: float


@dataclass
class Judge:
    """Decides at a look.

    Args:
        context: the sampling run.
        settings: which statistic, which threshold, which weights.
        neutral: the neutral conditioning, None for the erasure LoRA's own.
        everything: take all statistics that the inputs allow, not the deciding ones alone.
        by_sample: decide each sample by itself; else they are repeats of one prompt.
    """

    context: Context
    settings: ProbeSettings
    neutral: Conditioning | None = None
    everything: bool = False
    by_sample: bool = False
    baselines: Measurement = field(init=False)

    def __post_init__(self) -> None:
        self.baselines = Measurement(self.context, self.settings.schedule_steps, self.settings.seed)

    def decide(self, look: Look, loras: Sequence[tuple[int, ErasureLora]]) -> list[Found]:
        """Whether the prompt carries each erasure LoRA's concept, all of them in one look.

        Args:
            loras: with their numbers in the run.
        Raises: ValueError if the statistic asked for lacks an input, or a prediction is NaN or infinite.
        """
        cases = [Case(self, look, index, lora) for index, lora in loras]
        look.fetch(wanted for case in cases for wanted in case.wanted())
        return [case.found() for case in cases]

    def neutral_of(self, lora: ErasureLora) -> Conditioning | None:
        return self.neutral if self.neutral is not None else lora.neutral


class Case:
    """One erasure LoRA at a look."""

    def __init__(self, judge: Judge, look: Look, index: int, lora: ErasureLora):
        self.judge, self.look, self.index, self.lora = judge, look, index, lora
        self.entries = judge.context.prompt
        self.card = {name: read_card(judge.context, lora, name, look) for name in RELATIVE}
        self.deciding, self.reason = self._choose()
        self.beside = self._beside()

    # which statistic

    def missing(self, statistic: str) -> str | None:
        """What a statistic lacks, as words for a person; None if it can be taken."""
        if statistic == "alignment":
            if self.lora.concept is None:
                return "the concept's own prompt, encoded: connect a CLIP to Load Erasure LoRA, name the concept there"
            if self.judge.neutral_of(self.lora) is None:
                return (
                    "the neutral (empty) prompt: connect a CLIP to Load Erasure LoRA, or an encoded empty prompt here"
                )
        if statistic in RELATIVE and self.lora.concept is None and not self.card[statistic].baseline:
            return (
                f"the adapter's influence on its own concept at latent {list(self.look.latent.shape[1:])} and sigma "
                f"{self.look.level:.3f} ({self.card[statistic].note}); connect a CLIP to Load Erasure LoRA"
            )
        if statistic == "paper" and self.judge.neutral_of(self.lora) is None and not self.judge.context.negative:
            return "a neutral prompt: connect an encoded empty prompt as 'neutral', or a CLIP to Load Erasure LoRA"
        return None

    def _choose(self) -> tuple[tuple[str, ...], str]:
        """The statistics that decide, and why it is these."""
        asked = self.judge.settings.statistic
        if asked != AUTO:
            names = ("influence", "alignment") if asked == EITHER else (asked,)
            for name in names:
                lacking = self.missing(name)
                if lacking:
                    raise ValueError(f"the statistic {name!r} of erasure LoRA {self.lora.name!r} needs {lacking}")
            return names, self._reason(names[0], "or alignment, as chosen" if asked == EITHER else "as chosen")
        first = ("influence",) if self._tells_apart() else ()
        for name in (*first, "alignment", "influence", "paper"):
            if self.missing(name) is None:
                return (name,), self._reason(name, "the best that inputs and card allow")
        raise ValueError(f"no gate for erasure LoRA {self.lora.name!r}: it needs {self.missing('paper')}")

    def _tells_apart(self) -> bool:
        """Whether the card's calibration speaks for influence."""
        influence = self.card["influence"].level
        alignment = read_card(self.judge.context, self.lora, "alignment", self.look).level
        return influence is not None and tells_apart(influence, alignment, self.judge.settings.false_alarm_rate)

    def _reason(self, name: str, why: str) -> str:
        parts = [f"{name}, {why}"]
        reading = self.card["influence" if name not in RELATIVE else name]
        if reading.note and self.lora.adapter.card.calibration:
            parts.append(reading.note)
        if name == "paper" and self.judge.neutral_of(self.lora) is None:
            parts.append("the negative prompt stood in for the neutral one")
            log.warning("UnGuide: %s has no neutral prompt; the negative prompt stands in for it", self.lora.name)
        return "; ".join(parts)

    def _beside(self) -> list[str]:
        """Statistics that are reported beside the deciding one: all that can be had, or those that cost no more."""
        others = [name for name in STATISTICS if name not in self.deciding]
        if self.judge.everything:
            return [name for name in others if self.missing(name) is None]
        free = self.deciding[0] in RELATIVE
        return [name for name in others if free and name in RELATIVE and self.card[name].baseline]

    def threshold(self, statistic: str) -> Threshold:
        """The settings' threshold, else the one that the calibration gives, else the statistic's default."""
        settings = self.judge.settings
        level = self.card[statistic].level if statistic in RELATIVE else None
        measured = UNCALIBRATED[statistic] if level is None else level.threshold(settings.false_alarm_rate)
        if not settings.threshold:
            return measured
        return Threshold(settings.threshold, max(settings.threshold, measured.certain))

    # values

    def wanted(self) -> Iterator[Wanted]:
        """The predictions that the statistics take."""
        names = (*self.deciding, *self.beside)
        for entry in self.entries:
            if "alignment" in names:
                neutral = self.judge.neutral_of(self.lora)
                assert neutral is not None
                yield from self.look.wanted_for_alignment(entry, self.lora, neutral)
            if set(names) - {"alignment"}:
                subject = self.look.prompt(entry)
                yield from ((subject, None), (subject, self.index))

    def found(self) -> Found:
        """The decisions, with maps where the adapter was evaluated."""
        samples: list[int | None] = list(range(len(self.look.latent))) if self.judge.by_sample else [None]
        names = (*self.deciding, *self.beside)
        values = {name: [self._values(name, entry) for entry in self.entries] for name in names}
        decisions = tuple(self._decision(values, sample) for sample in samples)
        return Found(decisions, self._maps(samples), self.look.level)

    def _decision(self, values: dict[str, list[torch.Tensor]], sample: int | None) -> Decision:
        settings = self.judge.settings
        statistics = [self._statistic(name, of_entries, sample) for name, of_entries in values.items()]
        count = len(self.deciding)
        leading = sorted(statistics[:count], key=lambda one: one.score / one.threshold, reverse=True)
        return decide_by(
            [*leading, *statistics[count:]],
            settings.weight_detected,
            settings.weight_otherwise,
            policy=settings.policy,
            reason=self.reason,
            model_key=self.judge.context.model_key,
            adapter_key=self.lora.key,
        )

    def _values(self, name: str, entry: Entry) -> torch.Tensor:
        """One statistic's values for an entry of the prompt, [B]."""
        if name == "alignment":
            neutral = self.judge.neutral_of(self.lora)
            assert neutral is not None
            return self.look.alignment(entry, self.lora, neutral)
        if name == "patch":
            return self.look.map(self.look.prompt(entry), self.index).flatten(1).amax(dim=1)
        return self.look.influence(self.look.prompt(entry), self.index)

    def _statistic(self, name: str, of_entries: Sequence[torch.Tensor], sample: int | None) -> Statistic:
        """The statistic of one sample, or of all as repeats; of several entries that which carries the concept most."""
        values = [each if sample is None else each[sample : sample + 1] for each in of_entries]
        return max((self._of(name, each) for each in values), key=lambda statistic: statistic.score)

    def _of(self, name: str, values: torch.Tensor) -> Statistic:
        if name == "paper":
            return paper_statistic(values, self._neutral_influence())
        threshold = self.threshold(name)
        if name == "alignment":
            return alignment_statistic(values, threshold.score, certain=threshold.certain)
        return influence_statistic(
            values, self._concept_influence(name), threshold.score, certain=threshold.certain, name=name
        )

    def _concept_influence(self, name: str) -> torch.Tensor:
        """The adapter's influence on its own concept: the card's where it fits, else measured once."""
        reading = self.card[name]
        if reading.baseline and reading.level is not None:
            return torch.tensor([reading.level.baseline])
        assert self.lora.concept is not None
        return self.judge.baselines.of_conditioning(self.index, self.lora, self.lora.concept, self.look).of(name)

    def _neutral_influence(self) -> torch.Tensor:
        neutral = self.judge.neutral_of(self.lora)
        if neutral is None:
            negative = self.judge.context.negative
            return self.judge.baselines.of_entries(self.index, self.lora, negative, self.look).of("influence")
        return self.judge.baselines.of_conditioning(self.index, self.lora, neutral, self.look).of("influence")

    def _maps(self, samples: Sequence[int | None]) -> tuple[torch.Tensor, ...] | None:
        """Where the adapter acts on the prompt, relative to its strongest patch on the concept's own prompt."""
        if self.deciding == ("alignment",) and not set(self.beside) - {"alignment"}:
            return None
        if self.missing("patch") is not None:
            return None
        maps = torch.stack([self.look.map(self.look.prompt(entry), self.index) for entry in self.entries]).amax(dim=0)
        maps = (maps / self._concept_influence("patch").mean().to(maps)).cpu()
        return tuple(maps.mean(dim=0) if sample is None else maps[sample] for sample in samples)
