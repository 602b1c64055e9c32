"""Calibration: how the scores of an erasure adapter spread over prompts and seeds, and the thresholds that follow.

At several noise levels it holds the adapter's influence on its concept's own prompt (the baseline for the influence on
other prompts) and the spread of the scores of prompts with and without the concept; and the text stage's part, which
takes no model (text.py). It is stored in the adapter's card. Does not know how a model predicts: `calibrated_levels` is
given a function that probes one.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .image import ImageProbe
from .spread import Spread, mixed, threshold
from .text import TextCalibration

VERSION = 4

STEPS, PROBED_STEPS = 20, (0, 1, 2, 4, 6)
"""The number of steps of the schedule that prompts are denoised on, and the steps before which they are probed."""

CALIBRATED = ("influence", "alignment")
"""The statistics that are calibrated."""

MINIMUM_OTHERS = 8
"""The least number of prompts without the concept for a training to calibrate: with fewer, false-positive rates mean
nothing."""

SIGMA_MARGIN = 1.05
"""Up to this factor outside the calibrated noise levels, the nearest one's values are used."""

UNCALIBRATED = {"influence": 0.68, "alignment": 0.5}
"""Thresholds for adapters without a calibration; measured, see docs/gate.md."""

P = TypeVar("P")


@dataclass(frozen=True)
class Asked(Generic[P]):
    """A prompt to probe, from how many noise seeds, and for which adapters (indices)."""

    prompt: P
    repeats: int
    adapters: tuple[int, ...]


Probed = Sequence[tuple[float, Mapping[int, Mapping[str, Tensor]]]]
"""Of one prompt, before each of `PROBED_STEPS`: the noise level, and the values of the `CALIBRATED` statistics,
[repeats], by statistic, by adapter."""

Probe = Callable[[Sequence[Asked[P]]], Iterator[Probed]]
"""Denoises prompts with the base model, and probes them on the way. It may denoise several in one batch, and yields
what it found for each in turn."""


@dataclass(frozen=True)
class CalibrationPrompts(Generic[P]):
    """The prompts that one adapter is calibrated with, in the type that the probe takes.

    own: the concept's own prompt, which gives the baseline.
    concept: other prompts with the concept.
    others: prompts without it.
    name: of the adapter, for error messages.
    """

    own: P
    concept: Sequence[P]
    others: Sequence[P]
    name: str = ""


@dataclass(frozen=True)
class Level:
    """One statistic at one noise level.

    baseline: mean over noise seeds of the statistic for the concept's own prompt; scores are relative to it. 1 for
        alignment, which is relative already.
    baseline_std: the standard deviation over noise seeds.
    concept: scores of prompts with the concept (its name, synonyms, in scenes).
    others: scores of prompts without it.
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
        """Return the level that follows from values of a statistic.

        Args:
            own, concept, others: for the concept's own prompt, other prompts with it, and prompts without it.
        Raises: ValueError if the adapter has no influence on its concept, or there are too few values.
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

    def threshold(self, false_positive_rate: float, adapters: int = 1) -> float:
        """Return the score from which on the concept is detected, see `spread.threshold`."""
        return threshold(self.concept, self.others, false_positive_rate, adapters)


@dataclass(frozen=True)
class Calibration:
    """The calibration of one adapter on one model.

    model, adapter: keys of what was measured; it does not hold for others. `adapter` is `Adapter.signature`.
    latent: shape of one sample.
    cfg: guidance scale of the trajectories, None if there was no guidance.
    repeats: noise seeds of the baselines.
    levels: by statistic, by falling noise level; none where only the text stage is calibrated.
    text: of the text stage; None where the adapter's layers read more than text.
    image: of the image stage; None where the network's features cannot be read, or do not tell the concept apart.
    """

    model: str
    adapter: str
    latent: tuple[int, ...] = ()
    cfg: float | None = None
    repeats: int = 0
    levels: Mapping[str, tuple[Level, ...]] = field(default_factory=dict)
    text: TextCalibration | None = None
    image: ImageProbe | None = None

    def at(self, statistic: str, sigma: float) -> Level | None:
        """Return a statistic's values at a noise level, interpolated in its logarithm.

        Outside the calibrated range the nearest level's, and None beyond `SIGMA_MARGIN`.
        """
        levels = self.levels.get(statistic, ())
        if not levels or not levels[-1].sigma / SIGMA_MARGIN <= sigma <= levels[0].sigma * SIGMA_MARGIN:
            return None
        for high, low in pairwise(levels):
            if low.sigma <= sigma <= high.sigma:
                part = math.log(sigma / low.sigma) / math.log(high.sigma / low.sigma)
                return Level(
                    sigma,
                    mixed(low.baseline, high.baseline, part),
                    mixed(low.baseline_std, high.baseline_std, part),
                    low.concept.mixed(high.concept, part),
                    low.others.mixed(high.others, part),
                )
        return replace(levels[0 if sigma > levels[0].sigma else -1], sigma=sigma)

    def to_card(self) -> dict[str, Any]:
        """Return what is stored in the card, as plain JSON values."""
        return {"version": VERSION, **asdict(self)}

    @staticmethod
    def from_card(content: Mapping[str, Any]) -> "Calibration | None":
        """Return the calibration that is stored in a card; None if there is none, or it has another version.

        Raises: ValueError if it is damaged.
        """
        if content.get("version") != VERSION:
            return None
        try:
            levels = {name: tuple(map(_level, found)) for name, found in content["levels"].items()}
            cfg, text, image = content["cfg"], content["text"], content.get("image")
            return Calibration(
                str(content["model"]),
                str(content["adapter"]),
                tuple(int(side) for side in content["latent"]),
                None if cfg is None else float(cfg),
                int(content["repeats"]),
                levels,
                None if text is None else TextCalibration.from_card(text),
                None if image is None else ImageProbe.from_card(image),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the card's calibration is damaged ({error!r}); calibrate the adapter anew") from error


def tells_apart(influence: Level, alignment: Level | None, false_positive_rate: float, adapters: int = 1) -> bool:
    """Return whether influence should decide at this noise level, rather than alignment.

    It should if it misses at most as many prompts with the concept as false positives are accepted, or fewer than
    alignment misses at its default threshold.

    Args:
        influence, alignment: at one noise level; None if alignment was not calibrated there.
        adapters: on the model.
    """
    missed = influence.concept.share_below(influence.threshold(false_positive_rate, adapters))
    if missed <= false_positive_rate:
        return True
    return alignment is not None and missed < alignment.concept.share_below(UNCALIBRATED["alignment"])


def calibrated_levels(
    prompts: Sequence[CalibrationPrompts[P]],
    probe: Probe[P],
    *,
    repeats: int,
    own_repeats: int,
    minimum_others: int = 1,
    on_prompt: Callable[[int, int], None] | None = None,
) -> list[dict[str, tuple[Level, ...]]]:
    """Return each adapter's levels, by statistic, by falling noise level.

    Adapters may share prompts: each is denoised once.

    Args:
        prompts: of each adapter.
        probe: see `Probe`.
        repeats: noise seeds per prompt.
        own_repeats: noise seeds of the concepts' own prompts.
        minimum_others: the least number of prompts without the concept.
        on_prompt: called with the number of prompts done and their total, after each; may raise to stop.
    Raises: ValueError for too few prompts or repeats, or an adapter without influence on its concept.
    """
    if repeats < 1 or own_repeats < 2:
        raise ValueError(
            f"calibration got {repeats} repeats per prompt and {own_repeats} of the concept's own; expected at least "
            "1 and 2"
        )
    groups = _groups(prompts, minimum_others)
    asked = [
        Asked(prompt, max(repeats if group else own_repeats for group in of.values()), tuple(of))
        for prompt, of in groups
    ]
    values: defaultdict[tuple[int, str, int, int], list[float]] = defaultdict(list)
    sigmas: dict[int, float] = {}
    for done, ((_, of), probed) in enumerate(zip(groups, probe(asked), strict=True), start=1):
        for place, (sigma, measured) in enumerate(probed):
            sigmas[place] = sigma
            for index, group in of.items():
                count = repeats if group else own_repeats
                for statistic in CALIBRATED:
                    values[index, statistic, place, group] += measured[index][statistic][:count].tolist()
        if on_prompt is not None:
            on_prompt(done, len(asked))

    def level(index: int, statistic: str, place: int) -> Level:
        try:
            return Level.of(statistic, sigmas[place], *(values[index, statistic, place, group] for group in range(3)))
        except ValueError as error:
            name = prompts[index].name
            raise ValueError(f"adapter {name!r}: {error}" if name else str(error)) from error

    return [
        {statistic: tuple(level(index, statistic, place) for place in sigmas) for statistic in CALIBRATED}
        for index in range(len(prompts))
    ]


def _groups(prompts: Sequence[CalibrationPrompts[P]], minimum_others: int) -> list[tuple[P, dict[int, int]]]:
    """Each prompt once, with its group (0 own, 1 concept, 2 others) for each adapter that asks for it."""
    asked: dict[Hashable, tuple[P, dict[int, int]]] = {}
    for index, of_adapter in enumerate(prompts):
        if len(of_adapter.others) < minimum_others:
            raise ValueError(
                f"calibration got {len(of_adapter.others)} prompts without the concept; expected at least "
                f"{minimum_others}"
            )
        for group, members in enumerate(((of_adapter.own,), of_adapter.concept, of_adapter.others)):
            for prompt in members:
                key = prompt if isinstance(prompt, Hashable) else id(prompt)  # an encoded prompt is a list
                asked.setdefault(key, (prompt, {}))[1].setdefault(index, group)
    return list(asked.values())


def _level(content: Mapping[str, Any]) -> Level:
    sigma, baseline, std = (float(content[name]) for name in ("sigma", "baseline", "baseline_std"))
    return Level(sigma, baseline, std, Spread.from_card(content["concept"]), Spread.from_card(content["others"]))
