"""`python3 dev gate`: how well the gate tells the erased concepts from everything else."""

from __future__ import annotations

import argparse

from dev import prepare
from dev.inside import run_inside
from dev.report import Progress

SUMMARY = "measure the gate over the demo model's ten concepts"
EXTRA = (
    "other arguments: --set selective|preset|paper ..., --training-seed N, --statistic NAME, --resist-adversarial, "
    "--images N, --seed N, --probe-steps N, --json FILE, --diagram FILE"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    return run_inside("dev.gate_table", arguments, extra, progress)
