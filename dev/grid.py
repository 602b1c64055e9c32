"""Judges the demonstration's images and puts them into a grid: run in the host's python, which has torch and Pillow.

`python -m dev.grid` reads the job as JSON from standard input and prints each image's class probabilities as JSON. It
knows neither the server nor how the images were generated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, MARGIN, BLOCK_GAP = 184, 10, 28, 44
HEADER, CAPTION, VERDICT = 118, 34, 58
PAPER, INK, FAINT, LINE = "#ffffff", "#1f2328", "#6e7781", "#d0d7de"
ERASED, KEPT, FREE = "#b3261e", "#1a7f37", "#57606a"
INTENT = {"erased": ("to be erased", ERASED), "kept": ("to be kept", KEPT), "free": ("your prompt", FREE)}

Entry = Mapping[str, Any]


def main() -> None:
    job = json.load(sys.stdin)
    images = [Image.open(cell["path"]).convert("RGB") for cell in job["images"]]
    probabilities = judged(images)
    draw_grid(job, images, probabilities).save(job["grid"], optimize=True)
    json.dump(probabilities, sys.stdout)


def judged(images: Sequence[Image.Image]) -> list[dict[str, float]]:
    """Return each image's probability of every class, by the demo's own classifier."""
    from demo.classifier import load

    return [{name: round(float(p), 4) for name, p in shares.items()} for shares in load().probabilities(list(images))]


def draw_grid(job: Mapping[str, Any], images: Sequence[Image.Image], probabilities: Sequence[Entry]) -> Image.Image:
    """Return the grid: two blocks of rows side by side, each row one prompt's images in the order of the columns."""
    rows, columns = job["rows"], job["columns"]
    per_block = (len(rows) + 1) // 2
    block = len(columns) * SIDE + (len(columns) - 1) * GAP
    height = HEADER + per_block * (CAPTION + SIDE + VERDICT) + MARGIN // 2
    canvas = Image.new("RGB", (2 * MARGIN + 2 * block + BLOCK_GAP, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN - 8), job["title"], INK, _font(26))
    draw.text((MARGIN, MARGIN + 28), job["subtitle"], FAINT, _font(15))
    for number, row in enumerate(rows):
        left = MARGIN + (number // per_block) * (block + BLOCK_GAP)
        top = HEADER + (number % per_block) * (CAPTION + SIDE + VERDICT)
        if number % per_block == 0:
            _draw_headings(draw, left, columns)
        _draw_caption(draw, left, top, block, row)
        for place, _ in enumerate(columns):
            index = number * len(columns) + place
            x, y = left + place * (SIDE + GAP), top + CAPTION
            canvas.paste(images[index].resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
            draw.rectangle((x - 1, y - 1, x + SIDE, y + SIDE), outline=LINE)
            _draw_verdict(draw, x, y + SIDE, job["images"][index], probabilities[index])
    return canvas


def _draw_headings(draw: ImageDraw.ImageDraw, left: int, columns: Sequence[str]) -> None:
    for place, column in enumerate(columns):
        middle = left + place * (SIDE + GAP) + SIDE // 2
        draw.text((middle, HEADER - 16), column, INK, _font(18), anchor="mm")


def _draw_caption(draw: ImageDraw.ImageDraw, left: int, top: int, width: int, row: Mapping[str, str]) -> None:
    intent, colour = INTENT[row["expected"]]
    draw.text((left, top + CAPTION // 2), _shortened(row["prompt"]), INK, _font(17), anchor="lm")
    draw.text((left + width, top + CAPTION // 2), intent, colour, _font(14), anchor="rm")


def _draw_verdict(draw: ImageDraw.ImageDraw, x: int, y: int, cell: Entry, shares: Mapping[str, float]) -> None:
    """Write under an image what the judge sees in it, and under UnGuide's the gate's decision and score."""
    shown = max(shares, key=lambda name: shares[name])
    middle = x + SIDE // 2
    name = "none of the ten" if shown == "other" else shown
    draw.text((middle, y + 14), f"seen: {name} {shares[shown]:.0%}", FAINT, _font(14), anchor="mm")
    if cell["detected"] is not None:
        outcome, colour = ("detected", ERASED) if cell["detected"] else ("not detected", KEPT)
        score = f"{outcome}, score {cell['score']:.2f}, weight {cell['weight']:g}"
        draw.text((middle, y + 31), score, colour, _font(13), anchor="mm")
    if cell["same_as_base"]:
        draw.text((middle, y + 47), "same as base, bit for bit", KEPT, _font(12), anchor="mm")


def _shortened(text: str, most: int = 52) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


if __name__ == "__main__":
    main()
