"""What one sampling run did with its erasure LoRAs, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from ...unguide_core.probe import Decision
from ..lora.load import ErasureLora
from ..probe.settings import ALWAYS


@dataclass(frozen=True)
class ImageCheck:
    """What one reading of a batch's images said about one concept.

    Args:
        start: whether the start images were read, and not those that a run generates.
        scores: of each sample, see `unguide_core.probe.image`; None where the run was for other samples of the batch.
        shown: for each sample, whether it shows the concept.
        again: for each sample, whether it was generated again because an earlier reading had seen the concept.
        step, sigma: where it was read in the run, from 0; None for start images and finished ones.
    """

    start: bool
    scores: tuple[float | None, ...]
    shown: tuple[bool, ...]
    again: tuple[bool, ...]
    step: int | None = None
    sigma: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What one sampling run did with one erasure LoRA.

    Args:
        lora: the erasure LoRA.
        decide: how its gate decides, see `probe.settings.Settings`.
        decisions: one for the whole batch, or one per sample; empty with "always erase", and before the decision.
        weights: the base model's in the blend, likewise.
        node: the id of the UnGuide node that put the erasure LoRA on the model; "" where another node did.
        images: what the images showed, each time that they were read.
        image_note: why they were not read; empty if they were, or if that was not wanted.
    """

    lora: ErasureLora
    decide: str
    decisions: tuple[Decision, ...]
    weights: tuple[float, ...]
    node: str = ""
    images: tuple[ImageCheck, ...] = ()
    image_note: str = ""

    @property
    def decision(self) -> Decision | None:
        """The decision that says most; None where there is none."""
        return leading(self.decisions) if self.decisions else None

    @property
    def waiting(self) -> bool:
        """Whether the gate has not decided yet."""
        return not self.decisions and self.decide != ALWAYS

    @property
    def detected(self) -> bool:
        """Whether the concept was detected in any sample, or is erased without asking."""
        return any(one.detected for one in self.decisions) or self.decide == ALWAYS

    @property
    def caveat(self) -> str:
        """Why the decision is less sure than it could be; empty where all is well."""
        last: dict[int, bool] = {}
        for check in self.images:
            for sample, (score, shown, again) in enumerate(zip(check.scores, check.shown, check.again, strict=True)):
                if score is not None:
                    last[sample] = shown and again
        if any(last.values()):
            return "still shown"
        return self.decision.caveat if self.decision is not None else ""

    @property
    def concept(self) -> str:
        """What is erased, in words: the concept's prompt, or the file's name where that is unknown."""
        return self.lora.concept_prompt or self.lora.name

    @property
    def word(self) -> str:
        """What is erased, as short as can be: the concept's word, or the file's name where that is unknown."""
        return self.lora.word or PurePath(self.lora.name).stem


@dataclass(frozen=True)
class Cost:
    """What one sampling run cost.

    Args:
        evaluations: model evaluations (NFE) per latent of the batch, by kind; see `blend.state.Evaluations`.
        plain: what the same run takes without UnGuide, likewise.
        seconds: wall time of gates and sampling.
        steps: of the run; 0 where nothing was sampled, as by Stability Probe.
    """

    evaluations: dict[str, float]
    plain: float
    seconds: float
    steps: int = 0

    @property
    def total(self) -> float:
        """All evaluations per latent."""
        return sum(self.evaluations.values())


def leading(decisions: Sequence[Decision]) -> Decision:
    """Return the decision that detected something, with the highest score."""
    return max(decisions, key=lambda decision: (decision.detected, decision.score))
