"""The report of a benchmark: one self-contained HTML page and a Markdown summary.

Needs matplotlib and Jinja2 (the extra `bench`). It knows judged pictures, not how they were drawn.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .figures import confusion_plot, cost_plot, grid, score_plot
from .scores import BASE, ERASED, OTHER, SYNONYM, Interval, Picture, Score, means_of, scores_of

PAPER_H_O = 94.77
"""UnGuide on SD 1.4, mean over ten CIFAR classes (arXiv 2508.05755, Table 1)."""
HEADS = (
    ("Acc_e", "pictures of the erased concept, asked for by name; lower is better"),
    ("Acc_s", "pictures of the nine others; higher is better"),
    ("Acc_g", "pictures of the erased concept, asked for by synonyms; lower is better"),
    ("H_o", "harmonic mean of 100 - Acc_e, Acc_s and 100 - Acc_g; higher is better"),
    ("found", "share of the concept's pictures that the gate finds"),
    ("false alarms", "share of the other pictures that the gate takes for the concept"),
    ("others identical", "other pictures that are the base model's, bit for bit"),
    ("others differ by", "mean (largest) difference of the other pictures' values to the base model's, 0 to 255"),
    ("evaluations", "UNet evaluations an image, relative to the base model"),
    ("time", "seconds an image, relative to the base model, drawn by itself"),
)


@dataclass(frozen=True)
class Report:
    """What a report shows.

    Args:
        pictures: judged, of every method; base's among them.
        attacks: judged, their kind is the attack.
        agreement: how far what drew the pictures is from the shipped model, by name.
        grids: the pictures of a concept and method by prompt, uint8 [H, W, 3]; None for no grids.
    """

    pictures: Sequence[Picture]
    attacks: Sequence[Picture] = ()
    agreement: Mapping[str, float] = field(default_factory=dict)
    grids: Callable[[str, str], Mapping[str, Any]] | None = None
    title: str = "Erasure benchmark"


def write_report(report: Report, folder: Path) -> str:
    """Writes `report.html` and `summary.md` into the folder; returns the summary."""
    summary = summary_of(report)
    (folder / "report.html").write_text(html_of(report), encoding="utf-8")
    (folder / "summary.md").write_text(f"{summary}\n", encoding="utf-8")
    return summary


def summary_of(report: Report) -> str:
    """The means over concepts, and the attacks, as Markdown tables."""
    means = means_of(report.pictures)
    lines = _markdown(("method", *(head for head, _ in HEADS)), [(name, *_cells(means, name)) for name in means])
    concepts = {picture.concept for picture in report.pictures}
    seeds = {picture.seed for picture in report.pictures}
    said = (
        f"Percent, means over {len(concepts)} concepts; {len(seeds)} seeds a prompt, "
        f"{len(report.pictures)} judged pictures; in brackets 95 % intervals over seeds."
    )
    parts = [said, lines]
    closest = means_of(_closest(report.pictures))
    if any(picture.closest for picture in report.pictures):
        named = ", ".join(f"{name} {closest[name].h_o.value:.1f}" for name in closest)
        parts.append(f"H_o where the judge must name one of the classes, and may not see none of them: {named}.")
    if report.attacks:
        attacked = attack_table(report.attacks)
        parts += ["### Attacks", "Percent of the pictures that still show the concept (found by the gate):"]
        parts.append(_markdown(*attacked))
    return "\n\n".join(parts)


def attack_table(pictures: Sequence[Picture]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows: for each attack the share of pictures that show the concept, by method."""
    methods = list(dict.fromkeys(picture.method for picture in pictures))
    rows = []
    for attack in dict.fromkeys(picture.kind for picture in pictures):
        cells = []
        for method in methods:
            own = [picture for picture in pictures if picture.kind == attack and picture.method == method]
            shown = 100 * sum(picture.seen == picture.label for picture in own) / len(own)
            gated = [bool(picture.detected) for picture in own if picture.detected is not None]
            found = f" ({100 * sum(gated) / len(gated):.0f})" if gated else ""
            cells.append(f"{shown:.0f}{found}")
        rows.append((attack, *cells))
    return ("attack", *methods), rows


def html_of(report: Report) -> str:
    """The page; every picture in it."""
    from jinja2 import Environment

    means, each = means_of(report.pictures), scores_of(report.pictures)
    concepts = list(dict.fromkeys(picture.concept for picture in report.pictures))
    gated = {
        name: [picture for picture in report.pictures if picture.method == name]
        for name in means
        if means[name].recall is not None
    }
    grids = {}
    for concept in concepts if report.grids is not None else ():
        assert report.grids is not None
        rows = {name: report.grids(concept, name) for name in means}
        shown = grid(rows, list(next(iter(rows.values()))))
        grids[concept] = base64.b64encode(shown).decode()
    base = [picture for picture in report.pictures if picture.method == BASE and picture.kind != OTHER]
    template = (Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8")
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            report=report,
            heads=HEADS,
            means={name: _cells(means, name) for name in means},
            concepts=concepts,
            each={name: {concept: _cells(each[name], concept, each) for concept in concepts} for name in each},
            cost=cost_plot(means, PAPER_H_O),
            gates={name: score_plot(own) for name, own in gated.items() if any(p.threshold for p in own)},
            confusion=confusion_plot(base, lambda picture: picture.seen),
            grids=grids,
            attacks=attack_table(report.attacks) if report.attacks else None,
            seeds=len({picture.seed for picture in report.pictures}),
            kinds={"erased": ERASED, "synonym": SYNONYM, "other": OTHER},
        )
    )


def _cells(scores: Mapping[str, Score], name: str, each: Mapping[str, Mapping[str, Score]] | None = None) -> list[str]:
    """One score as the table's cells, costs relative to base's."""
    score = scores[name]
    base = each[BASE][name] if each else scores[BASE]
    apart = score.mean_abs_diff_unrelated
    return [
        *(_interval(value) for value in (score.acc_e, score.acc_s, score.acc_g, score.h_o)),
        *("-" if value is None else f"{value:.1f}" for value in (score.recall, score.false_alarms)),
        "-" if score.identical_unrelated is None else f"{score.identical_unrelated:.1f}",
        "-" if apart is None else f"{apart:.1f} ({score.max_abs_diff_unrelated:.0f})",
        f"{score.evaluations / base.evaluations:.2f}x",
        f"{score.seconds / base.seconds:.2f}x" if base.seconds else "-",
    ]


def _interval(found: Interval) -> str:
    if found.low == found.high:
        return f"{found.value:.1f}"
    return f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]"


def _closest(pictures: Sequence[Picture]) -> list[Picture]:
    return [replace(picture, seen=picture.closest or picture.seen) for picture in pictures]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
