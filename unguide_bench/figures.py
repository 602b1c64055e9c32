"""The report's images: plots as SVG, grids as PNG. Shapes and words, not colours alone, tell things apart.

Needs matplotlib (the extra `bench`). It knows scores and judged images, not how they were generated.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .scores import BASE, OTHER, JudgedImage, Score

INK, FAINT, PAPER, ACCENT, COOL = "#1f2328", "#6e7781", "#ffffff", "#b3261e", "#1a5fb4"
MARKERS = "osD^v<>PX*d"
"""An odd number of them: each comes hollow once and full once before one comes again."""
COST_TICKS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 10)


def cost_plot(scores: Mapping[str, Score], reference: float | None = None) -> str:
    """Return H_o of every method against its model evaluations relative to base's, as SVG.

    Args:
        reference: a published figure to show as a line, None for none.
    """
    figure, axes = _axes(8.2, 4.6)
    base = scores[BASE].evaluations
    for number, (method, score) in enumerate(scores.items()):
        around = [[score.h_o.value - score.h_o.low], [score.h_o.high - score.h_o.value]]
        mine = method.startswith("UnGuide")
        axes.errorbar(
            score.evaluations / base,
            score.h_o.value,
            yerr=around,
            fmt=MARKERS[number % len(MARKERS)],
            color=ACCENT if mine else INK,
            markerfacecolor=(ACCENT if mine else INK) if number % 2 else "none",
            markersize=8,
            capsize=3,
            label=method,
        )
    if reference is not None:
        axes.axhline(reference, color=FAINT, linestyle="--", linewidth=1)
        axes.annotate(f"the paper, SD 1.4: {reference:g}", (1, reference), (4, 4), _X, "offset points", color=FAINT)
    axes.set_xscale("log")
    axes.set_xticks([tick for tick in COST_TICKS if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]])
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.minorticks_off()
    axes.set_xlabel("model evaluations per image, relative to plain sampling")
    axes.set_ylabel("H_o, percent (higher is better)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    return _svg(figure)


_X = "axes fraction", "data"


def score_plot(images: Sequence[JudgedImage]) -> str:
    """Return how a gate's scores, relative to their thresholds, spread over images, as SVG."""
    figure, axes = _axes(8.2, 2.8)
    known = [p for p in images if p.score is not None and p.threshold]
    within = [max(p.score / p.threshold, 1e-3) for p in known if p.kind != OTHER]  # type: ignore[operator]
    without = [max(p.score / p.threshold, 1e-3) for p in known if p.kind == OTHER]  # type: ignore[operator]
    edges = np.geomspace(min(within + without) * 0.9, max(within + without) * 1.1, 60)
    axes.hist(without, edges, color=COOL, alpha=0.55, label=f"other classes ({len(without)})")
    axes.hist(within, edges, histtype="step", hatch="////", color=ACCENT, label=f"the concept ({len(within)})")
    axes.axvline(1.0, color=INK, linestyle="--")
    axes.annotate("threshold", (1.0, 1.0), (4, -10), ("data", "axes fraction"), "offset points")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=10)
    axes.set_xlabel("score / threshold")
    axes.set_ylabel("images")
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    return _svg(figure)


def confusion_plot(images: Sequence[JudgedImage], seen: Callable[[JudgedImage], str]) -> str:
    """Return what the judge sees in base's images against what their prompts ask for, as SVG; percent of each row."""
    asked = list(dict.fromkeys(image.label for image in images))
    found = list(dict.fromkeys([*asked, *(seen(image) for image in images)]))
    counts = np.zeros((len(asked), len(found)))
    for image in images:
        counts[asked.index(image.label), found.index(seen(image))] += 1
    shares = 100 * counts / counts.sum(axis=1, keepdims=True)
    figure, axes = _axes(6.4, 5.0)
    axes.imshow(shares, cmap="Greys", vmin=0, vmax=130, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if share > 0:
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=PAPER if share > 70 else INK)
    axes.set_xticks(range(len(found)), found, rotation=45, ha="right")
    axes.set_yticks(range(len(asked)), asked)
    axes.set_xlabel("the judge sees")
    axes.set_ylabel("the prompt asks for")
    return _svg(figure)


def grid(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str], zoom: int = 1) -> bytes:
    """Return images in a table, as PNG: one row per method, one column per prompt.

    Args:
        rows: by method, images by prompt, uint8 [H, W, 3].
        zoom: how many times larger than they are images are shown.
    """
    height, width, _ = next(iter(next(iter(rows.values())).values())).shape
    width, height, left, head, gap = width * zoom, height * zoom, 190, 34, 3
    size = (left + len(columns) * (width + gap), head + len(rows) * (height + gap))
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, prompt in enumerate(columns):
        words = _wrapped(draw, prompt, width, font)
        draw.multiline_text((left + number * (width + gap), 0), words, INK, font, spacing=0)
    for row, (method, images) in enumerate(rows.items()):
        top = head + row * (height + gap)
        draw.text((4, top + height // 2 - 7), method, INK, font)
        for number, prompt in enumerate(columns):
            image = Image.fromarray(images[prompt]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (left + number * (width + gap), top))
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def _wrapped(draw: ImageDraw.ImageDraw, text: str, width: int, font: Any) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if draw.textlength(longer, font) <= width else [*lines, word]
    return "\n".join(line for line in lines if line)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "unguide", "text.color": INK})
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
