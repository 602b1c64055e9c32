"""A picture of what a run's gates measured, drawn with Pillow: every statistic against its threshold, and where.

A light card with dark ink, so that it reads on light and dark canvases; shapes and words, not colours, tell things
apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..unguide_core.probe import Statistic
from .outcomes import Outcome, RunReport

WIDTH, ROW, MARGIN, LABELS, HEAD = 760, 64, 16, 170, 30
MAP, MAP_LEFT = 96, WIDTH - 16 - 96
PAPER, INK, FAINT, SHADE, ACCENT = "#f7f7f5", "#1f2328", "#6e7781", "#d8dee4", "#b3261e"
LEGEND = (
    "circle: prompt   square: neutral prompt   triangle: the concept's own prompt   band: their spread   "
    "dashed: threshold",
    "map: where the erasure LoRA acts on the prompt; 1 (darkest) is as strongly as on the concept's own prompt",
)


def report_plot(report: RunReport) -> torch.Tensor:
    """Every statistic of every leading decision against its threshold, as a host IMAGE, [1, H, W, 3] in 0..1."""
    heights = [HEAD + max(ROW * max(1, len(_statistics(outcome))), _map_height(outcome)) for outcome in report.outcomes]
    image = Image.new("RGB", (WIDTH, MARGIN * 3 + sum(heights) + 16 * len(LEGEND)), PAPER)
    draw = ImageDraw.Draw(image)
    top = MARGIN
    for outcome, height in zip(report.outcomes, heights, strict=True):
        _draw_outcome(image, draw, outcome, top)
        top += height
    for number, line in enumerate(LEGEND):
        draw.text((MARGIN, top + MARGIN + 16 * number), line, INK, _font(12))
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255.0)[None]


def _draw_outcome(image: Image.Image, draw: ImageDraw.ImageDraw, outcome: Outcome, top: int) -> None:
    draw.text((MARGIN, top), _headline(outcome), INK, _font(15))
    found = _map(outcome)
    right = WIDTH - MARGIN if found is None else MAP_LEFT - MARGIN
    statistics = _statistics(outcome)
    for number, statistic in enumerate(statistics):
        _draw_statistic(draw, statistic, top + HEAD + ROW * number, right)
    if not statistics:
        draw.text((MARGIN, top + HEAD), "nothing was measured: the weight was given", FAINT, _font(13))
    if found is not None:
        _draw_map(image, draw, found, top + HEAD)


def _statistics(outcome: Outcome) -> tuple[Statistic, ...]:
    return outcome.decision.statistics if outcome.decision is not None else ()


def _headline(outcome: Outcome) -> str:
    what = outcome.concept or outcome.lora
    weights = ", ".join(f"{weight:g}" for weight in outcome.weights)
    decision = outcome.decision
    if decision is None:
        return f"{what}: no decision; weight {weights}"
    verdict = "FOUND" if decision.detected else "not found"
    when = "" if outcome.step is None else f" at step {outcome.step + 1}"
    return f"{what}: {verdict}{when}, by {decision.statistic}; weight {weights}"


def _draw_statistic(draw: ImageDraw.ImageDraw, statistic: Statistic, top: int, right: int) -> None:
    """One row: the axis, the threshold, a mark per repeat; influences in units of what they are compared with."""
    unit = _unit(statistic)
    series = {
        "circle": [value / unit for value in statistic.prompt],
        "square": [value / unit for value in statistic.neutral],
        "triangle": [value / unit for value in statistic.concept],
    }
    values = [0.0, 1.1, statistic.threshold, *(value for marks in series.values() for value in marks)]
    low, high = min(values), max(values) * 1.05
    left, middle = LABELS, top + ROW // 2

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    draw.text((MARGIN, top + 8), statistic.name, INK, _font(14))
    verdict = "found" if statistic.detected else "not found"
    score = f"{statistic.score:.3f}" if abs(statistic.score) < 1e6 else "very large"
    draw.text((MARGIN, top + 28), f"{score}, {verdict}", INK, _font(13))
    for marks in series.values():
        if len(marks) > 1:
            draw.rectangle((place(min(marks)), middle - 9, place(max(marks)), middle + 9), fill=SHADE)
    draw.line((left, middle, right, middle), FAINT)
    for tick in (0.0, 1.0):
        draw.line((place(tick), middle - 4, place(tick), middle + 4), FAINT)
        draw.text((place(tick), middle + 18), f"{tick:g}", FAINT, _font(12), anchor="mm")
    for y in range(top + 6, top + ROW - 12, 7):
        draw.line((place(statistic.threshold), y, place(statistic.threshold), y + 4), ACCENT, 2)
    draw.text((place(statistic.threshold), top + 2), f"{statistic.threshold:.3g}", ACCENT, _font(11), anchor="mm")
    for shape, marks in series.items():
        for value in marks:
            _mark(draw, shape, place(value), middle)


def _unit(statistic: Statistic) -> float:
    """What the statistic's values are divided by, so that its score is on the same axis as its threshold."""
    compared = {"patch": statistic.concept, "influence": statistic.concept, "paper": statistic.neutral}
    values = compared.get(statistic.name, ())
    return (sum(values) / len(values) if values else 1.0) or 1.0


def _mark(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, size: float = 6) -> None:
    box = (x - size, y - size, x + size, y + size)
    if shape == "circle":
        draw.ellipse(box, fill=INK)
    elif shape == "square":
        draw.rectangle(box, outline=INK, width=2)
    else:
        draw.polygon([(x - size, y + size), (x + size, y + size), (x, y - size)], outline=INK, width=2)


def _map(outcome: Outcome) -> torch.Tensor | None:
    """The map of the decision that says most."""
    if outcome.found is None or outcome.found.maps is None or outcome.decision is None:
        return None
    decisions = list(outcome.found.decisions)
    return outcome.found.maps[decisions.index(outcome.decision)] if outcome.decision in decisions else None


def _map_height(outcome: Outcome) -> int:
    return 0 if _map(outcome) is None else MAP + 24


def _draw_map(image: Image.Image, draw: ImageDraw.ImageDraw, found: torch.Tensor, top: int) -> None:
    """Dark where the adapter acts, with its highest value in words."""
    height, width = found.shape
    scale = MAP / max(height, width)
    shades = (255.0 * (1.0 - found.clamp(0.0, 1.0))).round().to(torch.uint8).numpy()
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image.paste(Image.fromarray(shades, "L").resize(size, Image.Resampling.NEAREST), (MAP_LEFT, top))
    draw.rectangle((MAP_LEFT, top, MAP_LEFT + size[0] - 1, top + size[1] - 1), outline=INK)
    draw.text((MAP_LEFT, top + size[1] + 4), f"map, highest {float(found.max()):.2f}", INK, _font(12))


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
