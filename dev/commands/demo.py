"""`python3 dev demo`: erases a concept from the embedded demo model with the shipped workflows, and saves images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dev import demo, prepare
from dev.report import DevError, Progress
from dev.server import running_server

SUMMARY = "set up a real ComfyUI with this pack, erase a concept, save images and a report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)
    parser.add_argument("--concept", default="cat", help="what is erased, one of the ten classes (default: cat)")
    parser.add_argument("--prompt", action="append", default=[], help="another row with this prompt; may be repeated")
    parser.add_argument("--seed", type=int, default=7, help="of every image (default: 7)")
    parser.add_argument("--output", default="demo_output", help="folder of the results (default: demo_output)")


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    concept, output = arguments.concept.strip().lower(), Path(arguments.output)
    demo.check_known(concept)
    demo.check_seed(arguments.seed)
    demo.check_output(output)
    host = prepare.prepare(arguments, progress)
    rows = demo.rows_for(concept, arguments.prompt)
    progress("starting ComfyUI")
    with running_server(host, arguments=("--disable-metadata",)) as server:
        run_of = demo.Demo(server, concept, arguments.seed, progress)
        run_of.load(rows[0].prompt)
        cells = [cell for row in rows for cell in run_of.row(row)]
        singles = {stem: run_of.single(stem, rows[0].prompt) for stem in demo.SINGLE}
    progress("judging the images")
    demo.judge_and_show(host, concept, rows, cells, output)
    for stem, png in singles.items():
        (output / f"{stem}.png").write_bytes(png)
    report = output / "report.json"
    report.write_text(json.dumps([cell.entry() for cell in cells], indent=2) + "\n", encoding="utf-8")
    print(demo.table(cells))
    print(f"\n{(output / 'grid.png').absolute()}\n{report.absolute()}")
    if wrong := demo.failures(concept, rows, cells):
        raise DevError(f"the demonstration failed: {'; '.join(wrong)}")
    progress("done: the concept is erased, and every unrelated image is the base model's, bit for bit")
    return 0
