"""Runs the benchmark: the cells that are left, one process per core, then scores and report."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from demo.captions import CLASSES
from dev.benchmark import cells
from dev.benchmark.agreement import agreement
from dev.benchmark.cells import ATTACKS, Plan
from dev.benchmark.methods import NEGATIVE, REPLACED, SETS, alone, gated, methods
from unguide_bench.report import Report, write_report
from unguide_bench.scores import BASE, JudgedImage, as_json

FIRST_SEED = 500_000
"""Seeds from here on served neither for training nor for calibration, but had a part in choosing two references."""
SEEDS, QUICK_SEEDS = 20, 3
ATTACKED = 4
"""So many of the concepts are attacked: an attack takes longer than all other images of a concept and method."""
QUICK = (BASE, NEGATIVE, REPLACED, alone("selective", 1.0), *(gated(kind) for kind in SETS))
BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python3 dev benchmark")
    made.add_argument("--out", type=Path, help="folder of images and report; what is there is not generated again")
    made.add_argument("--json", type=Path, help="where to write the scores")
    made.add_argument("--markdown", type=Path, help="a document whose table is replaced, such as docs/benchmark.md")
    made.add_argument("--quick", action="store_true", help=f"{QUICK_SEEDS} seeds, {len(QUICK)} methods, no attacks")
    made.add_argument("--seeds", type=int, help=f"images per prompt (default: {SEEDS})")
    made.add_argument("--method", nargs="+", choices=methods(), help="only these, and base")
    made.add_argument("--concept", nargs="+", choices=CLASSES, default=CLASSES, help="erase only these")
    made.add_argument("--jobs", type=int, default=2, help="processes, one core each (default: %(default)s)")
    return made


def main() -> None:
    options = parser().parse_args()
    name = "benchmark_output/quick" if options.quick else "benchmark_output/full"
    seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    plan = Plan(options.out or Path(name), tuple(range(FIRST_SEED, FIRST_SEED + seeds)))
    chosen = [BASE, *(options.method or (QUICK if options.quick else methods()))]
    attacked = [] if options.quick or options.method else list(options.concept)[:ATTACKED]
    try:
        plan.claim()
        images, attacks, agreed = run(plan, list(dict.fromkeys(chosen)), list(options.concept), attacked, options.jobs)
    except ValueError as error:
        sys.exit(f"error: {error}")
    report = Report(
        images=images,
        attacks=attacks,
        agreement=agreed,
        grids=lambda concept, method: cells.first_images(plan, method, concept),
    )
    summary = write_report(report, plan.folder)
    sys.stdout.write(f"{summary}\n\nThe whole report: {plan.folder / 'report.html'}\n")
    if options.json:
        content = {"seeds": seeds, "agreement": agreed, "methods": as_json(images)}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.markdown:
        before, rest = options.markdown.read_text().split(BEGIN)
        options.markdown.write_text(f"{before}{BEGIN}\n\n{summary}\n\n{END}{rest.split(END)[1]}")


def run(
    plan: Plan, chosen: list[str], concepts: list[str], attacked: list[str], jobs: int
) -> tuple[list[JudgedImage], list[JudgedImage], dict[str, float]]:
    """Generate what is not there yet; return the judged images, the attacks', and how wide and narrow model agree."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), cells.start_worker) as pool:
        classes = [klass for klass in plan.concepts if not cells.base_done(plan, klass)]
        _each("the base model", {klass: pool.submit(cells.generate_base, plan, klass) for klass in classes})
        compared = pool.submit(agreement)
        left = [(m, c) for m in chosen for c in concepts if not plan.file(m, c).exists()]
        tasks = {f"{c}: {m}": pool.submit(cells.generate_cell, plan, m, c) for m, c in left}
        waiting = [c for c in attacked if not plan.file(ATTACKS, c).exists()]
        tasks |= {f"{c}: {ATTACKS}": pool.submit(cells.generate_attacks, plan, c) for c in waiting}
        _each("concepts and methods", tasks)
        agreed = compared.result()
        pool.submit(cells.time_methods, plan, chosen, *plan.concepts[:2]).result()
    judged = [image for m in chosen for c in concepts for image in cells.done(plan, m, c)]
    return judged, [image for c in attacked for image in cells.done(plan, ATTACKS, c)], agreed


def _each(what: str, tasks: dict[str, Future[Any]], clock: Callable[[], float] = time.monotonic) -> None:
    """Wait for tasks, and say how far they are; the first failure ends the others."""
    names, started = {task: name for name, task in tasks.items()}, clock()
    try:
        for number, task in enumerate(as_completed(names), start=1):
            task.result()
            left = (clock() - started) * (len(tasks) / number - 1)
            sys.stderr.write(f"{what}: {number} of {len(tasks)}, {left / 60:.0f} min left ({names[task]})\n")
    finally:
        for task in tasks.values():
            task.cancel()


if __name__ == "__main__":
    main()
