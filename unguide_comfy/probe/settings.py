"""How a gate decides: what an UNGUIDE_SETTINGS wire holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...unguide_core.probe import AUTOMATIC, STATISTICS
from ..lora.load import Conditioning

DURING, BEFORE, AS_PAPER, ALWAYS = "during sampling", "before sampling", "as the paper", "always erase"
DECIDE = (DURING, BEFORE, AS_PAPER, ALWAYS)

CONTINUE, RESTART = "continue", "restart"
ON_DETECTION = (AUTOMATIC, CONTINUE, RESTART)

ALWAYS_CHECK, NEVER_CHECK = "always", "never"
CHECK_IMAGE = (AUTOMATIC, ALWAYS_CHECK, NEVER_CHECK)

CHOICES = (AUTOMATIC, *STATISTICS)


@dataclass(frozen=True)
class Settings:
    """How a gate decides and what follows.

    Args:
        decide: "during sampling" decides at an early step of the image itself, sample by sample; "before sampling" on
            rollouts of its own; "as the paper" as the research code does, with its schedule and its weights -1 and 2;
            "always erase" without a gate.
        resist_adversarial: detect by influence or alignment, and erase with the adapter's change on the concept's own
            prompt, against text that was optimised to get past the adapter.
        on_detection: when the concept is detected during sampling, "continue" erasing from that step on, "restart" the
            image, or "automatic": restart only where continuing would leave the concept's silhouette.
        check_image: whether the image itself is read, too, where the adapter's calibration allows it: "automatic" where
            that costs nothing, and the start image at one evaluation; "always" at one evaluation where it is not free;
            "never", but for `resist_adversarial`, which always reads it.
        false_positive_rate: share of other prompts that a calibrated threshold may take for the concept.
        statistic: "influence", "alignment" or "paper" (`unguide_core.probe`); "automatic" takes influence where the
            adapter's calibration separates the concept from other prompts, else alignment, else what the inputs allow.
        threshold: score from which on the concept counts as detected; None takes the calibration's, or the statistic's
            own.
        text_clears: whether the text stage may clear a prompt, and not only detect the concept.
        recheck_every: during sampling, steps after which to probe again where nothing was detected; 0 probes once.
        neutral: the neutral (empty) prompt, encoded; None takes the erasure LoRA's own.
        weight_detected, weight_otherwise: the base model's weight in the blend, by the decision.
        probe_steps, probe_schedule_steps: the probe's noise level, as steps of a "normal" schedule of that many.
        repeats: noise seeds of a probe before sampling, in one batch.
        low_memory: never compute base and adapted rows in one forward.
        seed: of the probe's own noise.
    Raises: ValueError for a value that means nothing, or a combination that cannot be.
    """

    decide: str = DURING
    resist_adversarial: bool = False
    on_detection: str = AUTOMATIC
    check_image: str = AUTOMATIC
    false_positive_rate: float = 0.01
    statistic: str = AUTOMATIC
    threshold: float | None = None
    text_clears: bool = True
    recheck_every: int = 0
    neutral: Conditioning | None = field(default=None, repr=False)
    weight_detected: float = 0.0
    weight_otherwise: float = 1.0
    probe_steps: int = 2
    probe_schedule_steps: int = 20
    repeats: int = 2
    low_memory: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        chosen = {"decide": DECIDE, "on_detection": ON_DETECTION, "check_image": CHECK_IMAGE, "statistic": CHOICES}
        for name, choices in chosen.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        if not 0.0 < self.false_positive_rate < 1.0:
            raise ValueError(f"false_positive_rate is {self.false_positive_rate}; expected a share between 0 and 1")
        for name in ("weight_detected", "weight_otherwise", "threshold"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; expected a finite number")
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; expected at least 1")
        if self.recheck_every < 0:
            raise ValueError(f"recheck_every is {self.recheck_every}; expected 0 (probe once) or a number of steps")
        if not 1 <= self.probe_steps < self.probe_schedule_steps:
            raise ValueError(
                f"probe_steps is {self.probe_steps} and probe_schedule_steps {self.probe_schedule_steps}; expected at "
                "least 1 probe step, and fewer than the schedule has"
            )
        if self.resist_adversarial and self.decide == AS_PAPER:
            raise ValueError(
                "the paper's rule cannot resist adversarial text; decide 'during sampling' or 'before sampling', or "
                "turn resist_adversarial off"
            )
        if self.resist_adversarial and self.statistic != AUTOMATIC:
            raise ValueError(
                f"resist_adversarial decides by influence or alignment, and the statistic is {self.statistic!r}; set "
                "it to 'automatic', or turn resist_adversarial off"
            )
