"""`python3 dev images`: what the gate's image stage adds against concepts that no prompt names."""

from __future__ import annotations

import argparse

from dev import prepare
from dev.inside import run_inside
from dev.report import Progress

SUMMARY = "measure the gate's image stage: attacks, start images, unrelated images"
EXTRA = "other arguments: --concept NAME ..., --seeds N, --json FILE, --markdown FILE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    return run_inside("dev.image_table", arguments, extra, progress)
