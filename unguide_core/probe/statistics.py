"""Statistics of the stability probe: how much of the erased concept is in a prompt.

    influence   how strongly the adapter acts on the prompt, relative to the concept's own prompt
    alignment   how far the prompt pulls the base model's prediction in the direction of the concept's own prompt
    paper       how strongly the adapter acts on the prompt, relative to a neutral prompt (arXiv 2508.05755)

The statistics of text states are in text.py. Takes predictions and returns numbers. Does not know the model, the
sampler, the noise level or the seeds.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import avg_pool2d

STATISTICS = ("influence", "alignment", "paper")
"""The statistics of predictions."""
TEXT_STATISTICS = ("text", "text norm")
"""The statistics of text states, see text.py."""
IMAGE_STATISTIC = "image"
"""The statistic of images, see image.py."""
AUTOMATIC = "automatic"
"""In place of a statistic's name: the best one that the inputs and the calibration allow."""

PATCH = 3 / 8
"""Side of the window that `influence_map` averages over, as a fraction of the image's side."""

Values = Tensor | Sequence[float] | float
"""One value per repeat (noise seed)."""


def influence(base: Tensor, adapted: Tensor) -> Tensor:
    """Return how strongly the adapter changes each sample's prediction.

    influence = ||adapted - base||_2 over all dimensions but the batch  (arXiv 2508.05755, stability probe)

    It grows with the size of the latent, so only values of one size can be compared. x0 predictions have to be divided
    by sigma to get the norm of eps.

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
    """Return where in the image the adapter changes each sample's prediction.

    m(position) = sqrt(mean over the window around it of sum_channels (adapted - base)^2)

    The window's side is `PATCH` of the image's. A video's map has the strongest frame's value at each position.

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


def alignment(prompt: Tensor, neutral: Tensor, concept: Tensor) -> Tensor:
    """Return how far the prompt pulls the base model's prediction in the direction of the concept's own prompt.

    a = <e(prompt) - e(neutral), e(concept) - e(neutral)> / ||e(concept) - e(neutral)||^2

    1 is as far as the concept's prompt, 0 not at all. Does not need an adapter.

    Args:
        prompt: the base model's prediction for the prompt, [B, C, ...].
        neutral: for the neutral (empty) prompt at the same latent, same shape.
        concept: for the concept's own prompt at the same latent, same shape.
    Returns: float32 [B] (float64 for float64 input).
    Raises: ValueError if the shapes differ, or the predictions for the concept's and the neutral prompt are equal.
    """
    _require_same_shape(prompt=prompt, neutral=neutral, concept=concept)
    origin = _widened(neutral)
    pull, direction = _widened(prompt) - origin, _widened(concept) - origin
    length_squared = direction.square().sum(dim=1)
    if bool((length_squared == 0.0).any()):
        raise ValueError(
            "the concept's prompt gives the same prediction as the neutral prompt, so no direction leads to the "
            "concept; give the concept a prompt of its own"
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
    """One statistic of a probe with its threshold.

    name: one of `STATISTICS` or `TEXT_STATISTICS`, or `IMAGE_STATISTIC`.
    score: alignment: the mean of `prompt`. influence: the mean of `prompt` / the mean of `concept`. paper: the mean of
        `prompt` / the mean of `neutral`; where the latter is 0, 1 if both are 0 and otherwise the largest float (JSON
        has no infinity).
    threshold: scores from here on are detected; in the paper's rule only scores above it.
    prompt: alignments or influences of the prompt, one per repeat.
    neutral, concept: influences that the score is relative to, one per repeat or a single one from a calibration;
        empty where unused.
    lower: scores below it clear the prompt of the concept; None where only a detection decides, or every score does.
    """

    name: str
    score: float
    threshold: float
    detected: bool
    prompt: tuple[float, ...]
    neutral: tuple[float, ...] = ()
    concept: tuple[float, ...] = ()
    lower: float | None = None

    def __post_init__(self) -> None:
        names = (*STATISTICS, *TEXT_STATISTICS, IMAGE_STATISTIC)
        if self.name not in names:
            raise ValueError(f"unknown statistic '{self.name}'; expected one of {', '.join(names)}")
        for field in ("score", "threshold"):
            if not math.isfinite(getattr(self, field)):
                raise ValueError(f"the {field} of '{self.name}' is {getattr(self, field)}; expected a finite number")

    @property
    def cleared(self) -> bool:
        """Whether the score says by itself that the prompt does not contain the concept."""
        return self.lower is not None and self.score < self.lower


def paper_statistic(prompt: Values, neutral: Values) -> Statistic:
    """Return the paper's statistic: detected if the mean influence on the prompt is above the mean on neutral.

    (arXiv 2508.05755, official `decide_w`. There a NaN counts as "not detected", here it is an error.)

    Args:
        prompt: influences on the prompt.
        neutral: influences on the neutral prompt.
    Raises: ValueError if there are no values, or one is not finite.
    """
    prompt_values, neutral_values = _finite("influence on the prompt", prompt), _finite("influence on neutral", neutral)
    prompt_mean, neutral_mean = _mean(prompt_values), _mean(neutral_values)
    ratio = prompt_mean / neutral_mean if neutral_mean else math.inf if prompt_mean else 1.0
    score = min(ratio, sys.float_info.max)
    return Statistic("paper", score, 1.0, prompt_mean > neutral_mean, prompt_values, neutral_values)


def influence_statistic(prompt: Values, concept: Values, threshold: float) -> Statistic:
    """Return the relative influence: detected if mean(prompt) / mean(concept) is at least `threshold`.

    Args:
        prompt: influences on the prompt.
        concept: influences on the concept's own prompt, or the calibrated baseline.
        threshold: between 0 and 1.
    Raises: ValueError if there are no values, one is not finite, or the adapter has no influence on its own concept.
    """
    prompt_values, concept_values = _finite("influence on the prompt", prompt), _finite("influence on concept", concept)
    concept_mean = _mean(concept_values)
    if concept_mean <= 0.0:
        raise ValueError(
            f"the adapter's mean influence on its own concept is {concept_mean}; expected a number above 0: use an "
            "adapter that was trained for this model"
        )
    score = _mean(prompt_values) / concept_mean
    return Statistic("influence", score, threshold, score >= threshold, prompt_values, concept=concept_values)


def alignment_statistic(scores: Values, threshold: float) -> Statistic:
    """Return the alignment: detected if its mean is at least `threshold`.

    Args:
        scores: what `alignment` returned.
        threshold: between 0 (unrelated) and 1 (the concept's own prompt).
    Raises: ValueError if there are no values, or one is not finite.
    """
    values = _finite("alignment", scores)
    score = _mean(values)
    return Statistic("alignment", score, threshold, score >= threshold, values)


def _finite(what: str, values: Values) -> tuple[float, ...]:
    """The values as plain finite numbers."""
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
