"""A plot of what a run's gates measured: every statistic against its threshold, and where the adapter acts.

Dark ink on a light card reads on light and dark canvases; shapes and words, not colours, tell things apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ...unguide_core.probe import Statistic
from .records import Verdict

WIDTH, ROW, MARGIN, LABELS, HEAD = 760, 64, 16, 170, 30
MAP, MAP_LEFT = 96, WIDTH - 16 - 96
PAPER, INK, FAINT, SHADE, ACCENT = "#f7f7f5", "#1f2328", "#6e7781", "#d8dee4", "#b3261e"
LEGEND = (
    "circle: prompt   square: neutral prompt   triangle: the concept's own prompt   band: their spread   "
    "dashed: threshold",
    "map: where the erasure LoRA acts on the prompt, darkest where most; 1 is its mean effect on its own concept",
)


def report_plot(verdicts: Sequence[Verdict]) -> torch.Tensor:
    """Return every statistic of every leading decision against its threshold, as an IMAGE, [1, H, W, 3] in 0..1."""
    heights = [HEAD + max(ROW * max(1, len(_statistics(verdict))), _map_height(verdict)) for verdict in verdicts]
    image = Image.new("RGB", (WIDTH, MARGIN * 3 + sum(heights) + 16 * len(LEGEND)), PAPER)
    draw = ImageDraw.Draw(image)
    top = MARGIN
    for verdict, height in zip(verdicts, heights, strict=True):
        _draw_verdict(image, draw, verdict, top)
        top += height
    for number, line in enumerate(LEGEND):
        draw.text((MARGIN, top + MARGIN + 16 * number), line, INK, _font(12))
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255.0)[None]


def _draw_verdict(image: Image.Image, draw: ImageDraw.ImageDraw, verdict: Verdict, top: int) -> None:
    draw.text((MARGIN, top), _headline(verdict), INK, _font(15))
    found = _map(verdict)
    right = WIDTH - MARGIN if found is None else MAP_LEFT - MARGIN
    statistics = _statistics(verdict)
    for number, statistic in enumerate(statistics):
        _draw_statistic(draw, statistic, top + HEAD + ROW * number, right)
    if not statistics:
        draw.text((MARGIN, top + HEAD), "nothing was measured: the weight was given", FAINT, _font(13))
    if found is not None:
        _draw_map(image, draw, found, top + HEAD)


def _statistics(verdict: Verdict) -> tuple[Statistic, ...]:
    return verdict.decision.statistics if verdict.decision is not None else ()


def _headline(verdict: Verdict) -> str:
    weights = ", ".join(f"{weight:g}" for weight in sorted(set(verdict.weights)))
    decision = verdict.decision
    if decision is None:
        return f"{verdict.concept}: no decision; weight {weights}"
    found = "DETECTED" if decision.detected else "not detected"
    when = "" if decision.step is None else f" at step {decision.step + 1}"
    return f"{verdict.concept}: {found}{when}, by {decision.statistic}; weight {weights}"


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
    verdict = "detected" if statistic.detected else "not detected"
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
    compared = {"influence": statistic.concept, "paper": statistic.neutral}
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


def _map(verdict: Verdict) -> torch.Tensor | None:
    """The map of the decision that says most."""
    return None if verdict.decision is None else verdict.decision.influence_map


def _map_height(verdict: Verdict) -> int:
    return 0 if _map(verdict) is None else MAP + 24


def _draw_map(image: Image.Image, draw: ImageDraw.ImageDraw, found: torch.Tensor, top: int) -> None:
    """Dark where the adapter acts, with its highest value in words."""
    height, width = found.shape
    scale = MAP / max(height, width)
    darkest = max(1.0, float(found.max()))
    shades = (255.0 * (1.0 - found.clamp(min=0.0) / darkest)).round().to(torch.uint8).numpy()
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image.paste(Image.fromarray(shades, "L").resize(size, Image.Resampling.NEAREST), (MAP_LEFT, top))
    draw.rectangle((MAP_LEFT, top, MAP_LEFT + size[0] - 1, top + size[1] - 1), outline=INK)
    draw.text((MAP_LEFT, top + size[1] + 4), f"map, highest {float(found.max()):.2f}", INK, _font(12))


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
