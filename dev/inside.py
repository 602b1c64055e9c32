"""Runs a module of this repository with the host's python, beside the host's code and the pack."""

from __future__ import annotations

import argparse

from dev import prepare
from dev.commands.test import test_environment
from dev.report import Progress
from dev.tools import run_child
from dev.workspace import PACK


def run_inside(module: str, arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    """Sets up what is missing, then runs the module's `main` with the extra arguments; returns its exit status."""
    host = prepare.prepare(arguments, progress)
    # the pack's folder must stand behind the host on the path: its nodes/ would hide ComfyUI's nodes.py
    start = f"import sys; sys.path.pop(0); from {module} import main; main()"
    return run_child([str(host.python), "-c", start, *extra], PACK, test_environment(host))
