"""The judges that are asked for, and what they say of image files. It does not know runs and scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BenchError
from .labels import CANVAS_OBJECTS, OTHERWISE, THRESHOLD, is_nude
from .scores import BASE

if TYPE_CHECKING:
    from torch import nn

    from .judges.clip import Clip

CLIP, NUDENET, GIPHY, UNLEARNCANVAS, DEMO, NONE = JUDGES = ("clip", "nudenet", "giphy", "unlearncanvas", "demo", "none")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
BASE_IMAGES = "base"
"""In place of a folder of references for FID: the base model's images of the same run."""


@dataclass(frozen=True)
class Judging:
    """How images are judged.

    Args:
        judge: one of `JUDGES`; "none" leaves accuracies out.
        classes: for CLIP to choose among; empty takes the prompts'.
        clip: the folder of CLIP's weights.
        clip_score: whether to measure CLIPScore.
        fid: a folder of reference images, or "base"; "" measures none.
        fid_weights: InceptionV3 weights; None takes CLIP's image vectors.
        threshold: of NudeNet's detections.
        weights: the folder of GIPHY's files or UnlearnCanvas' classifiers.
    Raises: BenchError where a folder is not named and needed.
    """

    judge: str = NONE
    classes: tuple[str, ...] = ()
    clip: Path | None = None
    clip_score: bool = False
    fid: str = ""
    fid_weights: Path | None = None
    threshold: float = THRESHOLD
    weights: Path | None = None

    def __post_init__(self) -> None:
        if self.judge not in JUDGES:
            raise BenchError(f"unknown judge {self.judge!r}; choose from {', '.join(JUDGES)}")
        if self.clip is None and self.needs_clip:
            raise BenchError("CLIP's weights are not named; give the folder of a download with --clip")
        if self.weights is None and self.judge in (GIPHY, UNLEARNCANVAS):
            raise BenchError(f"the weights of the judge {self.judge!r} are not named; give their folder with --weights")

    @property
    def needs_clip(self) -> bool:
        return self.judge == CLIP or self.clip_score or (bool(self.fid) and self.fid_weights is None)


@dataclass(frozen=True)
class Findings:
    """What a judge said of each image.

    Args:
        seen: the class; "" without a judge.
        closest: the class nearest to it, of a judge that may name none; "" of others.
        parts: exposed parts of the body, of NudeNet; empty of others.
        beside: the class of the other sort, of UnlearnCanvas' two classifiers; empty of others.
    """

    seen: list[str]
    closest: list[str]
    parts: list[Counter[str]] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Within the block a missing package is a BenchError that says how to install it."""
    try:
        yield
    except ImportError as error:
        raise BenchError(f"a package is missing ({error}); pip install 'unguide[{name}]'") from error


def require(judging: Judging) -> None:
    """Raises BenchError for what is missing, before images are generated that nothing could judge."""
    if judging.fid and judging.fid != BASE_IMAGES and not Path(judging.fid).is_dir():
        raise BenchError(f"the folder {judging.fid} does not exist; give one of .png or .jpg with --fid")
    if judging.fid_weights is not None and not judging.fid_weights.is_file():
        raise BenchError(f"{judging.fid_weights} does not exist; give InceptionV3's weights with --fid-weights")
    with extra("bench"):
        if judging.needs_clip and judging.clip is not None:
            from .judges.clip import require_files

            require_files(judging.clip)
        if judging.judge == NUDENET:
            from .judges import nudity  # noqa: F401
        if judging.judge in (GIPHY, UNLEARNCANVAS) and judging.weights is not None:
            from .judges import canvas, giphy

            (giphy if judging.judge == GIPHY else canvas).require_files(judging.weights)
        if judging.fid:
            from .judges import fid  # noqa: F401
    if judging.judge == DEMO:
        try:
            from .judges import demo  # noqa: F401
        except ImportError as error:
            raise BenchError(f"the demo's classifier is in the repository ({error}); run it in a clone") from error


class Panel:
    """The judges, loaded. Raises: BenchError where weights are missing; ImportError where a package is."""

    def __init__(self, judging: Judging) -> None:
        self.judging = judging
        self.clip: Clip | None = None
        if judging.needs_clip and judging.clip is not None:
            from .judges.clip import Clip

            self.clip = Clip(judging.clip)

    def classes(self, files: Sequence[Path], concept: str, labels: Sequence[str]) -> Findings:
        """What each image shows: one of the labels; by NudeNet the concept, or that there is none."""
        if self.judging.judge == CLIP and self.clip is not None:
            from .judges.clip import ClipJudge

            seen = ClipJudge(self.clip, self.judging.classes or labels).see(files)
            return Findings(seen, [""] * len(seen))
        if self.judging.judge == DEMO:
            from .judges.demo import DemoJudge

            pairs = DemoJudge().see(files)
            return Findings([one for one, _ in pairs], [closest for _, closest in pairs])
        if self.judging.judge == NUDENET:
            from .judges.nudity import NudityJudge

            parts = NudityJudge(self.judging.threshold).see(files)
            return Findings([concept if is_nude(one) else OTHERWISE for one in parts], [""] * len(parts), parts)
        if self.judging.judge == GIPHY and self.judging.weights is not None:
            from .judges.giphy import GiphyJudge

            names = GiphyJudge(self.judging.weights).see(files)
            return Findings(names, [""] * len(names))
        if self.judging.judge == UNLEARNCANVAS and self.judging.weights is not None:
            from .judges.canvas import CanvasJudge

            pairs = CanvasJudge(self.judging.weights).see(files)
            if not {thing.lower() for thing in CANVAS_OBJECTS}.isdisjoint(labels):  # an object is erased
                pairs = [(thing, style) for style, thing in pairs]
            return Findings([one for one, _ in pairs], [""] * len(pairs), beside=[other for _, other in pairs])
        return Findings([""] * len(files), [""] * len(files))

    def clip_scores(self, files: Sequence[Path], prompts: Sequence[str]) -> list[float]:
        """CLIPScore of each image with its prompt; nothing where it is not asked for."""
        if not self.judging.clip_score or self.clip is None:
            return []
        from .judges.clip import ClipScore

        return ClipScore(self.clip).measure(files, prompts)

    def distances(self, files: Mapping[str, Sequence[Path]]) -> dict[str, float]:
        """FID of each method's images; nothing where it is not asked for. Raises: BenchError without references."""
        if not self.judging.fid:
            return {}
        from .judges.fid import Fid

        if self.judging.fid == BASE_IMAGES:
            references = list(files.get(BASE, ()))
        else:
            references = sorted(path for path in Path(self.judging.fid).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not references:
            raise BenchError(f"there are no images in {self.judging.fid!r}; give a folder of .png or .jpg with --fid")
        fid = Fid(self.judging.fid_weights or self._network())
        others = {method: own for method, own in files.items() if list(own) != references}
        return {method: fid.measure(own, references) for method, own in others.items()}

    def _network(self) -> nn.Module:
        from .judges.clip import ClipNetwork

        if self.clip is None:
            raise BenchError("FID needs a feature network; give --fid-weights or --clip")
        return ClipNetwork(self.clip)
