"""The stability probe: is the erased concept in this prompt?

text.py          what the adapter does to the prompt's text states, before any prediction
statistics.py    what the predictions say: influence, alignment, the paper's statistic
decision.py      the decision that follows
image.py         whether an image shows the concept, whatever its prompt says
spread.py        how scores are distributed, and thresholds for error rates
calibration.py   the thresholds of one adapter, measured
"""

from .decision import Decision, decide, decide_by
from .statistics import (
    AUTOMATIC,
    IMAGE_STATISTIC,
    STATISTICS,
    TEXT_STATISTICS,
    Statistic,
    alignment,
    alignment_statistic,
    influence,
    influence_map,
    influence_statistic,
    paper_statistic,
)

__all__ = [
    "AUTOMATIC",
    "IMAGE_STATISTIC",
    "STATISTICS",
    "TEXT_STATISTICS",
    "Decision",
    "Statistic",
    "alignment",
    "alignment_statistic",
    "decide",
    "decide_by",
    "influence",
    "influence_map",
    "influence_statistic",
    "paper_statistic",
]
