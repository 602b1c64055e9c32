"""`python3 dev calibrate`: measures the thresholds of the demo's erasure LoRAs, and writes their cards."""

from __future__ import annotations

import argparse

from dev import prepare
from dev.inside import run_inside
from dev.report import Progress

SUMMARY = "calibrate the demo's erasure LoRAs: thresholds and baselines in their cards"
EXTRA = "other arguments: --set paper|selective, --concept NAME ..., --repeats N, --seed N, --text, --images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    return run_inside("dev.calibration", arguments, extra, progress)
