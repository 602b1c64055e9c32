"""What a calibration measured of an erasure adapter, and the thresholds that follow from it.

At several noise levels: how strongly the adapter acts on its concept's own prompt (the baseline that a prompt's
influence is divided by), and how the scores of prompts with the concept and of other prompts spread over noise seeds.
Kept in the adapter's card. Knows neither how the scores were taken nor which model they hold for: it keeps that model's
key, and whoever reads a calibration compares it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import torch

VERSION = 2

STEPS, LOOKS = 20, (1, 2, 4, 6)
"""The schedule that prompts are denoised on, and the steps before which to look: they enclose where gates decide."""

SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Shares of false alarms, and of misses, whose thresholds are kept; those in between are interpolated."""

SIGMA_MARGIN = 1.05
"""How far, as a factor, a noise level may lie outside the calibrated ones."""


@dataclass(frozen=True)
class Spread:
    """How the scores of a group of prompts spread over prompts and noise seeds.

    tail: the scores that the shares `SHARES` lie beyond: above them for other prompts, below for the concept's.
    """

    mean: float
    std: float
    count: int
    tail: tuple[float, ...]

    @staticmethod
    def of(scores: Sequence[float], *, upper: bool) -> "Spread":
        """Return the spread of some scores; `upper` for the tail above (other prompts), else below (the concept's).

        Raises: ValueError for fewer than two scores, or one that is not finite.
        """
        values = torch.tensor(list(scores), dtype=torch.float64)
        if len(values) < 2 or not bool(values.isfinite().all()):
            raise ValueError(f"cannot calibrate with the scores {list(scores)}; expected two or more finite numbers")
        shares = torch.tensor([1.0 - share if upper else share for share in SHARES], dtype=torch.float64)
        tail = tuple(round(float(value), 4) for value in values.quantile(shares))
        return Spread(round(float(values.mean()), 4), round(float(values.std()), 4), len(values), tail)

    def beyond(self, share: float) -> float:
        """Return the score that a share of the scores lies beyond, interpolated in the logarithm of the share."""
        return _interpolated([math.log(s) for s in SHARES], self.tail, math.log(share))

    def share_below(self, score: float) -> float:
        """Return the share of the scores that lies below one, of a spread whose tail is the lower one.

        Interpolated as `beyond` is; above the largest share that is kept, a normal distribution's.
        """
        if score <= self.tail[-1]:
            return math.exp(_interpolated(self.tail, [math.log(s) for s in SHARES], score))
        return max(SHARES[-1], NormalDist(self.mean, self.std).cdf(score) if self.std else 1.0)


@dataclass(frozen=True)
class Threshold:
    """Where a statistic detects.

    score: detected at or above it.
    certain: where a detection is beyond doubt.
    """

    score: float
    certain: float


UNCALIBRATED = {
    "patch": Threshold(0.68, 1.0),
    "influence": Threshold(0.68, 1.0),
    "alignment": Threshold(0.5, 0.9),
}
"""Where statistics detect that no calibration speaks for, alignment always; measured: see docs/gate.md."""


@dataclass(frozen=True)
class Level:
    """One statistic at one noise level.

    baseline: the concept's own prompt's value, in the statistic's units, mean over noise seeds; scores are relative to
        it. 1 for alignment, which is relative by itself.
    baseline_std: its standard deviation over noise seeds.
    concept: scores of the concept's prompts (name, synonyms, in scenes).
    others: scores of other prompts.
    """

    sigma: float
    baseline: float
    baseline_std: float
    concept: Spread
    others: Spread

    @staticmethod
    def of(
        statistic: str, sigma: float, own: Sequence[float], concept: Sequence[float], others: Sequence[float]
    ) -> "Level":
        """Return what follows from a statistic's values.

        Args:
            own, concept, others: of the concept's own prompt, of others with it, and of those without.
        Raises: ValueError if the adapter has no influence on its concept, or for too few values.
        """
        baseline = 1.0 if statistic == "alignment" else sum(own) / len(own)
        if baseline <= 0.0:
            raise ValueError(
                "the adapter has no influence on its own concept, so there is nothing to calibrate; use one that was "
                "trained for this model"
            )
        return Level(
            round(sigma, 5),
            round(baseline, 6),
            round(float(torch.tensor(own).std()), 6),
            Spread.of([value / baseline for value in (*own, *concept)], upper=False),
            Spread.of([value / baseline for value in others], upper=True),
        )

    def threshold(self, false_alarm_rate: float) -> Threshold:
        """Return where to detect, so that at most a share of the other prompts is taken for the concept.

        That is the score which this share of the others exceeds. Where the concept's prompts, but for the same share,
        lie above it, the threshold is in the (geometric) middle between the two, so that both errors stay below it.
        """
        low, high = self.others.beyond(false_alarm_rate), self.concept.beyond(false_alarm_rate)
        low = max(low, 1e-3)
        score = math.sqrt(low * high) if high > low else low
        return Threshold(score, max(high, score))


@dataclass(frozen=True)
class Calibration:
    """What holds for one adapter on one model.

    model, adapter: keys of what it was measured with; it holds for nothing else.
    latent: shape of one sample.
    cfg: guidance scale of the trajectories, None where the guider has none.
    repeats: noise seeds of the baselines.
    levels: by statistic, by falling noise level.
    """

    model: str
    adapter: str
    latent: tuple[int, ...]
    cfg: float | None
    repeats: int
    levels: Mapping[str, tuple[Level, ...]]

    def at(self, statistic: str, sigma: float) -> Level | None:
        """Return a statistic's figures at a noise level, interpolated in its logarithm; None outside the calibrated."""
        levels = self.levels.get(statistic, ())
        inside = levels and levels[-1].sigma / SIGMA_MARGIN <= sigma <= levels[0].sigma * SIGMA_MARGIN
        if not inside:
            return None
        at = [math.log(level.sigma) for level in reversed(levels)]

        def value(read: Callable[[Level], float]) -> float:
            return _interpolated(at, [read(level) for level in reversed(levels)], math.log(sigma))

        def spread(read: Callable[[Level], Spread]) -> Spread:
            tail = [value(lambda level, i=i: read(level).tail[i]) for i in range(len(SHARES))]  # type: ignore[misc]
            mean, std = value(lambda level: read(level).mean), value(lambda level: read(level).std)
            return Spread(mean, std, min(read(level).count for level in levels), tuple(tail))

        return Level(
            sigma,
            value(lambda level: level.baseline),
            value(lambda level: level.baseline_std),
            spread(lambda level: level.concept),
            spread(lambda level: level.others),
        )

    def to_card(self) -> dict[str, Any]:
        """Return what the card keeps, plain JSON values."""
        return {"version": VERSION, **asdict(self)}

    @staticmethod
    def from_card(content: Mapping[str, Any]) -> "Calibration | None":
        """Return the calibration that a card keeps; None if it keeps none, or one of another version.

        Raises: ValueError if it is damaged.
        """
        if content.get("version") != VERSION:
            return None
        try:
            levels = {
                name: tuple(
                    Level(
                        float(level["sigma"]),
                        float(level["baseline"]),
                        float(level["baseline_std"]),
                        _spread(level["concept"]),
                        _spread(level["others"]),
                    )
                    for level in found
                )
                for name, found in content["levels"].items()
            }
            cfg = content["cfg"]
            return Calibration(
                str(content["model"]),
                str(content["adapter"]),
                tuple(int(side) for side in content["latent"]),
                None if cfg is None else float(cfg),
                int(content["repeats"]),
                levels,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the card's calibration is damaged ({error!r}); calibrate the adapter anew") from error


def tells_apart(influence: Level, alignment: Level | None, false_alarm_rate: float) -> bool:
    """Return whether influence is the statistic to decide by: one that misses few of the concept's prompts.

    That is where it misses no more of them than the false alarms that are accepted, or fewer than alignment does.

    Args:
        influence, alignment: at one noise level; None if there is no such figure of alignment.
        false_alarm_rate: that influence's threshold is for.
    """
    missed = influence.concept.share_below(influence.threshold(false_alarm_rate).score)
    if missed <= false_alarm_rate:
        return True
    return alignment is not None and missed < alignment.concept.share_below(UNCALIBRATED["alignment"].score)


def _spread(content: Mapping[str, Any]) -> Spread:
    tail = tuple(float(value) for value in content["tail"])
    if len(tail) != len(SHARES):
        raise ValueError(f"a tail has {len(tail)} values; expected {len(SHARES)}")
    return Spread(float(content["mean"]), float(content["std"]), int(content["count"]), tail)


def _interpolated(at: Sequence[float], values: Sequence[float], where: float) -> float:
    """The value at a place between known ones, linearly; beyond the first and last, theirs. `at` rises."""
    if where <= at[0]:
        return values[0]
    for (low, below), (high, above) in pairwise(zip(at, values, strict=True)):
        if where <= high:
            part = (where - low) / (high - low)
            return below + part * (above - below)
    return values[-1]
