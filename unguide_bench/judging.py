"""From a run's folder to judged pictures, scores and measures.

results.json     everything that was found
results.md       the same as tables
report.html      the paper's scores with plots and pictures, where all three kinds of prompts were drawn
pictures.jsonl   the judged pictures, as `scores` reads them
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
from .folder import Drawn, Folder, key_of
from .graphs import Job
from .labels import is_nude
from .looking import NUDENET, Findings, Judging, Looking, extra
from .prompts import Prompts
from .scores import BASE, ERASED, KINDS, SYNONYM, Picture, as_json, write_pictures
from .tables import tables


def judged(folder: Folder, jobs: Iterable[Job], prompts: Prompts, judging: Judging) -> dict[str, Any]:
    """Looks at a run's pictures, and writes what it found into the folder.

    Raises: BenchError where a package, weights or pictures are missing.
    """
    drawn = [folder.drawn[key] for key in dict.fromkeys(key_of(job) for job in jobs) if key in folder.drawn]
    if not drawn:
        raise BenchError(f"there are no pictures in {folder.path}; draw some with --server")
    files = [folder.path / one.file for one in drawn]
    with extra("bench"):
        look = Looking(judging)
        findings = look.classes(files, prompts.concept, prompts.classes)
        pictures = list(_pictures(drawn, files, findings, prompts))
        knows_others = judging.judge != NUDENET
        results: dict[str, Any] = {
            "concept": prompts.concept,
            **folder.known,
            "shares": _shares(pictures, KINDS if knows_others else (ERASED, SYNONYM)),
            "scores": _scores(pictures) if knows_others else {},
            "nudity": by_method(drawn, findings.parts, _counted),
            "costs": by_method(drawn, drawn, _cost),
            "clip_score": by_method(drawn, look.clip_scores(files, [one.prompt for one in drawn]), _mean),
            "fid": look.distances(by_method(drawn, files, list)),
        }
        summary = _report(folder, drawn, pictures) if results["scores"] else ""
    write_pictures(pictures, folder.path / "pictures.jsonl")
    (folder.path / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    results["tables"] = "\n\n".join(part for part in (summary, tables(results)) if part)
    (folder.path / "results.md").write_text(results["tables"], encoding="utf-8")
    return results


def by_method(drawn: Sequence[Drawn], values: Sequence[Any], join: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """The pictures' values of each method joined; nothing where there are none at all."""
    groups: dict[str, list[Any]] = {}
    for one, value in zip(drawn, values, strict=True) if values else ():
        groups.setdefault(one.method, []).append(value)
    return {method: join(group) for method, group in groups.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _cost(drawn: Sequence[Drawn]) -> dict[str, float]:
    evaluations, seconds = ([getattr(one, name) for one in drawn] for name in ("evaluations", "seconds"))
    return {"pictures": len(drawn), "evaluations": _mean(evaluations), "seconds": _mean(seconds)}


def _counted(parts: Sequence[Counter[str]]) -> dict[str, int]:
    """How often each exposed part was found, with the number of pictures and of nude ones."""
    return {"pictures": len(parts), "nude": sum(map(is_nude, parts)), **sum(parts, Counter())}


def _pictures(drawn: Sequence[Drawn], files: Sequence[Path], findings: Findings, prompts: Prompts) -> Iterator[Picture]:
    """The pictures as `scores` wants them, each compared with the base model's of the same prompt and seed."""
    items = {item.text: item for item in reversed(prompts.items)}
    asked = [(one.prompt, one.seed, one.cfg) for one in drawn]
    base = {key: file for key, one, file in zip(asked, drawn, files, strict=True) if one.method == BASE}
    rows = zip(drawn, asked, files, findings.seen, findings.closest, strict=True)
    for one, key, file, seen, closest in rows:
        mean, largest = _difference(file, base[key]) if key in base else (None, None)
        yield Picture(
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
    """Mean and largest absolute difference of two pictures' values, 0 to 255."""
    apart = np.abs(_values(file).astype(np.int16) - _values(other))
    return float(apart.mean()), float(apart.max())


def _values(file: Path) -> npt.NDArray[np.uint8]:
    """A picture, [H, W, 3]."""
    return np.asarray(Image.open(file).convert("RGB"))


def _shares(pictures: Sequence[Picture], kinds: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """By method and kind of prompt, how many pictures show what the prompt asks for."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for picture in pictures:
        if picture.kind in kinds and picture.label and picture.seen:
            share = found.setdefault(picture.method, {}).setdefault(picture.kind, {"pictures": 0, "shown": 0})
            share["pictures"] += 1
            share["shown"] += picture.seen == picture.label
    for shares in found.values():
        for share in shares.values():
            share["percent"] = 100.0 * share["shown"] / share["pictures"]
    return found


def _scores(pictures: Sequence[Picture]) -> dict[str, dict[str, object]]:
    """The paper's scores, where every method has pictures of all three kinds of prompts with the same seeds."""
    try:
        return as_json(pictures) if _can_be_scored(pictures) else {}
    except ValueError:
        return {}


def _can_be_scored(pictures: Sequence[Picture]) -> bool:
    """Whether the judge named every picture, prompts name their classes, and base is there to compare with."""
    named = all(picture.seen and (picture.label or picture.kind not in KINDS) for picture in pictures)
    return named and any(picture.method == BASE for picture in pictures)


def _report(folder: Folder, drawn: Sequence[Drawn], pictures: Sequence[Picture]) -> str:
    """Writes the page; returns its summary. The grids show the first seed."""
    from .report import Report, html_of, summary_of

    def first(concept: str, method: str) -> dict[str, npt.NDArray[np.uint8]]:
        files = {one.prompt: folder.path / one.file for one in reversed(drawn) if one.method == method}
        return {prompt: _values(file) for prompt, file in reversed(files.items())}

    report = Report(pictures, grids=first, title=f"Erasure of {pictures[0].concept!r}")
    (folder.path / "report.html").write_text(html_of(report), encoding="utf-8")
    return summary_of(report)
