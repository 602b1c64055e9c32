"""What a probe decides: whether the concept is detected, and the weight that follows."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from torch import Tensor

from .statistics import IMAGE_STATISTIC, TEXT_STATISTICS, Statistic, Values, paper_statistic


@dataclass(frozen=True)
class Decision:
    """What a probe decided for one prompt, and why.

    weight: the blending weight to use, see `guidance.blend`.
    statistics: every statistic that was computed; the first one decided.
    reason: a sentence for the user; may be empty.
    model_key, adapter_key: the model and adapter that were probed; the decision does not hold for others.
    step: the sampling step that was probed, from 0; None for a probe before the first step.
    sigma: the noise level that was probed.
    influence_map: where the adapter acts, [H, W]; 1 is its mean effect on the concept's own prompt.
    caveat: in a word or two why the decision is less sure than it could be ("not calibrated"); usually empty.
    """

    weight: float
    statistics: tuple[Statistic, ...]
    reason: str = ""
    model_key: str = ""
    adapter_key: str = ""
    step: int | None = None
    sigma: float | None = None
    influence_map: Tensor | None = field(default=None, compare=False, repr=False)
    caveat: str = ""

    def __post_init__(self) -> None:
        if not self.statistics:
            raise ValueError("a decision needs at least one statistic, got none")
        if not math.isfinite(self.weight):
            raise ValueError(f"the decided weight is {self.weight}; expected a finite number")

    @property
    def detected(self) -> bool:
        """Whether the concept was detected in the prompt."""
        return self.statistics[0].detected

    @property
    def stage(self) -> str:
        """The stage of the gate that decided: "text", "trajectory" or "image"."""
        if self.statistics[0].name == IMAGE_STATISTIC:
            return "image"
        return "text" if self.statistics[0].name in TEXT_STATISTICS else "trajectory"

    @property
    def statistic(self) -> str:
        """The name of the statistic that decided."""
        return self.statistics[0].name

    @property
    def score(self) -> float:
        """The score of the statistic that decided."""
        return self.statistics[0].score

    @property
    def threshold(self) -> float:
        """The threshold of the statistic that decided."""
        return self.statistics[0].threshold

    def to_json(self) -> str:
        """Return the decision as JSON, with the deciding statistic's values at the top and the step counted from 1."""
        deciding = self.statistics[0]
        content = {
            "detected": deciding.detected,
            "weight": self.weight,
            "stage": self.stage,
            "statistic": deciding.name,
            "score": deciding.score,
            "threshold": deciding.threshold,
            "prompt": deciding.prompt,
            "neutral": deciding.neutral,
            "concept": deciding.concept,
            "repeats": len(deciding.prompt),
            "step": None if self.step is None else self.step + 1,
            "sigma": self.sigma,
            "reason": self.reason,
            "caveat": self.caveat,
            "model_key": self.model_key,
            "adapter_key": self.adapter_key,
            "statistics": [asdict(statistic) for statistic in self.statistics],
        }
        return json.dumps(content, allow_nan=False)


def decide(
    prompt: Values, neutral: Values, *, weight_detected: float = -1.0, weight_otherwise: float = 1.0
) -> Decision:
    """Return the paper's decision, see `paper_statistic`. The paper itself uses the weights -1 and 2.

    Raises: ValueError as `paper_statistic`.
    """
    return decide_by([paper_statistic(prompt, neutral)], weight_detected, weight_otherwise)


def decide_by(
    statistics: Sequence[Statistic],
    weight_detected: float = -1.0,
    weight_otherwise: float = 1.0,
    *,
    reason: str = "",
    model_key: str = "",
    adapter_key: str = "",
    step: int | None = None,
    sigma: float | None = None,
    influence_map: Tensor | None = None,
    caveat: str = "",
) -> Decision:
    """Return the decision of the first of several statistics; the others are reported with it.

    Raises: ValueError if there are none, or the weight is not finite.
    """
    weight = weight_detected if statistics and statistics[0].detected else weight_otherwise
    return Decision(weight, tuple(statistics), reason, model_key, adapter_key, step, sigma, influence_map, caveat)
