"""`python3 dev bench`: what UnGuide costs, as ratios to plain sampling in the same run."""

from __future__ import annotations

import argparse

from dev import prepare
from dev.inside import run_inside
from dev.report import Progress

SUMMARY = "measure evaluations, wall time and memory against plain sampling"
EXTRA = "other arguments: --json FILE, --markdown FILE, --quick, --times N, --case NAME ..."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    return run_inside("dev.bench", arguments, extra, progress)
