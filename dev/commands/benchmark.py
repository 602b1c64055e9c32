"""`python3 dev benchmark`: how well each way erases ten concepts of the demo model, and what it costs."""

from __future__ import annotations

import argparse

from dev import prepare
from dev.inside import run_inside
from dev.report import Progress

SUMMARY = "measure erasure: ten concepts, every method, with an HTML report"
EXTRA = "other arguments: --quick, --out FOLDER, --json FILE, --seeds N, --method ..., --concept ..., --jobs N"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    return run_inside("dev.benchmark.main", arguments, extra, progress)
