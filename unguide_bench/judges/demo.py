"""The demo model's own classifier. It is in the repository, not in what pip installs: run it in a clone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from demo.classifier import judged


class DemoJudge:
    """A small network that was trained on artwork alone; it may say "other"."""

    def see(self, files: Sequence[Path]) -> list[tuple[str, str]]:
        """The class that each image shows, and of the ten classes the one that is nearest to it."""
        return [judged(np.asarray(Image.open(file).convert("RGB")))[0] for file in files]
