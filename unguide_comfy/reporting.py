"""What a run did, for people: JSON and a picture of the probe's statistics, drawn with Pillow."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..unguide_core.probe import Decision, Statistic
from .gating import Outcome, RunReport

WIDTH, ROW, MARGIN, LABELS = 720, 64, 16, 170
# legible on light and dark canvases: a light card with dark ink; shapes, not colours, tell the series apart
PAPER, INK, FAINT, ACCENT = "#f7f7f5", "#1f2328", "#9aa0a6", "#b3261e"
LEGEND = "circle: prompt   square: neutral prompt   triangle: the concept's own prompt   dashed: threshold"


def report_json(report: RunReport) -> str:
    """The report as JSON: one entry per erasure LoRA, evaluations per latent, seconds."""
    content = {
        "erasure": [_outcome(outcome) for outcome in report.outcomes],
        "unet_evaluations": report.evaluations,
        "unet_evaluations_total": sum(report.evaluations.values()),
        "seconds": round(report.seconds, 3),
    }
    return json.dumps(content, indent=2)


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "erasure_lora": outcome.lora,
        "concept": outcome.concept,
        "mode": outcome.mode,
        "weight": min(outcome.weights),
        "decision": None if outcome.decision is None else json.loads(outcome.decision.to_json()),
        "samples": [
            {"detected": decision.detected, "score": decision.score, "weight": decision.weight}
            for decision in outcome.decisions
        ],
    }


def report_plot(report: RunReport) -> torch.Tensor:
    """Every statistic of every decision against its threshold, as a host IMAGE, [1, H, W, 3] in 0..1."""
    blocks = [(outcome, outcome.decision.statistics if outcome.decision else ()) for outcome in report.outcomes]
    height = MARGIN * 3 + sum(28 + ROW * max(1, len(statistics)) for _, statistics in blocks)
    image = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(image)
    y = MARGIN
    for outcome, statistics in blocks:
        draw.text((MARGIN, y), _headline(outcome, outcome.decision), INK, _font(15))
        y += 28
        for statistic in statistics:
            _draw_statistic(draw, statistic, y)
            y += ROW
        if not statistics:
            draw.text((MARGIN, y), "no probe: the weight was given", FAINT, _font(13))
            y += ROW
    draw.text((MARGIN, height - MARGIN - 12), LEGEND, INK, _font(12))
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255.0)[None]


def _headline(outcome: Outcome, decision: Decision | None) -> str:
    what = outcome.concept or outcome.lora
    weights = ", ".join(f"{weight:g}" for weight in outcome.weights)
    if decision is None:
        return f"{what}: no decision; weight {weights}"
    return f"{what}: {'FOUND' if decision.detected else 'not found'}, by {decision.statistic}; weight {weights}"


def _draw_statistic(draw: ImageDraw.ImageDraw, statistic: Statistic, top: int) -> None:
    """One row: the axis, the threshold, a mark per repeat; influences in units of what they are compared with."""
    unit = _unit(statistic)
    series = {
        "circle": [value / unit for value in statistic.prompt],
        "square": [value / unit for value in statistic.neutral],
        "triangle": [value / unit for value in statistic.concept],
    }
    values = [0.0, 1.1, statistic.threshold, *(value for marks in series.values() for value in marks)]
    low, high = min(values), max(values) * 1.05
    left, right, middle = LABELS, WIDTH - MARGIN, top + ROW // 2

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    draw.text((MARGIN, top + 8), statistic.name, INK, _font(14))
    verdict = "found" if statistic.detected else "not found"
    score = f"{statistic.score:.3f}" if abs(statistic.score) < 1e6 else "very large"
    draw.text((MARGIN, top + 28), f"{score}, {verdict}", INK, _font(13))
    draw.line((left, middle, right, middle), FAINT)
    for tick in sorted({0.0, 1.0}):
        draw.line((place(tick), middle - 4, place(tick), middle + 4), FAINT)
        draw.text((place(tick), middle + 16), f"{tick:g}", FAINT, _font(11), anchor="mm")
    for y in range(top + 8, top + ROW - 12, 7):
        draw.line((place(statistic.threshold), y, place(statistic.threshold), y + 4), ACCENT, 2)
    for shape, marks in series.items():
        for value in marks:
            _mark(draw, shape, place(value), middle)


def _unit(statistic: Statistic) -> float:
    """What the statistic's values are divided by, so that its score is on the same axis as its threshold."""
    compared = {"influence": statistic.concept, "paper": statistic.neutral}.get(statistic.name, ())
    return (sum(compared) / len(compared) if compared else 1.0) or 1.0


def _mark(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, size: float = 6) -> None:
    box = (x - size, y - size, x + size, y + size)
    if shape == "circle":
        draw.ellipse(box, fill=INK)
    elif shape == "square":
        draw.rectangle(box, outline=INK, width=2)
    else:
        draw.polygon([(x - size, y + size), (x + size, y + size), (x, y - size)], outline=INK, width=2)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
