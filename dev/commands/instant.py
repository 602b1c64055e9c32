"""`python3 dev instant`: what a closed-form erasure erases, keeps and costs, alone and behind the gate."""

from __future__ import annotations

import argparse

from dev import prepare
from dev.inside import run_inside
from dev.report import Progress

SUMMARY = "measure erasure in closed form on the demo's ten concepts, beside the trained adapters"
EXTRA = (
    "other arguments: --seeds N, --seed N, --concept NAME ..., --row NAME ..., --costs-only, --start, --jobs N, "
    "--json FILE"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    return run_inside("dev.instant", arguments, extra, progress)
