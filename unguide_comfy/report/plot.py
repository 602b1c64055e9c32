"""A plot of what a run's gates measured: every statistic against its threshold, and where the adapter acts.

It is read on a node, so it is narrow and its letters are large. Dark ink on a light card reads on light and dark
canvases; every mark is named in words, and colour alone never tells marks apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ...unguide_core.probe import Statistic
from .records import Verdict

WIDTH, MARGIN, HEAD, ROW = 520, 14, 36, 116
MAP, CAPTION = 104, 20
PAPER, INK, FAINT, SHADE, ACCENT, ZONE = "#f7f7f5", "#1f2328", "#59636e", "#d0d7de", "#b3261e", "#fbe9e7"
MEANINGS = {
    "influence": "what the LoRA changes",
    "alignment": "which way the prompt pulls",
    "paper": "what the LoRA changes",
    "text": "what the LoRA reads in the prompt",
    "text norm": "what the LoRA reads in the prompt",
}
EMPTY = "empty prompt"


def report_plot(verdicts: Sequence[Verdict]) -> torch.Tensor:
    """Return every statistic of every leading decision against its threshold, as an IMAGE, [1, H, W, 3] in 0..1."""
    heights = [HEAD + max(ROW * max(1, len(_statistics(verdict))), _map_height(verdict)) for verdict in verdicts]
    image = Image.new("RGB", (WIDTH, MARGIN * 2 + sum(heights)), PAPER)
    draw = ImageDraw.Draw(image)
    top = MARGIN
    for verdict, height in zip(verdicts, heights, strict=True):
        _draw_verdict(image, draw, verdict, top)
        top += height
    return as_image(image)


def loss_curve(losses: Sequence[float], iterations: int, side: int) -> Image.Image:
    """Return a square plot of the loss by iteration, from 0 to its highest value.

    Args:
        losses: of the iterations so far.
        iterations: of the whole training.
        side: in pixels.
    """
    image = Image.new("RGB", (side, side), PAPER)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = MARGIN, 40, side - MARGIN, side - 28
    highest = max(losses, default=0.0) or 1.0
    draw.text((left, 8), f"loss {losses[-1]:.4f}" if losses else "loss", INK, _font(18))
    draw.line((left, bottom, right, bottom), FAINT)
    draw.text((right, bottom + 14), f"{len(losses)} of {iterations}", FAINT, _font(13), anchor="rm")
    draw.text((right, top), f"highest {highest:.4f}", FAINT, _font(13), anchor="rm")
    step = (right - left) / max(1, iterations - 1)
    points = [(left + step * i, bottom - (bottom - top) * loss / highest) for i, loss in enumerate(losses)]
    if len(points) > 1:
        draw.line(points, ACCENT, 2)
    return image


def as_image(plot: Image.Image) -> torch.Tensor:
    """Return a plot as an IMAGE, [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(plot.convert("RGB")).astype(np.float32) / 255.0)[None]


def _draw_verdict(image: Image.Image, draw: ImageDraw.ImageDraw, verdict: Verdict, top: int) -> None:
    draw.text((MARGIN, top), _headline(verdict), INK, _font(20))
    found = _map(verdict)
    right = WIDTH - MARGIN - (0 if found is None else MAP + 2 * MARGIN)
    statistics = _statistics(verdict)
    for number, statistic in enumerate(statistics):
        _draw_statistic(draw, statistic, verdict.word, top + HEAD + ROW * number, right)
    if not statistics:
        draw.text((MARGIN, top + HEAD), "nothing was measured: the weight was given", FAINT, _font(16))
    if found is not None:
        _draw_map(image, draw, found, top + HEAD)


def _statistics(verdict: Verdict) -> tuple[Statistic, ...]:
    return verdict.decision.statistics if verdict.decision is not None else ()


def _headline(verdict: Verdict) -> str:
    """The outcome, and when."""
    decision = verdict.decision
    if decision is None:
        return f"'{verdict.word}': no decision, weight {min(verdict.weights):g}"
    found = "detected" if decision.detected else "not detected"
    return f"'{verdict.word}' {found}" + ("" if decision.step is None else f" at step {decision.step + 1}")


def _draw_statistic(draw: ImageDraw.ImageDraw, statistic: Statistic, word: str, top: int, right: int) -> None:
    """One row: the axis, the threshold and where detection begins, the prompt above the axis, the others below it."""
    above, below = _marks(statistic, word)
    named = {"this prompt": above, **below}
    values = [0.0, 1.15, statistic.threshold, *(value for marks in named.values() for value in marks)]
    low, high = min(values), max(values) * 1.05
    left, middle = MARGIN, top + 66

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    score = f"{statistic.score:.2f}" if abs(statistic.score) < 1e6 else "very large"
    draw.text((left, top), f"{statistic.name} {score}: {MEANINGS.get(statistic.name, '')}".rstrip(": "), INK, _font(15))
    limit = place(statistic.threshold)
    draw.rectangle((limit, middle - 26, right, middle + 8), fill=ZONE)
    draw.line((left, middle, right, middle), FAINT)
    for y in range(middle - 26, middle + 8, 8):
        draw.line((limit, y, limit, y + 4), ACCENT, 2)
    _label(draw, f"detected from {statistic.threshold:.2f}", limit, middle - 34, right, ACCENT)
    for name, marks in named.items():
        if len(marks) > 1:
            draw.rectangle((place(min(marks)), middle - 7, place(max(marks)), middle + 7), fill=SHADE)
        for value in marks:
            _mark(draw, name, place(value), middle)
        if marks:
            height = middle - 15 if name == "this prompt" else middle + (18 if name == EMPTY else 34)
            _label(draw, name, place(sum(marks) / len(marks)), height, right, INK)


def _marks(statistic: Statistic, word: str) -> tuple[list[float], dict[str, list[float]]]:
    """The prompt's values and those that it is compared with by their names, on the axis of the score.

    An influence is divided by what it is compared with. An alignment of 0 is the empty prompt's, and 1 the concept's.
    """
    compared = {"influence": statistic.concept, "paper": statistic.neutral}.get(statistic.name, ())
    unit = (sum(compared) / len(compared) if compared else 1.0) or 1.0
    neutral, concept = [value / unit for value in statistic.neutral], [value / unit for value in statistic.concept]
    if statistic.name == "alignment":
        neutral, concept = [0.0], [1.0]
    return [value / unit for value in statistic.prompt], {EMPTY: neutral, f"'{word}' itself": concept}


def _label(draw: ImageDraw.ImageDraw, text: str, x: float, y: float, right: int, ink: str) -> None:
    """A text centred at a place on the axis, kept inside the card."""
    half = draw.textlength(text, _font(13)) / 2
    draw.text((min(max(x, MARGIN + half), right - half), y), text, ink, _font(13), anchor="mm")


def _mark(draw: ImageDraw.ImageDraw, name: str, x: float, y: float, size: float = 6) -> None:
    """A filled circle for the prompt, a square for the empty one, a triangle for the concept's own."""
    box = (x - size, y - size, x + size, y + size)
    if name == "this prompt":
        draw.ellipse(box, fill=INK)
    elif name == EMPTY:
        draw.rectangle(box, outline=INK, width=2)
    else:
        draw.polygon([(x - size, y + size), (x + size, y + size), (x, y - size)], outline=INK, width=2)


def _map(verdict: Verdict) -> torch.Tensor | None:
    """The map of the decision that says most."""
    return None if verdict.decision is None else verdict.decision.influence_map


def _map_height(verdict: Verdict) -> int:
    return 0 if _map(verdict) is None else MAP + 2 * CAPTION


def _draw_map(image: Image.Image, draw: ImageDraw.ImageDraw, found: torch.Tensor, top: int) -> None:
    """Dark where the adapter acts, with its highest value in words."""
    left, (height, width) = WIDTH - MARGIN - MAP, found.shape
    scale = MAP / max(height, width)
    darkest = max(1.0, float(found.max()))
    shades = (255.0 * (1.0 - found.clamp(min=0.0) / darkest)).round().to(torch.uint8).numpy()
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    draw.text((left, top), "LoRA acts here", INK, _font(13))
    image.paste(Image.fromarray(shades, "L").resize(size, Image.Resampling.NEAREST), (left, top + CAPTION))
    draw.rectangle((left, top + CAPTION, left + size[0] - 1, top + CAPTION + size[1] - 1), outline=INK)
    draw.text((left, top + CAPTION + size[1] + 4), f"highest {float(found.max()):.2f}", INK, _font(13))


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
