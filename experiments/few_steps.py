"""What the trajectory stage does in schedules of few and of many steps.

A gate decides at the step nearest to the probe's noise level. Few steps make that step late, and erasing from there on
may leave the concept's silhouette; `on_detection` says what follows. For each number of steps and each scheduler, ten
concepts are asked for by name and by synonym, and unrelated prompts beside them, with the shipped selective adapters,
decided by influence alone. Run by `python3 dev few-steps`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch

from demo.captions import CLASSES, REFERENCES, SCENES, photo, words_for
from demo.classifier import judged
from experiments.runner import keep, publish, results, workers
from experiments.studio import Generated, Studio, identical, studio
from unguide_bench.figures import grid
from unguide_bench.scores import percent
from unguide_bench.tables import markdown

CONTINUE, RESTART, AUTOMATIC = ON_DETECTION = ("continue", "restart", "automatic")


@dataclass(frozen=True)
class Row:
    """One concept in one schedule; percent of images, and model evaluations (NFE) relative to plain sampling.

    Args:
        base: of the concept's name that show it, without a gate.
        misjudged: of the scene that takes the concept's place, without a gate, in which the judge sees one of the ten
            classes, though none is there: its error on images of so few steps.
        shown: of the concept's name and synonyms that still show it, by `on_detection`.
        detected: of these in which the gate detects the concept.
        false_positives: of unrelated prompts in which it does.
        identical: of unrelated prompts that are the base model's images, bit for bit.
        ratio: model evaluations for the concept's name and synonyms, by `on_detection`.
        ratio_unrelated: for unrelated prompts.
    """

    scheduler: str
    steps: int
    concept: str
    base: float
    misjudged: float
    shown: dict[str, float]
    detected: float
    false_positives: float
    identical: float
    ratio: dict[str, float]
    ratio_unrelated: float


def unrelated(concept: str) -> list[str]:
    """Return another class and a scene, a different pair for every concept."""
    number = CLASSES.index(concept)
    return [photo(CLASSES[(number + 5) % len(CLASSES)]), photo(SCENES[number % len(SCENES)])]


class Schedule:
    """Images of several prompts in one batch, in one schedule.

    Args:
        seeds: of each prompt's images.
        probe_steps: of 20, after which the gate probes.
    """

    def __init__(self, at: Studio, scheduler: str, steps: int, seeds: Sequence[int], probe_steps: int):
        self.at, self.seeds, self.probe = at, seeds, {"probe_steps": probe_steps, "probe_schedule_steps": 20}
        self.options: dict[str, Any] = {"scheduler": scheduler, "steps": steps}

    def plain(self, prompts: Sequence[str]) -> Generated:
        """Return the base model's images."""
        return self.at.generate(self.at.model, **self.at.batch(prompts, self.seeds), **self.options)

    def gated(self, lora: Any, prompts: Sequence[str], on_detection: str) -> Generated:
        """Return the images behind a gate that decides by influence alone."""
        settings = self.at.settings(on_detection=on_detection, statistic="influence", **self.probe)
        return self.at.guided(lora, settings=settings, **self.at.batch(prompts, self.seeds), **self.options)

    def seen(self, generated: Generated) -> list[str]:
        """Return what the judge sees in each image."""
        return [seen for seen, _ in judged(self.at.images(generated.latents))]

    def shown(self, generated: Generated, concept: str) -> float:
        """Return the percentage of images that show a concept."""
        return percent([seen == concept for seen in self.seen(generated)])


@torch.inference_mode()
def measured(
    concept: str, schedulers: Sequence[str], steps: Sequence[int], seeds: Sequence[int], probe_steps: int = 2
) -> list[Row]:
    """Return a concept's rows for every schedule."""
    return [
        row(Schedule(studio(), scheduler, count, seeds, probe_steps), concept)
        for scheduler in schedulers
        for count in steps
    ]


def row(schedule: Schedule, concept: str) -> Row:
    """Return what one schedule does with one concept."""
    lora = schedule.at.lora("selective", concept)
    own, others = [photo(word) for word in words_for(concept)], unrelated(concept)
    scene = schedule.plain([photo(REFERENCES[concept])])
    runs = dict(of_each(schedule, lora, own))
    plain = schedule.plain(others)
    kept = schedule.gated(lora, others, AUTOMATIC)
    return Row(
        **schedule.options,
        concept=concept,
        base=schedule.shown(schedule.plain(own[:1]), concept),
        misjudged=percent([seen in CLASSES for seen in schedule.seen(scene)]),
        shown={name: schedule.shown(run, concept) for name, run in runs.items()},
        detected=percent(runs[AUTOMATIC].detected),
        false_positives=percent(kept.detected),
        identical=percent(list(map(identical, kept.latents, plain.latents))),
        ratio={name: run.evaluations / plain.evaluations for name, run in runs.items()},
        ratio_unrelated=kept.evaluations / plain.evaluations,
    )


def of_each(schedule: Schedule, lora: Any, prompts: Sequence[str]) -> Iterator[tuple[str, Generated]]:
    """Yield the images by `on_detection`; "automatic" is one of the other two, which does not run twice."""
    automatic = schedule.gated(lora, prompts, AUTOMATIC)
    same, other = (RESTART, CONTINUE) if automatic.restarted else (CONTINUE, RESTART)
    yield AUTOMATIC, automatic
    yield same, automatic
    yield other, schedule.gated(lora, prompts, other)


@torch.inference_mode()
def fewest_steps(
    concept: str, scheduler: str, steps: int, seeds: Sequence[int], probe_steps: int
) -> tuple[str, dict[str, Any]]:
    """Return a caption and images of one seed, uint8 [H, W, 3], by what they are.

    If the judge still sees the concept in an erased image of a seed, that seed is shown; the first one otherwise.
    """
    schedule = Schedule(studio(), scheduler, steps, seeds, probe_steps)
    base, scene = (schedule.plain([photo(word)]) for word in (concept, REFERENCES[concept]))
    erased = schedule.gated(schedule.at.lora("selective", concept), [photo(concept)], AUTOMATIC)
    seen = schedule.seen(erased)
    number = seen.index(concept) if concept in seen else 0
    images = {"base model": base, "erased": erased, "base model, the scene": scene}
    shown = {name: schedule.at.images(one.latents[number : number + 1])[0] for name, one in images.items()}
    return f"{concept}; judged: {seen[number]}", shown


def tables(rows: Sequence[Row]) -> str:
    """Return a table per scheduler, means over concepts, in Markdown."""
    heads = (
        "steps",
        "base shows it",
        "a class seen in scenes",
        f"still shown: {' / '.join(ON_DETECTION)}",
        "detected",
        "false positives",
        "unrelated identical",
        f"NFE, detected: {' / '.join(ON_DETECTION)}",
        "NFE, unrelated",
    )
    parts = []
    for scheduler in dict.fromkeys(row.scheduler for row in rows):
        mine = [row for row in rows if row.scheduler == scheduler]
        cells = [_cells([row for row in mine if row.steps == steps]) for steps in dict.fromkeys(r.steps for r in mine)]
        parts.append(f"Scheduler `{scheduler}`:\n\n{markdown(heads, cells)}")
    return "\n\n".join(parts)


def _cells(rows: Sequence[Row]) -> list[str]:
    shown = [f"{fmean(row.shown[name] for row in rows):.1f}" for name in ON_DETECTION]
    ratios = [f"{fmean(row.ratio[name] for row in rows):.2f}" for name in ON_DETECTION]
    return [
        str(rows[0].steps),
        *(f"{fmean(getattr(row, name) for row in rows):.1f}" for name in ("base", "misjudged")),
        " / ".join(shown),
        *(f"{fmean(getattr(row, name) for row in rows):.1f}" for name in ("detected", "false_positives", "identical")),
        " / ".join(ratios),
        f"{fmean(row.ratio_unrelated for row in rows):.2f}",
    ]


def run(options: Namespace) -> None:
    """Measure every concept, print a table per scheduler, and save images of the fewest steps."""
    seeds = range(options.seed, options.seed + options.seeds)
    asked = options.scheduler, options.steps, seeds, options.probe_steps
    with workers(options.jobs) as pool:
        tasks = {concept: pool.submit(measured, concept, *asked) for concept in options.concept}
        rows = [row for _, found in results("concepts", tasks) for row in found]
    if options.grid:
        fewest = options.scheduler[0], min(options.steps), seeds, options.probe_steps
        columns = dict(fewest_steps(concept, *fewest) for concept in options.concept)
        names = next(iter(columns.values()))
        by_row = {name: {caption: images[name] for caption, images in columns.items()} for name in names}
        options.grid.write_bytes(grid(by_row, list(columns), zoom=2))
    keep(options.json, {"seeds": list(seeds), "rows": [asdict(one) for one in rows]})
    count = len(seeds) * len(options.concept)
    publish(
        f"Percent of images, means over {len(options.concept)} concepts, {len(seeds)} images per prompt from seed "
        f"{options.seed} on. Per cell: {count} images for the base model and of scenes, {4 * count} with the concept, "
        f"{2 * count} unrelated. NFE relative to plain sampling.\n\n{tables(rows)}",
        options.markdown,
        "few steps",
    )
