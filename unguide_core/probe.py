"""The stability probe: does this prompt carry the erased concept?

Four statistics answer it; each that is computed is reported, one decides:

    patch       the adapter's effect on the prompt where it is strongest, relative to that on the concept's own prompt
    influence   the same over the whole picture
    alignment   how far the prompt pulls the base model's prediction where the concept's own prompt pulls it
    paper       the adapter's effect on the prompt against that on a neutral prompt (arXiv 2508.05755)

Knows no model and no sampler: predictions in, numbers and decisions out. How predictions come about, at which noise
level and for how many seeds, is the caller's business.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import avg_pool2d

STATISTICS = ("patch", "influence", "alignment", "paper")

BINARY, SMOOTH = "binary", "smooth"
POLICIES = (BINARY, SMOOTH)

PATCH = 3 / 8
"""Side of a patch, as a share of the picture's."""


def influence(base: Tensor, adapted: Tensor) -> Tensor:
    """Return how much the adapter changes each sample's prediction.

    influence = ||adapted - base||_2 over all but the batch dimension  (arXiv 2508.05755, stability probe)

    It grows with the latent's size; compare values of the same size only. Of x0 predictions divide by sigma to get the
    norm of eps.

    Args:
        base: prediction of the base model, [B, C, ...].
        adapted: prediction of the adapted model for the same latent and prompt, same shape.
    Returns: float32 [B] (float64 for float64 input).
    Raises: ValueError if the shapes differ.
    """
    _require_same_shape(base=base, adapted=adapted)
    norms: Tensor = vector_norm(_widened(adapted) - _widened(base), dim=1)
    return norms


def influence_map(base: Tensor, adapted: Tensor) -> Tensor:
    """Return where the adapter changes each sample's prediction.

    m(position) = sqrt(mean over the patch around it of sum_channels (adapted - base)^2)

    A patch is `PATCH` of the picture wide and high, cut off at its border. Of a video, each position's strongest frame.

    Args:
        base: prediction of the base model, [B, C, H, W], [B, C, length] or [B, C, frames, H, W].
        adapted: prediction of the adapted model for the same latent and prompt, same shape.
    Returns: float32 [B, H, W] (H = 1 for a length).
    Raises: ValueError if the shapes differ.
    """
    _require_same_shape(base=base, adapted=adapted)
    energy = (adapted.float() - base.float()).square().sum(dim=1)
    frames = energy.reshape(len(energy), -1, energy.shape[-2] if energy.ndim > 2 else 1, energy.shape[-1])
    sides = [2 * round((PATCH * side - 1.0) / 2.0) + 1 if side > 1 else 1 for side in frames.shape[2:]]
    means = avg_pool2d(frames, sides, stride=1, padding=[side // 2 for side in sides], count_include_pad=False)
    return means.amax(dim=1).sqrt()


def patch_influence(base: Tensor, adapted: Tensor) -> Tensor:
    """Return how much the adapter changes each sample's prediction in the patch where it changes it most, [B].

    The maximum of `influence_map`: an object in a scene counts as much as one that fills the picture.

    Args and errors: as `influence_map`.
    """
    return influence_map(base, adapted).flatten(1).amax(dim=1)


def alignment(prompt: Tensor, neutral: Tensor, concept: Tensor) -> Tensor:
    """Return how far the prompt pulls the base model's prediction where the concept's own prompt pulls it.

    a = <e(prompt) - e(neutral), e(concept) - e(neutral)> / ||e(concept) - e(neutral)||^2

    1: as the concept's prompt does; 0: not at all. Needs no adapter.

    Args:
        prompt: the base model's prediction for the prompt, [B, C, ...].
        neutral: for the neutral (empty) prompt, at the same latent, same shape.
        concept: for the concept's own prompt, at the same latent, same shape.
    Returns: float32 [B] (float64 for float64 input).
    Raises: ValueError if the shapes differ, or if the concept's prompt predicts exactly what the neutral one does.
    """
    _require_same_shape(prompt=prompt, neutral=neutral, concept=concept)
    origin = _widened(neutral)
    pull, direction = _widened(prompt) - origin, _widened(concept) - origin
    length_squared = direction.square().sum(dim=1)
    if bool((length_squared == 0.0).any()):
        raise ValueError(
            "the concept's prompt gives the same prediction as the neutral prompt, so nothing can be compared with it; "
            "give the concept a prompt of its own"
        )
    return (pull * direction).sum(dim=1) / length_squared


def _widened(prediction: Tensor) -> Tensor:
    """One row per sample, at least float32: the sum of squares overflows half precision."""
    widened = prediction.float() if prediction.element_size() < 4 else prediction
    return widened.flatten(1)


def _require_same_shape(**predictions: Tensor) -> None:
    shapes = {name: list(prediction.shape) for name, prediction in predictions.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ValueError(f"the predictions have shapes {shapes}; expected the same shape")


@dataclass(frozen=True)
class Statistic:
    """One statistic of a probe, held against its threshold.

    name: one of `STATISTICS`.
    score: alignment: mean of `prompt`. patch, influence: mean of `prompt` / mean of `concept`. paper: mean of
        `prompt` / mean of `neutral`; where the latter is 0, 1 if both are and else the largest float (JSON knows
        no infinity).
    threshold: detected at or above it; the paper's rule detects strictly above it.
    prompt: per repeat (noise seed), alignments or influences of the prompt.
    neutral, concept: what it was compared with, likewise; empty where unused. A single value may come from a card.
    certain: score from which on a detection is beyond doubt; see `confidence`.
    """

    name: str
    score: float
    threshold: float
    detected: bool
    prompt: tuple[float, ...]
    neutral: tuple[float, ...] = ()
    concept: tuple[float, ...] = ()
    certain: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in STATISTICS:
            raise ValueError(f"unknown statistic '{self.name}'; expected one of {', '.join(STATISTICS)}")
        for field in ("score", "threshold", "certain"):
            if not math.isfinite(getattr(self, field)):
                raise ValueError(f"the {field} of '{self.name}' is {getattr(self, field)}; expected a finite number")

    @property
    def confidence(self) -> float:
        """How far the score is from the threshold, 0 (on it) to 1 (at `certain` or above it, or at 0 or below)."""
        to_certainty = self.certain - self.threshold if self.detected else self.threshold
        distance = abs(self.score - self.threshold)
        return min(1.0, distance / to_certainty) if to_certainty > 0.0 else 1.0


@dataclass(frozen=True)
class Decision:
    """What the probe decided for one prompt, and why. Written out, it holds no NaN and no infinity.

    weight: the blending weight to use, see `guidance.blend`.
    statistics: every statistic that was computed; the first one decided.
    reason: a sentence for a person; may be empty.
    model_key, adapter_key: what the decision was made for; a decision for another model or adapter must not be used.
    """

    weight: float
    statistics: tuple[Statistic, ...]
    reason: str = ""
    model_key: str = ""
    adapter_key: str = ""

    def __post_init__(self) -> None:
        if not self.statistics:
            raise ValueError("a decision needs at least one statistic, got none")
        if not math.isfinite(self.weight):
            raise ValueError(f"the decided weight is {self.weight}; expected a finite number")

    @property
    def detected(self) -> bool:
        """Whether the prompt carries the concept."""
        return self.statistics[0].detected

    @property
    def statistic(self) -> str:
        """The name of the statistic that decided."""
        return self.statistics[0].name

    @property
    def score(self) -> float:
        """The deciding statistic's score."""
        return self.statistics[0].score

    @property
    def threshold(self) -> float:
        """The deciding statistic's threshold."""
        return self.statistics[0].threshold

    @property
    def confidence(self) -> float:
        """The deciding statistic's confidence."""
        return self.statistics[0].confidence

    @property
    def prompt(self) -> tuple[float, ...]:
        """The deciding statistic's values for the prompt, one per repeat."""
        return self.statistics[0].prompt

    @property
    def neutral(self) -> tuple[float, ...]:
        """The deciding statistic's values for the neutral prompt; empty where it uses none."""
        return self.statistics[0].neutral

    @property
    def concept(self) -> tuple[float, ...]:
        """The deciding statistic's values for the concept's own prompt; empty where it uses none."""
        return self.statistics[0].concept

    @property
    def repeats(self) -> int:
        """How many noise seeds the prompt was probed with."""
        return len(self.prompt)

    def to_json(self) -> str:
        """Return the decision as JSON, the deciding statistic's values on top."""
        content = {
            "detected": self.detected,
            "weight": self.weight,
            **{k: v for k, v in asdict(self.statistics[0]).items() if k not in ("name", "detected")},
            "confidence": self.confidence,
            "statistic": self.statistic,
            "repeats": self.repeats,
            "reason": self.reason,
            "model_key": self.model_key,
            "adapter_key": self.adapter_key,
            "statistics": [asdict(statistic) for statistic in self.statistics],
        }
        return json.dumps(content, allow_nan=False)


Values = Tensor | Sequence[float] | float
"""Values of any number of repeats."""


def paper_statistic(prompt: Values, neutral: Values) -> Statistic:
    """Return the paper's statistic: detected if the mean influence on the prompt is strictly above that on neutral.

    (arXiv 2508.05755; official `decide_w`, which takes a NaN prompt or neutral value for "not detected". Here it is an
    error.)

    Args:
        prompt: influences on the prompt, any number of repeats.
        neutral: influences on the neutral prompt, any number of repeats.
    Raises: ValueError if there are no values, or one is not finite.
    """
    prompt_values, neutral_values = _finite("influence on the prompt", prompt), _finite("influence on neutral", neutral)
    prompt_mean, neutral_mean = _mean(prompt_values), _mean(neutral_values)
    ratio = prompt_mean / neutral_mean if neutral_mean else math.inf if prompt_mean else 1.0
    score = min(ratio, sys.float_info.max)
    return Statistic("paper", score, 1.0, prompt_mean > neutral_mean, prompt_values, neutral_values, certain=2.0)


def influence_statistic(
    prompt: Values, concept: Values, threshold: float, *, certain: float = 1.0, name: str = "influence"
) -> Statistic:
    """Return the relative influence: detected if ||D(prompt)|| / ||D(concept)||, of the means, is at least `threshold`.

    Args:
        prompt: influences on the prompt, any number of repeats; patch influences for the name "patch".
        concept: influences on the concept's own prompt, any number of repeats, or the one number stored in the card.
        threshold: between 0 and 1.
        certain: score from which on a detection is beyond doubt.
    Raises: ValueError if there are no values, one is not finite, or the adapter has no influence on its own concept.
    """
    prompt_values, concept_values = _finite("influence on the prompt", prompt), _finite("influence on concept", concept)
    concept_mean = _mean(concept_values)
    if concept_mean <= 0.0:
        raise ValueError(
            f"the adapter's mean influence on its own concept is {concept_mean}, so nothing can be compared with it; "
            "expected a number above 0: use an adapter that was trained for this model"
        )
    score = _mean(prompt_values) / concept_mean
    detected = score >= threshold
    return Statistic(name, score, threshold, detected, prompt_values, concept=concept_values, certain=certain)


def alignment_statistic(scores: Values, threshold: float, *, certain: float = 1.0) -> Statistic:
    """Return the alignment: detected if its mean is at least `threshold`.

    Args:
        scores: what `alignment` returned, any number of repeats.
        threshold: between 0 (unrelated) and 1 (the concept's own prompt).
        certain: score from which on a detection is beyond doubt.
    Raises: ValueError if there are no values, or one is not finite.
    """
    values = _finite("alignment", scores)
    score = _mean(values)
    return Statistic("alignment", score, threshold, score >= threshold, values, certain=certain)


def decide(
    prompt: Values, neutral: Values, *, weight_detected: float = -1.0, weight_otherwise: float = 1.0
) -> Decision:
    """Return the paper's decision; see `paper_statistic`. The paper itself uses the weights -1 and 2.

    Raises: ValueError as `paper_statistic`.
    """
    return decide_by([paper_statistic(prompt, neutral)], weight_detected, weight_otherwise)


def decide_by_threshold(
    statistic: str,
    scores: Values,
    threshold: float,
    *,
    concept: Values | None = None,
    weight_detected: float = -1.0,
    weight_otherwise: float = 1.0,
) -> Decision:
    """Return the decision of `alignment_statistic` or `influence_statistic`.

    Args:
        statistic: "alignment" or "influence".
        scores: alignments, or influences on the prompt.
        threshold: detected at or above it.
        concept: influences on the concept's own prompt; for "influence" only, and needed there.
    Raises: ValueError for another statistic, a `concept` too many or too few, and as the statistic does.
    """
    if statistic == "alignment" and concept is None:
        computed = alignment_statistic(scores, threshold)
    elif statistic == "influence" and concept is not None:
        computed = influence_statistic(scores, concept, threshold)
    else:
        given = "no concept" if concept is None else "a concept"
        raise ValueError(
            f"got statistic '{statistic}' with {given}; "
            "expected 'alignment', or 'influence' with the influences on the concept's own prompt"
        )
    return decide_by([computed], weight_detected, weight_otherwise)


def decide_by(
    statistics: Sequence[Statistic],
    weight_detected: float = -1.0,
    weight_otherwise: float = 1.0,
    *,
    policy: str = BINARY,
    reason: str = "",
    model_key: str = "",
    adapter_key: str = "",
) -> Decision:
    """Return the decision of the first of several statistics; the others are reported beside it.

    Args:
        policy: "binary" (the paper's) takes one of the two weights; "smooth" goes from `weight_otherwise` at the
            threshold to `weight_detected` at a score that is certain, in proportion to the confidence.
    Raises: ValueError if there are none, a weight is not finite, or the policy is unknown.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy '{policy}'; expected one of {', '.join(POLICIES)}")
    weight = weight_otherwise
    if statistics and statistics[0].detected:
        share = 1.0 if policy == BINARY else statistics[0].confidence
        weight = share * weight_detected + (1.0 - share) * weight_otherwise
    return Decision(weight, tuple(statistics), reason, model_key, adapter_key)


def _finite(what: str, values: Values) -> tuple[float, ...]:
    """The values as plain numbers, checked: the official code turns a NaN into a decision, this one does not."""
    if isinstance(values, Tensor):
        numbers = tuple(float(value) for value in values.flatten().tolist())
    else:
        numbers = tuple(float(value) for value in (values if isinstance(values, Sequence) else (values,)))
    if not numbers:
        raise ValueError(f"no values for the {what}; expected one per repeat")
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(
            f"the {what} is {list(numbers)}; expected finite numbers: the model predicted NaN or infinity, "
            "often a half-precision overflow; try another precision"
        )
    return numbers


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
