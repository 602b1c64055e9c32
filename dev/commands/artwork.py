"""`python3 dev artwork`: writes the registry's icon and banner."""

from __future__ import annotations

import argparse

from dev import prepare
from dev.pip import clean_environment
from dev.report import Progress
from dev.tools import run_child
from dev.workspace import PACK

SUMMARY = "write docs/icon.png and docs/banner.png for the registry"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    python = prepare.prepare(arguments, progress).python
    return run_child([str(python), "-P", "-m", "dev.artwork"], PACK, clean_environment() | {"PYTHONPATH": str(PACK)})
