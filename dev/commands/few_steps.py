"""`python3 dev few-steps`: what the gate does in schedules of few and of many steps."""

from __future__ import annotations

import argparse

from dev import prepare
from dev.inside import run_inside
from dev.report import Progress

SUMMARY = "measure the gate in schedules of 1 to 30 steps"
EXTRA = (
    "other arguments: --seeds N, --seed N, --steps N ..., --scheduler NAME ..., --concept NAME ..., --jobs N, "
    "--json FILE"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    return run_inside("dev.few_steps", arguments, extra, progress)
