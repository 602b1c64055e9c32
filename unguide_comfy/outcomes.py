"""What a sampling run did with its erasure LoRAs, for reports, the log and the node that is being executed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..unguide_core.probe import Decision
from .deciding import Found
from .displacing import PROMPT

log = logging.getLogger(__name__)

TRAJECTORY, PROBE, OFFICIAL, FIXED = "trajectory", "probe", "official", "fixed"
MODES = (TRAJECTORY, PROBE, OFFICIAL, FIXED)


@dataclass(frozen=True)
class Outcome:
    """What one sampling run did with one erasure LoRA.

    Args:
        decisions: one for the whole batch, or one per sample; empty in the gate mode "fixed", and where sampling ended
            before the noise level of the decision.
        weights: the base model's in the blend, likewise.
        found: the look that decided, None where the decision was given.
        step: of the sampling run, from 0, at which that look was; None where it was before the first.
        displacement: whose displacement by the adapter erases, see `gating.Gate`.
    """

    lora: str
    concept: str
    mode: str
    decisions: tuple[Decision, ...]
    weights: tuple[float, ...]
    found: Found | None = None
    step: int | None = None
    displacement: str = PROMPT

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
        plain: what the same run takes without UnGuide, likewise.
        seconds: wall time of gates and sampling.
    """

    outcomes: tuple[Outcome, ...]
    evaluations: dict[str, float]
    plain: float
    seconds: float


def leading(decisions: Sequence[Decision]) -> Decision:
    """Of several decisions the one that found something, with the highest score."""
    return max(decisions, key=lambda decision: (decision.detected, decision.score))


def show(outcomes: Sequence[Outcome], finished: bool = False) -> None:
    """Says how things stand on the node that is being executed; at the end also in the log."""
    lines = [summary(outcome, finished) for outcome in outcomes]
    for line in lines if finished else ():
        log.info("UnGuide: %s", line)
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is not None and server is not None:
        server.send_progress_text("\n".join(lines), context.node_id)


def summary(outcome: Outcome, finished: bool = False) -> str:
    """The outcome in one line, for a log or a node's status.

    Args:
        finished: whether the run is over: then a decision that is not there will not come.
    """
    decision = outcome.decision
    weights = ", ".join(f"{weight:g}" for weight in outcome.weights)
    if decision is None:
        if outcome.mode == FIXED:
            return f"{outcome.lora}: fixed weight {weights}"
        waiting = "no decision, sampling ended above its noise level" if finished else "watching the first steps"
        return f"{outcome.lora}: {waiting}, weight {weights}"
    found = "concept found" if decision.detected else "nothing found"
    when = "" if outcome.step is None else f" at step {outcome.step + 1}"
    return (
        f"{outcome.lora}: {found}{when}, {decision.statistic} {decision.score:.3f} "
        f"(threshold {decision.threshold:.3g}), weight {weights}"
    )
