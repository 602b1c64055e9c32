"""`python3 dev training`: ten concepts trained in the graph, by unguide_train, by the official loop; and measured."""

from __future__ import annotations

import argparse

from dev import prepare
from dev.inside import run_inside
from dev.report import Progress

SUMMARY = "train the demo's ten concepts in the graph, by unguide_train and by the official loop, and measure all"
EXTRA = "other arguments: --concept NAME ..., --way NAME ..., --seed N, --images N, --jobs N, --json FILE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    return run_inside("dev.training_table", arguments, extra, progress)
