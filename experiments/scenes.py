"""Whether what surrounds the object is still there: a judge of scenes, and images along their border.

The demo draws objects in the middle, so the border of an image is its scene. It knows neither methods nor scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from demo.captions import SCENES, placed, words_for

CELLS = 8
"""Along each side of an image; the outer ones are its border."""


def scene_prompts(concept: str) -> dict[str, str]:
    """Return the scenes by prompts that place a concept in them, by its name and synonyms in turn."""
    words = words_for(concept)
    return {placed(words[i % len(words)], scene): scene for i, scene in enumerate(SCENES)}


class SceneJudge:
    """Names the scene of an image from its border: the nearest mean of images of plain scenes.

    Args:
        examples: images by scene, uint8 [B, 64, 64, 3].
    """

    def __init__(self, examples: Mapping[str, Any]):
        self.means = {scene: border(images).mean(0) for scene, images in examples.items()}

    def __call__(self, images: Any) -> list[str]:
        """Return the scene of each image, uint8 [B, 64, 64, 3]."""
        return [
            min(self.means, key=lambda scene: float(((one - self.means[scene]) ** 2).sum())) for one in border(images)
        ]


def border(images: Any) -> Any:
    """Return the mean colours of the cells along each image's border, [B, 28 * 3]."""
    count, size = len(images), images.shape[1] // CELLS
    cells = images.reshape(count, CELLS, size, CELLS, size, 3).mean(axis=(2, 4)) / 255.0
    return cells[:, _edge(CELLS, 1)].reshape(count, -1)


def difference_along_border(one: Any, other: Any) -> float:
    """Return the mean difference of two images' values along their border, 0 to 255; uint8 [64, 64, 3]."""
    apart = np.abs(one.astype(int) - other.astype(int))
    return float(apart[_edge(len(one), len(one) // CELLS)].mean())


def _edge(size: int, width: int) -> Any:
    edge = np.ones((size, size), dtype=bool)
    edge[width:-width, width:-width] = False
    return edge
