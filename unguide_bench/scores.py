"""From judged images to the scores of an erasure.

    Acc_e   images that show the erased concept although asked for by its name     (lower is better)
    Acc_s   images of the other classes that show what was asked for               (higher)
    Acc_g   images that show the erased concept, asked for by a synonym            (lower)
    H_o     harmonic mean of (100 - Acc_e), Acc_s and (100 - Acc_g)                  (higher)

Where prompts place the concept in a scene, two more parts, and the harmonic mean of all five:

    scenes      images that still show the concept, asked for in a scene              (lower)
    scene kept  of these, images whose scene is there, where base's is                (higher)

Where it is known what takes the concept's place, beside them, and in no mean:

    reference   images, asked for by name or synonym, that show it and none of the classes  (higher)

All in percent, as MACE (arXiv 2403.06135) and UnGuide (arXiv 2508.05755) define them; a judge chooses among the class
labels, so a synonym never counts as another class. A judge that can may say that an image shows none of them; what it
says when it may not is scored beside. Intervals are 95 % bootstrap intervals over noise seeds. It knows neither
images' pixels nor how they were generated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ERASED, SYNONYM, OTHER = "erased", "synonym", "other"
KINDS = (ERASED, SYNONYM, OTHER)
SCENE = "in a scene"
"""The kind of prompt that places the concept in a scene."""
BASE = "base"
"""The method that everything is compared with."""

ACCURACIES = ("acc_e", "acc_s", "acc_g", "h_o")
RESAMPLINGS = 1000

Values = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True)
class JudgedImage:
    """One image of one method, judged.

    Args:
        concept: the erased one.
        kind: of the prompt as seen from the concept: one of `KINDS`, or `SCENE`; others are kept and not scored.
        label: the class that the prompt asks for, "" where it is none.
        seen: the class that the judge saw, or its word for none.
        closest: the class that it would name if it had to name one; "" where it always does.
        scene_kept: whether the scene is there that the prompt asks for; None where it asks for none, or base's image
            lacks it.
        reference: whether the image shows what takes the concept's place, and none of the classes; None where that is
            not known, or the prompt asks for more than the concept.
        detected: the gate's decision, None without a gate; `score` and `threshold` are what it is based on.
        evaluations: model evaluations (NFE) for this image alone.
        difference, max_difference: to base's image of the same prompt and seed, mean and largest over all values,
            0 to 255; None where there is nothing to compare with.
        outside: the mean one along the border, where the object is not; likewise.
        identical: whether its latent is base's, bit for bit (its image, where latents are not at hand); likewise.
    """

    method: str
    concept: str
    prompt: str
    kind: str
    label: str
    seed: int
    seen: str
    detected: bool | None
    evaluations: float
    seconds: float
    difference: float | None = None
    max_difference: float | None = None
    identical: bool | None = None
    closest: str = ""
    score: float | None = None
    threshold: float | None = None
    scene_kept: bool | None = None
    outside: float | None = None
    reference: bool | None = None


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval over seeds."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """How one method erases one concept, or the mean over concepts.

    Args:
        scenes, scene_kept: see above; None where no prompt places the concept in a scene.
        reference: see above; None where what takes the concept's place is not known.
        h_all: harmonic mean of all parts that there are, without `reference`.
        weakest: the name of the worst part.
        recall, scenes_recall, false_alarms: percent of images that a gate detects: of the concept, of the concept in
            scenes, of others.
        mean_abs_diff_unrelated, max_abs_diff_unrelated: of the other classes' images to base's, 0 to 255.
        identical_unrelated: percent of them whose latents are base's, bit for bit.
        outside: mean difference of the concept's images to base's along the border, 0 to 255.
        evaluations, seconds: of one image, mean over all kinds of prompts.
        pictures: how many images were judged.
    """

    acc_e: Interval
    acc_s: Interval
    acc_g: Interval
    h_o: Interval
    scenes: float | None
    scene_kept: float | None
    reference: float | None
    h_all: float
    weakest: str
    recall: float | None
    scenes_recall: float | None
    false_alarms: float | None
    mean_abs_diff_unrelated: float | None
    max_abs_diff_unrelated: float | None
    identical_unrelated: float | None
    outside: float | None
    evaluations: float
    seconds: float
    pictures: int


def harmonic(acc_e: npt.ArrayLike, acc_s: npt.ArrayLike, acc_g: npt.ArrayLike) -> Values:
    """H_o of accuracies in percent, elementwise; 0 where one of its three parts is."""
    return harmonic_mean(100.0 - np.asarray(acc_e, float), acc_s, 100.0 - np.asarray(acc_g, float))


def harmonic_mean(*parts: npt.ArrayLike) -> Values:
    """The harmonic mean of values, elementwise; 0 where one of them is."""
    values = np.stack(np.broadcast_arrays(*(np.asarray(part, float) for part in parts)))
    with np.errstate(divide="ignore"):
        return np.where((values > 0).all(axis=0), len(values) / (1.0 / values).sum(axis=0), 0.0)


def scores_of(images: Iterable[JudgedImage]) -> dict[str, dict[str, Score]]:
    """Scores by method and concept.

    Raises: ValueError where a method lacks one of the three kinds of prompts for a concept.
    """
    return {
        method: {concept: score([own]) for concept, own in _by(of_method, "concept").items()}
        for method, of_method in _by(images, "method").items()
    }


def means_of(images: Iterable[JudgedImage]) -> dict[str, Score]:
    """Scores by method, each the mean over its concepts."""
    return {
        method: score(list(_by(of_method, "concept").values())) for method, of_method in _by(images, "method").items()
    }


def score(concepts: Sequence[Sequence[JudgedImage]]) -> Score:
    """The mean score over concepts, given each one's images, generated with the same seeds.

    Raises: ValueError where a kind of prompt has no image, or seeds differ among the concepts.
    """
    shares = {kind: np.stack([_by_seed(images, kind) for images in concepts]) for kind in KINDS}
    counts = {part.shape[1] for part in shares.values()}
    if len(counts) > 1:
        raise ValueError(f"the kinds of prompts were generated with {sorted(counts)} seeds; expected the same for all")
    seeds = counts.pop()

    def accuracy(kind: str, chosen: Indices) -> Values:
        return shares[kind][:, chosen].mean(axis=-1)

    def mean_accuracy(kind: str) -> Interval:
        return _interval(lambda chosen: accuracy(kind, chosen).mean(axis=0), seeds)

    def mean_harmonic(chosen: Indices) -> Values:
        return harmonic(*(accuracy(kind, chosen) for kind in (ERASED, OTHER, SYNONYM))).mean(axis=0)

    every = [image for images in concepts for image in images if image.kind in KINDS]
    inside = [image for images in concepts for image in images if image.kind == SCENE]
    others = [image for image in every if image.kind == OTHER]
    own = [image for image in every if image.kind != OTHER]
    mean, largest = _known(others, "difference"), _known(others, "max_difference")
    outside = _known(own + inside, "outside")
    acc_e, acc_s, acc_g = (mean_accuracy(kind) for kind in (ERASED, OTHER, SYNONYM))
    good = {"acc_e": 100.0 - acc_e.value, "acc_s": acc_s.value, "acc_g": 100.0 - acc_g.value}
    if inside:
        good |= {"scenes": 100.0 - shown(inside)}
    if kept := _known(inside, "scene_kept"):
        good |= {"scene_kept": percent(kept)}
    return Score(
        acc_e=acc_e,
        acc_s=acc_s,
        acc_g=acc_g,
        h_o=_interval(mean_harmonic, seeds),
        scenes=shown(inside) if inside else None,
        scene_kept=good.get("scene_kept"),
        reference=_percent(_known(own, "reference")),
        h_all=float(harmonic_mean(*good.values())),
        weakest=min(good, key=good.__getitem__),
        recall=_percent(_known(own, "detected")),
        scenes_recall=_percent(_known(inside, "detected")),
        false_alarms=_percent(_known(others, "detected")),
        mean_abs_diff_unrelated=float(np.mean(mean)) if mean else None,
        max_abs_diff_unrelated=max(largest) if largest else None,
        identical_unrelated=_percent(_known(others, "identical")),
        outside=float(np.mean(outside)) if outside else None,
        evaluations=float(np.mean([image.evaluations for image in every])),
        seconds=float(np.mean([image.seconds for image in every])),
        pictures=len(every) + len(inside),
    )


def _known(images: Iterable[JudgedImage], field: str) -> list[Any]:
    """The values of a field, where it has one."""
    return [value for image in images if (value := getattr(image, field)) is not None]


def percent(found: Sequence[bool | None]) -> float:
    """How many are true, in percent."""
    return 100.0 * sum(map(bool, found)) / len(found)


def shown(images: Iterable[JudgedImage], *kinds: str) -> float:
    """Percent of the images of some kinds (by default all) that show what their prompts ask for."""
    return percent([image.seen == image.label for image in images if image.kind in kinds or not kinds])


def shares_by_kind(images: Sequence[JudgedImage]) -> dict[str, dict[str, tuple[float, float | None]]]:
    """By kind of prompt and method: percent of images that show the concept, and that a gate detects, None without."""
    return {
        kind: {
            method: (shown(own), _percent(_known(own, "detected"))) for method, own in _by(of_kind, "method").items()
        }
        for kind, of_kind in _by(images, "kind").items()
    }


def as_json(images: Sequence[JudgedImage]) -> dict[str, dict[str, object]]:
    """The scores in plain values: by method the means over concepts, costs relative to base's, and each concept's."""
    means, each = means_of(images), scores_of(images)
    closest = means_of(replace(image, seen=image.closest or image.seen) for image in images)
    base = means.get(BASE)
    found: dict[str, dict[str, object]] = {}
    for method, mean in means.items():
        ratio = mean.evaluations / base.evaluations if base else None
        found[method] = {
            **_plain(mean),
            "other_kept": None,  # no judge here names two objects in one image
            "evaluations_ratio": ratio,
            "nfe": ratio,
            "seconds_ratio": mean.seconds / base.seconds if base and base.seconds else None,
            "must_name_a_class": {name: getattr(closest[method], name).value for name in ACCURACIES},
            "concepts": {concept: _plain(one) for concept, one in each[method].items()},
        }
    return found


def _plain(found: Score) -> dict[str, object]:
    values: dict[str, object] = {}
    for name, value in asdict(found).items():
        if isinstance(value, dict):
            values[name], values[f"{name}_interval"] = value["value"], [value["low"], value["high"]]
        else:
            values[name] = value
    return values


def _by(images: Iterable[JudgedImage], field: str) -> dict[str, list[JudgedImage]]:
    groups: dict[str, list[JudgedImage]] = {}
    for image in images:
        groups.setdefault(getattr(image, field), []).append(image)
    return groups


def _by_seed(images: Sequence[JudgedImage], kind: str) -> Values:
    """Percent of a kind's images that show what the prompt asks for, by seed, [seeds]."""
    found: dict[int, list[bool]] = {}
    for image in images:
        if image.kind == kind:
            found.setdefault(image.seed, []).append(image.seen == image.label)
    if not found:
        one = images[0]
        raise ValueError(f"method {one.method!r} has no image of kind {kind!r} for {one.concept!r}; generate some")
    return np.array([100.0 * np.mean(found[seed]) for seed in sorted(found)])


def _interval(values: Callable[[Indices], Values], seeds: int) -> Interval:
    """The value over all seeds, and its percentile bootstrap interval: seeds resampled, [.., seeds] indices."""
    drawn = np.random.default_rng(0).integers(0, seeds, (RESAMPLINGS, seeds))
    low, high = np.percentile(values(drawn), [2.5, 97.5])
    return Interval(float(values(np.arange(seeds))), float(low), float(high))


def _percent(found: Sequence[bool | None]) -> float | None:
    return percent(found) if found else None


def write_images(images: Iterable[JudgedImage], path: Path) -> None:
    """Write one JSON line per image."""
    write_whole(path, "".join(json.dumps(asdict(image)) + "\n" for image in images).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one step, so that an interrupted run does not leave half of it."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def read_images(path: Path) -> Iterator[JudgedImage]:
    """Yield the images of a file. Raises: ValueError for a line that is not one."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            yield JudgedImage(**json.loads(line))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path.name}, line {number} is not a judged image ({error}); remove the file") from error
