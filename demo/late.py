"""How late may erasing begin? What a gate leaves of a concept that it detects after some steps of the base model.

    python -m demo.late --tokenizer ComfyUI/comfy/sd1_tokenizer

After 0 steps is what `restart` generates. With the nodes' defaults, a probe in the third of 20 steps, `continue` erases
after 2. On the narrow model, which computes what the wide one does; prints a table in Markdown.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from .captions import CLASSES
from .erasure import LORAS, SETS, path_of
from .evaluate import accuracy_task, own_prompts, summary
from .narrow import SCHEDULE_STEPS, start_worker
from .seed import SEED_PATH

FIRST, WEIGHTS = (0, 2, 3, 5, 7), (0.0, -1.0)


def main() -> None:
    """Generates, judges and prints."""
    parser = argparse.ArgumentParser(prog="python -m demo.late")
    parser.add_argument("--tokenizer", type=Path, required=True, help="ComfyUI's folder comfy/sd1_tokenizer")
    parser.add_argument("--set", nargs="+", choices=SETS, default=["selective"])
    parser.add_argument("--images", type=int, default=5, help="per prompt (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one core each (default: %(default)s)")
    options = parser.parse_args()
    cells: dict[tuple[str, float, int], list] = {}
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), start_worker, (options.tokenizer, SEED_PATH)) as pool:
        for name in options.set:
            for weight in WEIGHTS:
                for first in FIRST:
                    cells[name, weight, first] = [
                        pool.submit(
                            accuracy_task,
                            path_of(LORAS, name, concept),
                            own_prompts(concept),
                            options.images,
                            weight,
                            first,
                        )
                        for concept in CLASSES
                    ]
        print(f"| set | weight | {' | '.join(f'after {first}' for first in FIRST)} |")
        print("|---" * (len(FIRST) + 2) + "|")
        for name in options.set:
            for weight in WEIGHTS:
                shown = [_shown([task.result() for task in cells[name, weight, first]]) for first in FIRST]
                print(f"| {name} | {weight:g} | {' | '.join(shown)} |", flush=True)
    print(f"\nOf {SCHEDULE_STEPS} steps; percent still shown by name / by synonym / in scenes, mean over ten concepts.")


def _shown(shares: list[dict[str, float]]) -> str:
    each = [summary(concept, share) for concept, share in zip(CLASSES, shares, strict=True)]
    names = ("erased", "general", "placed")
    return " / ".join(f"{sum(getattr(one, name) for one in each) / len(each):.0f}" for name in names)


if __name__ == "__main__":
    main()
