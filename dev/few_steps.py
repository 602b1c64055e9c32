"""What the trajectory stage does in schedules of few and of many steps, measured in a real ComfyUI.

A gate decides at the step nearest to the probe's noise level. Few steps make that step late, and erasing from there on
may leave the concept's silhouette; `on_detection` says what follows. For each number of steps and each scheduler, ten
concepts are asked for by name and by synonym, and unrelated prompts beside them, with the shipped selective adapters
and the nodes' default settings. Run by `python3 dev few-steps`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from demo.captions import CLASSES, SCENES, photo, words_for
from dev.benchmark.cells import start_worker
from dev.benchmark.studio import Generated, Studio, judged, studio
from dev.pack import pack_module

STEPS = (1, 2, 3, 4, 6, 8, 10, 20, 30)
SCHEDULERS = ("normal", "karras")
CONTINUE, RESTART, AUTOMATIC = ON_DETECTION = ("continue", "restart", "automatic")
FIRST_SEED, SEEDS = 800_000, 4
"""Seeds from here on serve no other measurement, no training and no calibration."""


@dataclass(frozen=True)
class Row:
    """One concept in one schedule; percent of images, and model evaluations (NFE) relative to plain sampling.

    Args:
        base: of the concept's name that show it, without a gate.
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
    """

    def __init__(self, studio_: Studio, scheduler: str, steps: int, seeds: Sequence[int]):
        self.studio, self.seeds = studio_, seeds
        self.options: dict[str, Any] = {"scheduler": scheduler, "steps": steps}

    def plain(self, prompts: Sequence[str]) -> Generated:
        """Return the base model's images."""
        positive, seeds, noise = self._batch(prompts)
        return self.studio.generate(self.studio.model, positive, seeds, noise=noise, **self.options)

    def gated(self, lora: Any, prompts: Sequence[str], on_detection: str) -> Generated:
        """Return the images behind a gate with default settings."""
        positive, seeds, noise = self._batch(prompts)
        settings = pack_module("unguide_comfy.probe.settings").Settings(
            on_detection=on_detection, statistic="influence"
        )
        return self.studio.guided(lora, positive, seeds, settings, noise=noise, **self.options)

    def shown(self, generated: Generated, concept: str) -> float:
        """Return the percentage of images that show a concept."""
        return percent([seen == concept for seen, _ in judged(self.studio.images(generated.latents))])

    def _batch(self, prompts: Sequence[str]) -> tuple[Any, list[int], Any]:
        """A CONDITIONING of all prompts, the seeds of all images, and their noise."""
        import torch

        texts = [self.studio.encode(prompt)[0][0].expand(len(self.seeds), -1, -1) for prompt in prompts]
        seeds = list(self.seeds) * len(prompts)
        return [[torch.cat(texts), {}]], seeds, self.studio.noise(self.seeds).repeat(len(prompts), 1, 1, 1)


def measured(concept: str, schedulers: Sequence[str], steps: Sequence[int], seeds: Sequence[int]) -> list[Row]:
    """Return a concept's rows for every schedule."""
    import torch

    with torch.inference_mode():
        schedules = [Schedule(studio(), scheduler, count, seeds) for scheduler in schedulers for count in steps]
        return [row(schedule, concept) for schedule in schedules]


def row(schedule: Schedule, concept: str) -> Row:
    """Return what one schedule does with one concept."""
    lora = schedule.studio.lora("selective", concept)
    own, others = [photo(word) for word in words_for(concept)], unrelated(concept)
    runs = dict(of_each(schedule, lora, own))
    plain = schedule.plain(others)
    kept = schedule.gated(lora, others, AUTOMATIC)
    pairs = zip(kept.latents, plain.latents, strict=True)
    return Row(
        **schedule.options,
        concept=concept,
        base=schedule.shown(schedule.plain(own[:1]), concept),
        shown={name: schedule.shown(run, concept) for name, run in runs.items()},
        detected=percent(runs[AUTOMATIC].detected),
        false_positives=percent(kept.detected),
        identical=percent([mine.numpy().tobytes() == base.numpy().tobytes() for mine, base in pairs]),
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


def percent(of: Sequence[bool]) -> float:
    """Return how many are true, in percent."""
    return 100.0 * sum(of) / len(of)


# ---------------------------------------------------------------- table


def tables(rows: Sequence[Row]) -> str:
    """Return a table per scheduler, means over concepts, in Markdown."""
    heads = (
        "steps",
        "base shows it",
        f"still shown: {' / '.join(ON_DETECTION)}",
        "detected",
        "false positives",
        "unrelated identical",
        f"NFE, detected: {' / '.join(ON_DETECTION)}",
        "NFE, unrelated",
    )
    parts = []
    for scheduler in dict.fromkeys(row.scheduler for row in rows):
        lines = [_line(*heads), "|---" * len(heads) + "|"]
        for steps in dict.fromkeys(row.steps for row in rows):
            lines.append(_line(*_cells([row for row in rows if (row.scheduler, row.steps) == (scheduler, steps)])))
        parts.append(f"Scheduler `{scheduler}`:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _cells(rows: Sequence[Row]) -> list[str]:
    shown = [f"{fmean(row.shown[name] for row in rows):.1f}" for name in ON_DETECTION]
    ratios = [f"{fmean(row.ratio[name] for row in rows):.2f}" for name in ON_DETECTION]
    shares = [
        f"{fmean(getattr(row, name) for row in rows):.1f}" for name in ("detected", "false_positives", "identical")
    ]
    base, unrelated_ratio = fmean(row.base for row in rows), fmean(row.ratio_unrelated for row in rows)
    return [
        str(rows[0].steps),
        f"{base:.1f}",
        " / ".join(shown),
        *shares,
        " / ".join(ratios),
        f"{unrelated_ratio:.2f}",
    ]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 dev few-steps")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="images per prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="the first image's (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="default: %(default)s")
    parser.add_argument("--scheduler", nargs="+", default=SCHEDULERS, help="default: %(default)s")
    parser.add_argument("--concept", nargs="+", choices=CLASSES, default=CLASSES, help="default: all ten")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one core each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write every concept's figures")
    options = parser.parse_args()
    seeds, began = range(options.seed, options.seed + options.seeds), time.monotonic()
    rows: list[Row] = []
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), start_worker) as pool:
        tasks = [pool.submit(measured, each, options.scheduler, options.steps, seeds) for each in options.concept]
        for number, task in enumerate(tasks, start=1):
            rows += task.result()
            left = (time.monotonic() - began) * (len(tasks) / number - 1)
            sys.stderr.write(f"concept {number} of {len(tasks)}, {left / 60:.0f} min left\n")
    if options.json:
        content = {"seeds": list(seeds), "rows": [asdict(one) for one in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    count = len(seeds) * len(options.concept)
    sys.stdout.write(
        f"Percent of images, means over {len(options.concept)} concepts, {len(seeds)} images per prompt from seed "
        f"{options.seed} on. Per cell: {count} images for the base model, {4 * count} with the concept, {2 * count} "
        f"unrelated. NFE relative to plain sampling.\n\n{tables(rows)}\n"
    )


if __name__ == "__main__":
    main()
