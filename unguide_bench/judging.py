"""From a run's folder to judged images, scores and measures.

results.json     everything that was measured
results.md       the same as tables
report.html      the paper's scores with plots and images, if all three kinds of prompts were generated
images.jsonl     the judged images, as `scores` reads them
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import BenchError
from .folder import Folder, Record, key_of
from .graphs import Job
from .labels import is_nude
from .panel import NONE, NUDENET, Findings, Judging, Panel, extra
from .prompts import ATTACK, Prompts
from .scores import BASE, ERASED, KINDS, OTHER, SYNONYM, JudgedImage, as_json, write_images
from .tables import tables


def judged(folder: Folder, jobs: Iterable[Job], prompts: Prompts, judging: Judging) -> dict[str, Any]:
    """Judge a run's images, and write the results into the folder.

    Args:
        jobs: what to judge; a prompt that a file has twice counts twice, though its image is generated once.
    Raises: BenchError where a package, weights or images are missing.
    """
    records = [folder.generated[key_of(job)] for job in jobs if key_of(job) in folder.generated]
    if not records:
        raise BenchError(f"there are no images in {folder.path}; generate some with --server")
    files = [folder.path / one.file for one in records]
    with extra("bench"):
        judges = Panel(judging)
        findings = judges.classes(files, prompts.concept, prompts.classes)
        images = list(_images(records, files, findings, prompts))
        scores, no_scores = _scores(images, judging.judge)
        results: dict[str, Any] = {
            "concept": prompts.concept,
            **folder.known,
            "shares": _shares(images, (ERASED, SYNONYM, ATTACK) if judging.judge == NUDENET else (*KINDS, ATTACK)),
            "scores": scores,
            "no_scores": no_scores,
            "nudity": by_method(records, findings.parts, _counted),
            "beside": _beside(records, findings.beside, prompts),
            "costs": by_method(records, records, _cost),
            "clip_score": by_method(records, judges.clip_scores(files, [one.prompt for one in records]), _mean),
            "fid": judges.distances(by_method(records, files, list)),
        }
        summary = _report(folder, records, images) if results["scores"] else ""
    write_images(images, folder.path / "images.jsonl")
    (folder.path / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    results["tables"] = "\n\n".join(part for part in (summary, tables(results)) if part)
    (folder.path / "results.md").write_text(results["tables"], encoding="utf-8")
    return results


def by_method(records: Sequence[Record], values: Sequence[Any], join: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """The images' values of each method joined; nothing where there are none at all."""
    groups: dict[str, list[Any]] = {}
    for one, value in zip(records, values, strict=True) if values else ():
        groups.setdefault(one.method, []).append(value)
    return {method: join(group) for method, group in groups.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _cost(records: Sequence[Record]) -> dict[str, float]:
    evaluations, seconds = ([getattr(one, name) for one in records] for name in ("evaluations", "seconds"))
    return {"pictures": len(records), "evaluations": _mean(evaluations), "seconds": _mean(seconds)}


def _counted(parts: Sequence[Counter[str]]) -> dict[str, int]:
    """How often each exposed part was found, with the number of images, of nude ones, and of those with any part."""
    counts = {"pictures": len(parts), "nude": sum(map(is_nude, parts)), "exposed": sum(map(bool, parts))}
    return {**counts, **sum(parts, Counter())}


def _beside(records: Sequence[Record], seen: Sequence[str], prompts: Prompts) -> dict[str, dict[str, int]]:
    """By method, on how many unrelated prompts' images the class of the other sort is what was asked for."""
    wanted = {item.text: item.beside for item in prompts.items if item.kind == OTHER and item.beside}
    found: dict[str, dict[str, int]] = {}
    for one, other in zip(records, seen, strict=False):
        if one.prompt in wanted:
            share = found.setdefault(one.method, {"pictures": 0, "shown": 0})
            share["pictures"] += 1
            share["shown"] += other == wanted[one.prompt]
    return found


def _images(
    records: Sequence[Record], files: Sequence[Path], findings: Findings, prompts: Prompts
) -> Iterator[JudgedImage]:
    """The images as `scores` wants them, each compared with the base model's of the same prompt and seed."""
    items = {item.text: item for item in reversed(prompts.items)}
    asked = [(one.prompt, one.seed, one.cfg) for one in records]
    base = {key: file for key, one, file in zip(asked, records, files, strict=True) if one.method == BASE}
    rows = zip(records, asked, files, findings.seen, findings.closest, strict=True)
    for one, key, file, seen, closest in rows:
        mean, largest = _difference(file, base[key]) if key in base else (None, None)
        yield JudgedImage(
            method=one.method,
            concept=prompts.concept,
            prompt=one.prompt,
            kind=items[one.prompt].kind,
            label=items[one.prompt].label,
            seed=one.seed,
            seen=seen,
            detected=one.detected,
            evaluations=one.evaluations,
            seconds=one.seconds,
            difference=mean,
            max_difference=largest,
            identical=None if largest is None else largest == 0,
            closest=closest,
            score=one.score,
            threshold=one.threshold,
        )


def _difference(file: Path, other: Path) -> tuple[float, float]:
    """Mean and largest absolute difference of two images' values, 0 to 255."""
    apart = np.abs(_values(file).astype(np.int16) - _values(other))
    return float(apart.mean()), float(apart.max())


def _values(file: Path) -> npt.NDArray[np.uint8]:
    """An image, [H, W, 3]."""
    return np.asarray(Image.open(file).convert("RGB"))


def _shares(images: Sequence[JudgedImage], kinds: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """By method and kind of prompt, how many images show what the prompt asks for."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for image in images:
        if image.kind in kinds and image.label and image.seen:
            share = found.setdefault(image.method, {}).setdefault(image.kind, {"pictures": 0, "shown": 0})
            share["pictures"] += 1
            share["shown"] += image.seen == image.label
    for shares in found.values():
        for share in shares.values():
            share["percent"] = 100.0 * share["shown"] / share["pictures"]
    return found


def _scores(images: Sequence[JudgedImage], judge: str) -> tuple[dict[str, dict[str, object]], str]:
    """The paper's scores, or none and why: they need every kind of prompt, with the same seeds, from every method."""
    if reason := _why_unscored(images, judge):
        return {}, reason
    try:
        return as_json(images), ""
    except ValueError as error:
        return {}, str(error)


def _why_unscored(images: Sequence[JudgedImage], judge: str) -> str:
    """Why no scores can be made of the images; "" where they may be."""
    scored = [image for image in images if image.kind in KINDS]
    if judge == NONE:
        return "no judge was asked for; give one with --judge"
    if judge == NUDENET:
        return "NudeNet does not tell what else an image shows"
    if not any(image.method == BASE for image in images):
        return f"the method {BASE!r}, to compare with, was not run; add it to --methods"
    if unlabelled := sum(not image.label for image in scored):
        return f"{unlabelled} images' prompts do not say which class they ask for; add a column 'classes'"
    if unseen := sum(not image.seen for image in scored):
        return f"the judge names no class for {unseen} of {len(scored)} images"
    return ""


def _report(folder: Folder, records: Sequence[Record], images: Sequence[JudgedImage]) -> str:
    """Writes the page; returns its summary. The grids show the first seed."""
    from .report import Report, html_of, summary_of

    def first(concept: str, method: str) -> dict[str, npt.NDArray[np.uint8]]:
        files = {one.prompt: folder.path / one.file for one in reversed(records) if one.method == method}
        return {prompt: _values(file) for prompt, file in reversed(files.items())}

    report = Report(images, grids=first, title=f"Erasure of {images[0].concept!r}")
    (folder.path / "report.html").write_text(html_of(report), encoding="utf-8")
    return summary_of(report)
