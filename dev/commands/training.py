"""`python3 dev training`: the demo's ten concepts trained in the graph and by unguide_train, and measured."""

from __future__ import annotations

import argparse

from dev import prepare
from dev.inside import run_inside
from dev.report import Progress

SUMMARY = "train the demo's ten concepts in the graph and by unguide_train, and measure both"
EXTRA = "other arguments: --concept NAME ..., --preset paper|selective, --seed N, --pictures N, --json FILE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    return run_inside("dev.training_table", arguments, extra, progress)
