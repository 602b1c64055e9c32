"""`python3 dev gate`: the table of how well each statistic tells the erased concepts from everything else."""

from __future__ import annotations

import argparse

from dev import prepare
from dev.commands.test import test_environment
from dev.report import Progress
from dev.tools import run_child
from dev.workspace import PACK

SUMMARY = "measure the gate's statistics over the demo model's ten concepts"
EXTRA = "other arguments: --set paper|selective, --seed N, --repeats N, --probe-steps N, --cfg X, --json FILE"
# the pack's folder must stand behind the host on the path: its nodes/ would hide ComfyUI's nodes.py
START = "import sys; sys.path.pop(0); from dev.gate_table import main; main()"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    host = prepare.prepare(arguments, progress)
    return run_child([str(host.python), "-c", START, *extra], PACK, test_environment(host))
