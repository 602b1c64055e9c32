"""What one sampling run did with its erasure LoRAs, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...unguide_core.probe import Decision
from ..lora.load import ErasureLora


@dataclass(frozen=True)
class Verdict:
    """What one sampling run did with one erasure LoRA.

    Args:
        lora: the erasure LoRA.
        decide: how its gate decides, see `probe.settings.Settings`.
        decisions: one for the whole batch, or one per sample; empty with "always erase", and before the decision.
        weights: the base model's in the blend, likewise.
    """

    lora: ErasureLora
    decide: str
    decisions: tuple[Decision, ...]
    weights: tuple[float, ...]

    @property
    def decision(self) -> Decision | None:
        """The decision that says most; None where there is none."""
        return leading(self.decisions) if self.decisions else None

    @property
    def concept(self) -> str:
        """What is erased, in words: the concept's prompt, or the file's name where that is unknown."""
        return self.lora.concept_prompt or self.lora.name


@dataclass(frozen=True)
class Cost:
    """What one sampling run cost.

    Args:
        evaluations: model evaluations (NFE) per latent of the batch, by kind; see `blend.state.Evaluations`.
        plain: what the same run takes without UnGuide, likewise.
        seconds: wall time of gates and sampling.
    """

    evaluations: dict[str, float]
    plain: float
    seconds: float

    @property
    def total(self) -> float:
        """All evaluations per latent."""
        return sum(self.evaluations.values())


def leading(decisions: Sequence[Decision]) -> Decision:
    """Return the decision that detected something, with the highest score."""
    return max(decisions, key=lambda decision: (decision.detected, decision.score))
