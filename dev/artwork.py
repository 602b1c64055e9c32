"""Draws the registry's icon and banner: shapes in tiles, of which one is forgotten. Needs Pillow alone.

Run by `python3 dev artwork`. The images are under the repository's licence (MIT); the font is Pillow's own.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFont

from dev.workspace import PACK

ICON, BANNER = (400, 400), (1260, 540)
FINER = 4
"""Everything is rendered this much larger and then reduced, for smooth edges."""
GROUND, TILE, TEXT, FAINT = "#14181f", "#222936", "#f2f4f8", "#9aa6b8"
Points = list[tuple[float, float]]
Shape = tuple[str, Callable[[float, float, float], Points]]


def polygon(corners: int, turn: float = 0.0, inner: float = 1.0) -> Callable[[float, float, float], Points]:
    """A regular polygon's corners around a centre, or a star's where `inner` is less than 1."""

    def points(x: float, y: float, radius: float) -> Points:
        count = corners if inner == 1 else 2 * corners
        radii = [radius * (1 if inner == 1 or i % 2 == 0 else inner) for i in range(count)]
        angles = [turn - math.pi / 2 + 2 * math.pi * i / count for i in range(count)]
        return [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]

    return points


SHAPES: tuple[Shape, ...] = (
    ("#f2a541", polygon(90)),
    ("#5ab0f2", polygon(4, math.pi / 4)),
    ("#e8648c", polygon(5, 0.0, 0.5)),
    ("#66c38a", polygon(3)),
)
FORGOTTEN = 2


def tile(image: Image.Image, left: float, top: float, side: float, shape: Shape, forgotten: bool) -> None:
    """Draws a tile with a shape, or with what is left of it: dots that drift apart."""
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((left, top, left + side, top + side), radius=side * 0.16, fill=TILE)
    colour, outline = shape
    x, y, radius = left + side / 2, top + side / 2, side * (0.36 if forgotten else 0.3)
    if not forgotten:
        draw.polygon(outline(x, y + side * 0.02, radius), fill=colour)
        return
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).polygon(outline(x, y + side * 0.02, radius), fill=255)
    places, step = random.Random(7), side * 0.028
    for row in range(-14, 15):
        for column in range(-14, 15):
            at = (x + column * step, y + row * step)
            gone = min(1.0, max(0.0, (column + 8) / 18))  # more is gone to the right
            if mask.getpixel((int(at[0]), int(at[1]))) and places.random() > gone:
                drift = 5 * step * gone
                dx, dy = at[0] + drift * places.random(), at[1] + drift * (places.random() - 0.5)
                size = step * 0.5 * (1 - 0.5 * gone)
                draw.ellipse((dx - size, dy - size, dx + size, dy + size), fill=colour)


def canvas(size: tuple[int, int]) -> Image.Image:
    """An empty image, FINER times as large."""
    return Image.new("RGB", (size[0] * FINER, size[1] * FINER), GROUND)


def icon() -> Image.Image:
    """Four tiles, one forgotten."""
    image = canvas(ICON)
    side, gap = 164 * FINER, 24 * FINER
    for number, shape in enumerate(SHAPES):
        row, column = divmod(number, 2)
        tile(image, gap + column * (side + gap), gap + row * (side + gap), side, shape, number == FORGOTTEN)
    return image.resize(ICON, Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """The name, what it does, and a row of tiles before and after."""
    image = canvas(BANNER)
    draw = ImageDraw.Draw(image)
    left = 70 * FINER
    draw.text((left, 72 * FINER), "UnGuide", fill=TEXT, font=ImageFont.load_default(112 * FINER))
    said = "Make a model forget one concept.\nEvery other image stays the same, bit for bit."
    draw.text((left, 222 * FINER), said, fill=FAINT, font=ImageFont.load_default(30 * FINER), spacing=14 * FINER)
    side, gap = 112 * FINER, 20 * FINER
    for number, shape in enumerate(SHAPES):
        tile(image, left + number * (side + gap), 356 * FINER, side, shape, number == FORGOTTEN)
    big = 380 * FINER
    tile(image, (BANNER[0] - 70) * FINER - big, 80 * FINER, big, SHAPES[FORGOTTEN], True)
    return image.resize(BANNER, Image.Resampling.LANCZOS)


def main() -> None:
    for name, draw in (("icon", icon), ("banner", banner)):
        path = PACK / "docs" / f"{name}.png"
        draw().save(path, optimize=True)
        sys.stdout.write(f"written: {path}\n")


if __name__ == "__main__":
    main()
