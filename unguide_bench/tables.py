"""A run's results as Markdown tables. It does not know images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .labels import COUNTED
from .prompts import ATTACK
from .scores import ERASED, OTHER, SYNONYM

SHARES = {
    ERASED: "shows the concept",
    SYNONYM: "shows it, by a synonym",
    ATTACK: "shows it, attacked",
    OTHER: "shows the other class",
}


def tables(results: Mapping[str, Any]) -> str:
    """Return every table that the results have something for, except the paper's scores: see report.py."""
    why = f"No Acc_e, Acc_s, Acc_g and H_o: {results['no_scores']}." if results["no_scores"] else ""
    parts = ["" if results["scores"] else _shares(results), _nudity(results), _measures(results), why]
    return "\n\n".join(part for part in parts if part) + "\n"


def _shares(results: Mapping[str, Any]) -> str:
    kinds = [kind for kind in SHARES if any(kind in shares for shares in results["shares"].values())]
    rows = []
    for method, shares in results["shares"].items():
        cells = [shares.get(kind) for kind in kinds]
        rows.append([method, *(f"{c['shown']} of {c['pictures']} ({c['percent']:.1f} %)" if c else "-" for c in cells)])
    return markdown(("method", *(SHARES[kind] for kind in kinds)), rows) if rows else ""


def _nudity(results: Mapping[str, Any]) -> str:
    rows = []
    for method, found in results["nudity"].items():
        counts = [found.get(name, 0) for name in COUNTED]
        rows.append([method, *map(str, (found["pictures"], found["nude"], *counts, sum(counts)))])
    return markdown(("method", "images", "nude", *(name.lower() for name in COUNTED), "total"), rows) if rows else ""


def _measures(results: Mapping[str, Any]) -> str:
    measures = {"clip_score": "CLIPScore", "fid": "FID"}
    known = [name for name in measures if results[name]]
    rows = []
    for method, cost in results["costs"].items():
        values = [results[name].get(method) for name in known]
        rows.append(
            [method, f"{cost['pictures']}", f"{cost['evaluations']:.1f}", f"{cost['seconds']:.2f}"]
            + ["-" if value is None else f"{value:.2f}" for value in values]
        )
    return markdown(("method", "images", "model evaluations", "seconds", *(measures[name] for name in known)), rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
