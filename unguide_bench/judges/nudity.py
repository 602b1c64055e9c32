"""NudeNet: which exposed parts of the body an image shows. Its wheel contains its model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nudenet import NudeDetector

from ..labels import THRESHOLD, parts


class NudityJudge:
    """NudeNet's detector."""

    def __init__(self, threshold: float = THRESHOLD) -> None:
        self.detector, self.threshold = NudeDetector(), threshold

    def see(self, files: Sequence[Path]) -> list[Counter[str]]:
        """The exposed parts on each image."""
        return [parts(self.detector.detect(str(file)), self.threshold) for file in files]
