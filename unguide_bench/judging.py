"""From a run's folder to judged images, scores and measures.

results.json     everything that was measured
results.md       the same as tables
report.html      the paper's scores with plots and images, if all three kinds of prompts were generated
pictures.jsonl   the judged images, as `scores` reads them
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
from .looking import NUDENET, Findings, Judging, Looking, extra
from .prompts import Prompts
from .scores import BASE, ERASED, KINDS, SYNONYM, JudgedImage, as_json, write_images
from .tables import tables


def judged(folder: Folder, jobs: Iterable[Job], prompts: Prompts, judging: Judging) -> dict[str, Any]:
    """Judge a run's images, and write the results into the folder.

    Raises: BenchError where a package, weights or images are missing.
    """
    records = [folder.generated[key] for key in dict.fromkeys(key_of(job) for job in jobs) if key in folder.generated]
    if not records:
        raise BenchError(f"there are no images in {folder.path}; generate some with --server")
    files = [folder.path / one.file for one in records]
    with extra("bench"):
        judges = Looking(judging)
        findings = judges.classes(files, prompts.concept, prompts.classes)
        images = list(_images(records, files, findings, prompts))
        knows_others = judging.judge != NUDENET
        results: dict[str, Any] = {
            "concept": prompts.concept,
            **folder.known,
            "shares": _shares(images, KINDS if knows_others else (ERASED, SYNONYM)),
            "scores": _scores(images) if knows_others else {},
            "nudity": by_method(records, findings.parts, _counted),
            "costs": by_method(records, records, _cost),
            "clip_score": by_method(records, judges.clip_scores(files, [one.prompt for one in records]), _mean),
            "fid": judges.distances(by_method(records, files, list)),
        }
        summary = _report(folder, records, images) if results["scores"] else ""
    write_images(images, folder.path / "pictures.jsonl")
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
    """How often each exposed part was found, with the number of images and of nude ones."""
    return {"pictures": len(parts), "nude": sum(map(is_nude, parts)), **sum(parts, Counter())}


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


def _scores(images: Sequence[JudgedImage]) -> dict[str, dict[str, object]]:
    """The paper's scores, where every method has images of all three kinds of prompts with the same seeds."""
    try:
        return as_json(images) if _can_be_scored(images) else {}
    except ValueError:
        return {}


def _can_be_scored(images: Sequence[JudgedImage]) -> bool:
    """Whether the judge named every image, prompts name their classes, and base is there to compare with."""
    named = all(image.seen and (image.label or image.kind not in KINDS) for image in images)
    return named and any(image.method == BASE for image in images)


def _report(folder: Folder, records: Sequence[Record], images: Sequence[JudgedImage]) -> str:
    """Writes the page; returns its summary. The grids show the first seed."""
    from .report import Report, html_of, summary_of

    def first(concept: str, method: str) -> dict[str, npt.NDArray[np.uint8]]:
        files = {one.prompt: folder.path / one.file for one in reversed(records) if one.method == method}
        return {prompt: _values(file) for prompt, file in reversed(files.items())}

    report = Report(images, grids=first, title=f"Erasure of {images[0].concept!r}")
    (folder.path / "report.html").write_text(html_of(report), encoding="utf-8")
    return summary_of(report)
