"""How well each method erases ten concepts: the cells that are left, then scores and report.

Run by `python3 dev benchmark`. Scores and reports are `unguide_bench`'s.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from demo.captions import CLASSES, photo
from experiments import cells
from experiments.cells import ATTACKS, FEW_STEPS, Plan
from experiments.methods import NEGATIVE, REPLACED, SETS, alone, gate, gated, methods
from experiments.runner import keep, publish, results, workers
from experiments.studio import CLOSED_FORM, PRESET, Studio, studio
from unguide_bench.report import Report, write_report
from unguide_bench.scores import BASE, JudgedImage, as_json, shares_by_kind

FIRST_SEED = 600_000
"""Seeds from here on serve no other measurement, no choice, no training and no calibration."""
SEEDS, QUICK_SEEDS = 5, 3
ATTACKED = 4
"""So many of the concepts are attacked: an attack takes longer than all other images of a concept and method."""
QUICK = (
    *(BASE, NEGATIVE, REPLACED, alone("selective", 1.0)),
    *(gated(kind) for kind in (*SETS, PRESET, CLOSED_FORM)),
)
COMPARED_SEEDS = (1, 2)


def run(options: Namespace) -> None:
    """Generate, judge and score."""
    chosen = options.method or (QUICK if options.quick else methods())
    if unknown := set(chosen) - set(methods()):
        sys.exit(f"error: there is no method {', '.join(sorted(unknown))}; choose from {', '.join(methods())}")
    seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    folder = options.out or Path("benchmark_output", "quick" if options.quick else "full")
    plan = Plan(folder, tuple(range(FIRST_SEED, FIRST_SEED + seeds)))
    attacked = [] if options.quick or options.method else list(options.concept)[:ATTACKED]
    try:
        plan.claim()
        report = measured(
            plan, list(dict.fromkeys([BASE, *chosen])), options.concept, attacked, options.jobs, few=not options.method
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    publish(write_report(report, plan.folder), options.markdown, "benchmark")
    print(f"\nThe whole report: {plan.folder / 'report.html'}")
    content = {"seeds": seeds, "agreement": report.agreement, "methods": as_json(report.images)}
    keep(options.json, {**content, "few_steps": _named(report.few_steps), "attacks": _named(report.attacks)})


def _named(images: Sequence[JudgedImage]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Percent shown and detected, by kind of prompt and method."""
    return {
        kind: {method: {"shown": shown, "detected": detected} for method, (shown, detected) in of_kind.items()}
        for kind, of_kind in shares_by_kind(images).items()
    }


def measured(
    plan: Plan, chosen: Sequence[str], concepts: Sequence[str], attacked: Sequence[str], jobs: int, few: bool = False
) -> Report:
    """Generate what is not there yet, and return everything that was judged.

    Args:
        few: whether images of few steps are part of it.
    """
    trained = few or any(f"({PRESET})" in method for method in chosen)
    with workers(jobs) as pool:
        waiting = [c for c in concepts if trained and not plan.trained(c).exists()]
        for _ in results("training", {c: pool.submit(cells.train, plan, c) for c in waiting}):
            pass
        waiting = [klass for klass in plan.concepts if not cells.base_done(plan, klass)]
        base = {klass: pool.submit(cells.generate_base, plan, klass) for klass in waiting}
        for _ in results("the base model", base):
            pass
        compared = pool.submit(agreement)
        left = [(m, c) for m in chosen for c in concepts if not plan.file(m, c).exists()]
        tasks = {(m, c): pool.submit(cells.generate_cell, plan, m, c) for m, c in left}
        waiting = [c for c in attacked if not plan.file(ATTACKS, c).exists()]
        tasks |= {(ATTACKS, c): pool.submit(cells.generate_attacks, plan, c) for c in waiting}
        waiting = [c for c in concepts if few and not plan.file(FEW_STEPS, c).exists()]
        tasks |= {(FEW_STEPS, c): pool.submit(cells.generate_few_steps, plan, c) for c in waiting}
        for _ in results("methods and concepts", tasks):
            pass
        agreed = compared.result()
        pool.submit(cells.time_methods, plan, chosen, *plan.concepts[:2]).result()

    def done(names: Sequence[str], of: Sequence[str]) -> list[JudgedImage]:
        return [image for name in names for concept in of for image in cells.done(plan, name, concept)]

    return Report(
        images=done(chosen, concepts),
        attacks=done([ATTACKS], attacked),
        few_steps=done([FEW_STEPS], concepts if few else ()),
        agreement=agreed,
        grids=lambda concept, method: cells.first_images(plan, method, concept),
    )


def agreement() -> dict[str, float]:
    """Generate the concept's and an unrelated prompt behind the gate, at both widths, and compare.

    Returns: `latents`, the largest relative difference; `images`, the largest difference of two images' values, 0 to
    255; `scores`, the largest difference of the gate's scores; `decisions`, how many differ.
    """
    apart = {"latents": 0.0, "images": 0.0, "scores": 0.0, "decisions": 0.0}
    narrow, wide = studio(), Studio(wide=True)
    concept, other = CLASSES[3], CLASSES[5]
    with torch.inference_mode():
        for prompt in (photo(concept), photo(other)):
            one, two = (
                s.guided(s.lora("selective", concept), s.encode(prompt), COMPARED_SEEDS, gate(s))
                for s in (narrow, wide)
            )
            first, second = (narrow.images(generated.latents).astype(int) for generated in (one, two))
            differences = {
                "latents": float((one.latents - two.latents).abs().max() / two.latents.abs().max()),
                "images": float(abs(first - second).max()),
                "scores": max(abs(a - b) for a, b in zip(one.scores, two.scores, strict=True)),
                "decisions": float(sum(a != b for a, b in zip(one.detected, two.detected, strict=True))),
            }
            apart = {name: max(value, differences[name]) for name, value in apart.items()}
    return apart
