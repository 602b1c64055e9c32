"""How the scores of a group of prompts are distributed, and the error rates that follow, of any statistic."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import torch

TAIL_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""False-positive and false-negative rates whose thresholds are stored; those in between are interpolated."""

LEAST = 1e-3
"""The least score that a threshold may be."""


@dataclass(frozen=True)
class Spread:
    """The distribution of the scores of a group of prompts, over prompts and noise seeds.

    tail: quantiles of the scores, one for each of `TAIL_RATES`: the fraction of the scores that is above (prompts
        without the concept) or below (prompts with it).
    """

    mean: float
    std: float
    count: int
    tail: tuple[float, ...]

    @staticmethod
    def of(scores: Sequence[float], *, upper: bool) -> "Spread":
        """Return the spread of some scores, with the upper tail (prompts without the concept) or the lower one.

        Raises: ValueError for fewer than two scores, or one that is not finite.
        """
        values = torch.tensor(list(scores), dtype=torch.float64)
        if len(values) < 2 or not bool(values.isfinite().all()):
            raise ValueError(f"cannot calibrate with the scores {list(scores)}; expected two or more finite numbers")
        rates = torch.tensor([1.0 - rate if upper else rate for rate in TAIL_RATES], dtype=torch.float64)
        tail = tuple(round(float(value), 4) for value in values.quantile(rates))
        return Spread(round(float(values.mean()), 4), round(float(values.std()), 4), len(values), tail)

    def beyond(self, rate: float) -> float:
        """Return the score that a fraction of the scores lies beyond, interpolated in the logarithm of the fraction."""
        return _interpolated([math.log(r) for r in TAIL_RATES], self.tail, math.log(rate))

    def share_below(self, score: float) -> float:
        """Return the fraction of the scores that lies below one, for a lower tail.

        The inverse of `beyond`; above the last of `TAIL_RATES` it is a normal distribution's.
        """
        if score <= self.tail[-1]:
            return math.exp(_interpolated(self.tail, [math.log(r) for r in TAIL_RATES], score))
        return max(TAIL_RATES[-1], NormalDist(self.mean, self.std).cdf(score) if self.std else 1.0)

    def mixed(self, other: "Spread", part: float) -> "Spread":
        """Return the spread at a fraction of the way to another one."""
        tail = tuple(mixed(a, b, part) for a, b in zip(self.tail, other.tail, strict=True))
        mean, std = mixed(self.mean, other.mean, part), mixed(self.std, other.std, part)
        return Spread(mean, std, min(self.count, other.count), tail)

    @staticmethod
    def from_card(content: Mapping[str, Any]) -> "Spread":
        """Return the spread that is stored in a card. Raises: KeyError, TypeError or ValueError if it is damaged."""
        tail = tuple(float(value) for value in content["tail"])
        if len(tail) != len(TAIL_RATES):
            raise ValueError(f"a tail has {len(tail)} values; expected {len(TAIL_RATES)}")
        return Spread(float(content["mean"]), float(content["std"]), int(content["count"]), tail)


def joint_rate(rate: float, adapters: int) -> float:
    """Return the false-positive rate of each of several adapters on a model that together reach a rate.

    1 - (1 - rate)^(1 / adapters): exact where they err independently, and on the safe side where they err together.
    """
    return -math.expm1(math.log1p(-rate) / adapters)


def threshold(concept: Spread, others: Spread, false_positive_rate: float, adapters: int = 1) -> float:
    """Return the score from which on the concept is detected.

    It is exceeded by a fraction `joint_rate(false_positive_rate, adapters)` of the prompts without the concept. If a
    smaller fraction than `false_positive_rate` of the prompts with the concept lies below it, it is raised to the
    geometric mean of the two bounds, so that both error rates stay below the ones asked for.
    """
    low = max(others.beyond(joint_rate(false_positive_rate, adapters)), LEAST)
    high = concept.beyond(false_positive_rate)
    return math.sqrt(low * high) if high > low else low


def mixed(low: float, high: float, part: float) -> float:
    """Return the number at a fraction of the way from one to another."""
    return low + part * (high - low)


def _interpolated(at: Sequence[float], values: Sequence[float], where: float) -> float:
    """Linear interpolation between known values, clamped to the first and the last; `at` rises."""
    if where <= at[0]:
        return values[0]
    for (low, below), (high, above) in pairwise(zip(at, values, strict=True)):
        if where <= high:
            return mixed(below, above, (where - low) / (high - low))
    return values[-1]
