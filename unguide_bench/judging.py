"""From a run's folder to judged pictures, scores and measures.

results.json     everything that was found
results.md       the same as tables
pictures.jsonl   the judged pictures, as `scores` reads them
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import BenchError
from .folder import Drawn, Folder, key_of
from .graphs import Job
from .labels import OTHERWISE, THRESHOLD, is_nude
from .prompts import Prompts
from .scores import BASE, ERASED, KINDS, SYNONYM, Picture, as_json, write_pictures
from .tables import tables

if TYPE_CHECKING:
    from .judges.clip import Clip

JUDGES = ("clip", "nudenet", "demo", "none")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
BASE_PICTURES = "base"
"""In place of a folder of references for FID: the base model's pictures of the same run."""


@dataclass(frozen=True)
class Judging:
    """What to look for in the pictures.

    Args:
        judge: one of `JUDGES`; "none" leaves accuracies out.
        classes: for CLIP to choose among; empty takes the prompts'.
        clip: the folder of CLIP's weights.
        clip_score: whether to measure CLIPScore.
        fid: a folder of reference pictures, or "base"; "" measures none.
        fid_weights: InceptionV3 weights; None takes CLIP's picture vectors.
        threshold: of NudeNet's detections.
    Raises: BenchError where CLIP's folder is not named and needed.
    """

    judge: str = "none"
    classes: tuple[str, ...] = ()
    clip: Path | None = None
    clip_score: bool = False
    fid: str = ""
    fid_weights: Path | None = None
    threshold: float = THRESHOLD

    def __post_init__(self) -> None:
        if self.judge not in JUDGES:
            raise BenchError(f"there is no judge {self.judge!r}; choose from {', '.join(JUDGES)}")
        if self.clip is None and self.needs_clip:
            raise BenchError("CLIP's weights are not named; give the folder of a download with --clip")

    @property
    def needs_clip(self) -> bool:
        return self.judge == "clip" or self.clip_score or (bool(self.fid) and self.fid_weights is None)


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Within the block a missing package is a BenchError that says how to install it."""
    try:
        yield
    except ImportError as error:
        raise BenchError(f"a package is missing ({error}); pip install 'comfyui-unguide[{name}]'") from error


def require(judging: Judging) -> None:
    """Raises BenchError for what is missing, before pictures are drawn that nothing could judge."""
    if judging.fid and judging.fid != BASE_PICTURES and not Path(judging.fid).is_dir():
        raise BenchError(f"there is no folder {judging.fid} to compare with; give one of .png or .jpg with --fid")
    if judging.fid_weights is not None and not judging.fid_weights.is_file():
        raise BenchError(
            f"there is no file {judging.fid_weights}; give torch-fidelity's InceptionV3 with --fid-weights"
        )
    with extra("bench"):
        if judging.needs_clip and judging.clip is not None:
            from .judges.clip import require_files

            require_files(judging.clip)
        if judging.judge == "nudenet":
            from .judges import nudity  # noqa: F401
        if judging.fid:
            from .judges import fid  # noqa: F401
    if judging.judge == "demo":
        try:
            from .judges import demo  # noqa: F401
        except ImportError as error:
            raise BenchError(f"the demo's classifier is in the repository ({error}); run it in a clone") from error


def judged(folder: Folder, jobs: Iterable[Job], prompts: Prompts, judging: Judging) -> dict[str, Any]:
    """Looks at a run's pictures, and writes what it found into the folder.

    Raises: BenchError where a package, weights or pictures are missing.
    """
    drawn = [folder.drawn[key] for key in dict.fromkeys(key_of(job) for job in jobs) if key in folder.drawn]
    if not drawn:
        raise BenchError(f"there are no pictures in {folder.path}; draw some with --server")
    files = [folder.path / one.file for one in drawn]
    results: dict[str, Any] = {"concept": prompts.concept, **folder.known}
    with extra("bench"):
        clip = _clip(judging)
        seen, results["nudity"] = _seen(drawn, files, prompts, judging, clip)
        pictures = list(_pictures(folder, drawn, seen, prompts))
        knows_others = judging.judge != "nudenet"
        shares = _shares(pictures, KINDS if knows_others else (ERASED, SYNONYM))
        results |= {"shares": shares, "scores": _scores(pictures) if knows_others else {}, "costs": _costs(drawn)}
        if judging.clip_score and clip is not None:
            from .judges.clip import ClipScore

            found = ClipScore(clip).measure(files, [one.prompt for one in drawn])
            results["clip_score"] = _by_method(drawn, found, lambda values: sum(values) / len(values))
        if judging.fid:
            results["fid"] = _fids(folder, drawn, judging, clip)
        summary = _report(folder, drawn, pictures) if results["scores"] else ""
    write_pictures(pictures, folder.path / "pictures.jsonl")
    (folder.path / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    results["tables"] = "\n\n".join(part for part in (summary, tables(results)) if part)
    (folder.path / "results.md").write_text(results["tables"], encoding="utf-8")
    return results


def _clip(judging: Judging) -> Clip | None:
    if not judging.needs_clip or judging.clip is None:
        return None
    from .judges.clip import Clip

    return Clip(judging.clip)


def _seen(
    drawn: Sequence[Drawn], files: Sequence[Path], prompts: Prompts, judging: Judging, clip: Clip | None
) -> tuple[list[tuple[str, str]], dict[str, dict[str, int]]]:
    """What each picture shows, and the class nearest to it where the judge may name none; both "" without a judge.

    With NudeNet also the exposed parts by method.
    """
    if judging.judge == "clip" and clip is not None:
        from .judges.clip import ClipJudge

        return [(one, "") for one in ClipJudge(clip, judging.classes or prompts.classes).see(files)], {}
    if judging.judge == "demo":
        from .judges.demo import DemoJudge

        return DemoJudge().see(files), {}
    if judging.judge == "nudenet":
        from .judges.nudity import NudityJudge

        found = NudityJudge(judging.threshold).see(files)
        nude = [is_nude(parts) for parts in found]
        counts = _by_method(
            drawn, [parts + Counter(nude=int(one)) for parts, one in zip(found, nude, strict=True)], _summed
        )
        return [(prompts.concept if one else OTHERWISE, "") for one in nude], counts
    return [("", "") for _ in files], {}


def _summed(counters: Sequence[Counter[str]]) -> dict[str, int]:
    """The counters as one, with the number of them as "pictures"."""
    return {"pictures": len(counters), **sum(counters, Counter())}


def _by_method(drawn: Sequence[Drawn], values: Sequence[Any], join: Callable[[list[Any]], Any]) -> dict[str, Any]:
    groups: dict[str, list[Any]] = {}
    for one, value in zip(drawn, values, strict=True):
        groups.setdefault(one.method, []).append(value)
    return {method: join(group) for method, group in groups.items()}


def _pictures(
    folder: Folder, drawn: Sequence[Drawn], seen: Sequence[tuple[str, str]], prompts: Prompts
) -> Iterator[Picture]:
    """The pictures as `scores` wants them, each compared with the base model's of the same prompt and seed."""
    items = {item.text: item for item in reversed(prompts.items)}
    base = {(one.prompt, one.seed, one.cfg): folder.path / one.file for one in drawn if one.method == BASE}
    for one, (what, closest) in zip(drawn, seen, strict=True):
        reference = base.get((one.prompt, one.seed, one.cfg))
        mean, largest = _difference(folder.path / one.file, reference) if reference else (None, None)
        yield Picture(
            method=one.method,
            concept=prompts.concept,
            prompt=one.prompt,
            kind=items[one.prompt].kind,
            label=items[one.prompt].label,
            seed=one.seed,
            seen=what,
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


def _costs(drawn: Sequence[Drawn]) -> dict[str, dict[str, float]]:
    def cost(group: list[Drawn]) -> dict[str, float]:
        return {
            "pictures": len(group),
            "evaluations": sum(one.evaluations for one in group) / len(group),
            "seconds": sum(one.seconds for one in group) / len(group),
        }

    return _by_method(drawn, drawn, cost)


def _fids(folder: Folder, drawn: Sequence[Drawn], judging: Judging, clip: Clip | None) -> dict[str, float]:
    """FID by method, against a folder of pictures or the base model's."""
    from .judges.clip import ClipNetwork
    from .judges.fid import Fid

    by_method = _by_method(drawn, [folder.path / one.file for one in drawn], list)
    if judging.fid == BASE_PICTURES:
        references = by_method.pop(BASE, [])
    else:
        references = [path for path in sorted(Path(judging.fid).rglob("*")) if path.suffix.lower() in SUFFIXES]
    if not references:
        raise BenchError(f"there are no pictures to compare with in {judging.fid!r}; give a folder of .png or .jpg")
    fid = Fid(
        ClipNetwork(clip) if clip is not None and judging.fid_weights is None else Path(judging.fid_weights or "")
    )
    return {method: fid.measure(files, references) for method, files in by_method.items()}
