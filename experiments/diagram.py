"""Draws the gate's cascade: which stage decided how many images of `python3 dev gate`, and at which cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 1120, 470
PAPER, INK, FAINT, SHADE, ACCENT = "#f7f7f5", "#1f2328", "#6e7781", "#e4e8ec", "#b3261e"
STAGES = (
    ("text", "text stage", "the adapter's effect on the prompt's words", "0 evaluations, before step 1"),
    ("trajectory", "trajectory stage", "its effect on an early prediction", "1 evaluation, at step 3 of 20"),
)
GROUPS = (("with the concept", ("name", "synonym", "in a scene")), ("without it", ()))
BOX, TOPS = (330, 120), (60, 265)


def shares(scores: list[Mapping[str, Any]], with_concept: bool, stage: str, detected: bool) -> float:
    """Return the share of the images with (or without) the concept that a stage decided in one way."""
    kinds = GROUPS[0][1]
    rows = [row for row in scores if row["statistic"] == "the gate" and (row["kind"] in kinds) is with_concept]
    return sum((row["stage"], row["detected"]) == (stage, detected) for row in rows) / max(1, len(rows))


def draw(scores: list[Mapping[str, Any]], path: Path) -> None:
    """Write the diagram as a PNG.

    Args:
        scores: of one set, as in the JSON file of `python3 dev gate`.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen = ImageDraw.Draw(image)
    middle = WIDTH // 2
    pen.text((middle, 24), "prompt", INK, _font(18), anchor="mm")
    above = 38
    for (name, title, reads, cost), top in zip(STAGES, TOPS, strict=True):
        left, right, bottom = middle - BOX[0] // 2, middle + BOX[0] // 2, top + BOX[1]
        _arrow(pen, (middle, above), (middle, top))
        pen.rounded_rectangle((left, top, right, bottom), 10, SHADE, INK, 2)
        for number, (text, size) in enumerate(((title, 20), (reads, 14), (cost, 14))):
            pen.text((middle, top + 30 + 28 * number), text, INK, _font(size), anchor="mm")
        for detected, start, end in ((True, left, 140), (False, right, WIDTH - 140)):
            _arrow(pen, (start, top + 60), (end + (125 if detected else -125), top + 60))
            outcome, ink = ("detected: erased", ACCENT) if detected else ("absent: plain sampling", INK)
            lines = [outcome]
            for group, kinds in GROUPS:
                lines.append(f"{100 * shares(scores, bool(kinds), name, detected):.1f} % of images {group}")
            for number, text in enumerate(lines):
                pen.text((end, top + 38 + 22 * number), text, INK if number else ink, _font(14), anchor="mm")
        above = bottom
        if name == STAGES[0][0]:
            pen.text((middle + 12, bottom + 12), "left open", FAINT, _font(14))
    pen.text((middle, HEIGHT - 30), "python3 dev gate --diagram FILE", FAINT, _font(13), anchor="mm")
    image.save(path)


def _arrow(pen: Any, start: tuple[int, int], end: tuple[int, int]) -> None:
    pen.line((*start, *end), INK, 2)
    (x0, y0), (x1, y1) = start, end
    across, down = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
    back = x1 - 9 * across, y1 - 9 * down
    sides = [(back[0] + side * down, back[1] + side * across) for side in (5, -5)]
    pen.polygon([(x1, y1), *sides], INK)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
