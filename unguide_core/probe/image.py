"""The image probe: a linear reading of the base model's own features that says whether an image shows a concept.

The features are those that the base model computes for the *empty* prompt at a low noise level, where the image is all
that they can come from: the output of the network's middle block, as [mean, max, std] over positions. So no text can
fool the probe, and images of any size have the same features.

`ImageProbe` is what an adapter's card holds; `fit_image_probe` makes it from images that the base model generated.
Does not know how a model computes features. Measured in docs/gate.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from .statistics import IMAGE_STATISTIC, Statistic

SIGMA = 0.3
"""The noise level at which images are read to fit a probe, for latents of about unit variance."""

THRESHOLD = 0.75
"""Score from which on an image shows the concept: three quarters of the way from 0, which a hundredth of the other
images exceeds, to 1, which a twentieth of the concept's images stays below. Half way has twice the false positives on
classes that a probe has never seen."""

RIDGE = 0.3
"""Measured: .03 loses images in scenes, 1 gains nothing."""

OTHERS_RATE, CONCEPT_RATE = 0.01, 0.05
"""The shares of the other images above score 0, and of the concept's below score 1."""

LARGEST = 1024
"""The most features that a probe weighs; of wider networks those are kept that weigh most."""

WIDEST = 3 * 8192
"""The most features that a card may claim for a network."""

CONCEPT_IMAGES, OTHER_IMAGES, STEPS = 16, 48, 8
"""The images that a probe is fitted to, with the concept and of other things, and the steps that generate each."""

MINIMUM_IMAGES = 8
"""The least number of images with the concept, and of others, that a probe is fitted to."""

STATISTICS = 3

P = TypeVar("P")


def image_features(hidden: Tensor) -> Tensor:
    """Return [mean, max, std] over positions of a hidden state, in fp32, [B, 3 C].

    Args:
        hidden: [B, C, ...].
    """
    flat = hidden.detach().flatten(2).float()
    return torch.cat([flat.mean(dim=2), flat.amax(dim=2), flat.std(dim=2, correction=0)], dim=1)


@dataclass(frozen=True)
class ImageProbe:
    """A linear function of an image's features: 0 for nearly all other images, 1 for most images of the concept.

    width: the number of features that the network has, three for each channel.
    places: which of them are weighed, rising.
    weights: of each.
    offset: added to the weighted sum.
    images: with the concept, and others, that it was fitted to.
    missed, mistaken: the share of either on the wrong side of `THRESHOLD`, each image scored without a part in the fit.
    Raises: ValueError for numbers that cannot be a probe's.
    """

    width: int
    places: tuple[int, ...]
    weights: tuple[float, ...]
    offset: float
    images: tuple[int, int] = (0, 0)
    missed: float = 0.0
    mistaken: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.width <= WIDEST or self.width % STATISTICS:
            raise ValueError(f"it is for {self.width} features; expected a multiple of {STATISTICS} up to {WIDEST}")
        if not 0 < len(self.places) <= LARGEST or len(self.places) != len(self.weights):
            raise ValueError(
                f"it has {len(self.places)} places and {len(self.weights)} weights; expected as many of either, 1 to "
                f"{LARGEST}"
            )
        if list(self.places) != sorted(set(self.places)) or self.places[0] < 0 or self.places[-1] >= self.width:
            raise ValueError(f"its places are not rising numbers from 0 to {self.width - 1}")
        if not all(map(math.isfinite, (*self.weights, self.offset, self.missed, self.mistaken))):
            raise ValueError("a number is NaN or infinite; expected finite ones")

    def score(self, features: Tensor) -> Tensor:
        """Return how surely each image shows the concept, [B], fp64, on the CPU; it does from `THRESHOLD` on.

        Args:
            features: [B, width], see `image_features`.
        Raises: ValueError if the features are of another network.
        """
        if features.shape[1] != self.width:
            raise ValueError(
                f"the image probe is for {self.width} features and the model has {features.shape[1]}; calibrate the "
                "adapter for this model"
            )
        weighed = features.detach().cpu()[:, list(self.places)].double()  # some devices have no fp64
        return weighed @ torch.tensor(self.weights, dtype=torch.float64) + self.offset

    def to_card(self) -> dict[str, Any]:
        """Return what is stored in the card, as plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_card(content: Mapping[str, Any]) -> "ImageProbe":
        """Return the probe that is stored in a card.

        Raises: ValueError if it is damaged.
        """
        try:
            places, weights = content["places"], content["weights"]
            if len(places) > LARGEST or len(weights) > LARGEST:
                raise ValueError(f"it weighs {max(len(places), len(weights))} features; expected {LARGEST} at most")
            concept, others = content["images"]
            return ImageProbe(
                int(content["width"]),
                tuple(int(place) for place in places),
                tuple(float(weight) for weight in weights),
                float(content["offset"]),
                (int(concept), int(others)),
                float(content["missed"]),
                float(content["mistaken"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"the card's image probe is damaged ({error}); calibrate the adapter anew") from error


def images_of(prompts: Sequence[P], images: int) -> list[tuple[P, int]]:
    """Return how many of some images each prompt gives; of more prompts than images, evenly spaced ones give one."""
    ends = [number * images // len(prompts) for number in range(len(prompts) + 1)] if prompts else []
    return [(prompt, high - low) for prompt, (low, high) in zip(prompts, pairwise(ends), strict=False) if high > low]


def image_statistic(score: float) -> Statistic:
    """Return a score of `ImageProbe` as a statistic."""
    return Statistic(IMAGE_STATISTIC, score, THRESHOLD, score >= THRESHOLD, (score,))


def fit_image_probe(concept: Tensor, others: Tensor) -> ImageProbe | None:
    """Return the probe that tells images of a concept from others, or None if none does.

    A ridge regression of +1 and -1 on z-scored features, in fp64, both groups with the same weight in total:

        w = (X' D X + lambda I)^-1 X' D y

    It is scaled by each image's score in a fit without that image: 0 is what `OTHERS_RATE` of the others exceed, 1 is
    what `CONCEPT_RATE` of the concept's images stay below.

    Args:
        concept, others: features of the images, [N, F] and [M, F], each image under noise of its own.
    Raises: ValueError for fewer than `MINIMUM_IMAGES` of either, or features that are not finite.
    """
    for name, group in (("with the concept", concept), ("of other things", others)):
        if len(group) < MINIMUM_IMAGES:
            raise ValueError(f"there are {len(group)} images {name}; expected at least {MINIMUM_IMAGES}")
        if not bool(group.isfinite().all()):
            raise ValueError(f"the features of the images {name} are not finite; use a model that generates images")
    x = torch.cat([concept, others]).detach().cpu().double()
    counts = (len(concept), len(others))
    y = torch.cat([x.new_full((count,), sign) for count, sign in zip(counts, (1.0, -1.0), strict=True)])
    balance = torch.cat([x.new_full((count,), 0.5 / count) for count in counts])
    mean = balance @ x
    std = (balance @ (x - mean).square()).sqrt()
    kept = (std > 1e-6 * (1.0 + mean.abs())).nonzero().flatten()
    if not len(kept):
        return None
    if len(kept) > LARGEST:
        weights, _ = _ridge((x - mean)[:, kept] / std[kept], y, balance)
        kept = kept[weights.abs().topk(LARGEST).indices].sort().values
    weights, held_out = _ridge((x - mean)[:, kept] / std[kept], y, balance)
    low = float(held_out[y < 0].quantile(1.0 - OTHERS_RATE))
    high = float(held_out[y > 0].quantile(CONCEPT_RATE))
    if high <= low:
        return None
    rounded = [float(f"{weight:.5g}") for weight in (weights / std[kept] / (high - low)).tolist()]
    offset = -float(torch.tensor(rounded, dtype=torch.float64) @ mean[kept]) - low / (high - low)
    shown = (held_out - low) / (high - low) >= THRESHOLD
    missed, mistaken = (~shown[y > 0]).double().mean(), shown[y < 0].double().mean()
    return ImageProbe(
        x.shape[1],
        tuple(kept.tolist()),
        tuple(rounded),
        round(offset, 6),
        counts,
        round(float(missed), 4),
        round(float(mistaken), 4),
    )


def _ridge(z: Tensor, y: Tensor, balance: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of a ridge regression, [F], and each row's prediction by a fit without that row, [rows].

    In dual form, because there are more features than rows. With the hat matrix H of the fit to all rows, the residual
    of a row that is left out is (y - H y)_i / (1 - H_ii).
    """
    root = balance.sqrt()
    scaled = z * root[:, None]
    gram = scaled @ scaled.T
    inverse = torch.linalg.inv(gram + RIDGE * torch.eye(len(z), dtype=z.dtype))
    dual = inverse @ (y * root)
    return scaled.T @ dual, y - dual / inverse.diagonal() / root  # I - H = lambda (K + lambda I)^-1
