"""`python3 dev texts`: writes the nodes' English texts for the page from their schemas."""

from __future__ import annotations

import argparse

from dev import prepare
from dev.inside import run_inside
from dev.report import Progress

SUMMARY = "write locales/en/nodeDefs.json from the nodes' schemas"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    return run_inside("dev.texts", arguments, extra, progress)
