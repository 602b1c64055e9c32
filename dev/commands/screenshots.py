"""`python3 dev screenshots`: takes screenshots of the nodes in a browser, for their help pages."""

from __future__ import annotations

import argparse
import os

from dev import browser, cache, prepare
from dev.inside import run_inside
from dev.report import DevError, Progress
from dev.workspace import PACK

SUMMARY = "write web/docs/*.jpg, screenshots for the help pages, of all nodes or those named"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)
    parser.add_argument("nodes", nargs="*", metavar="NODE", help="such as UnGuideSampler")


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    if unknown := set(arguments.nodes) - {path.stem for path in (PACK / "web" / "docs").glob("*.md")}:
        raise DevError(f"{', '.join(sorted(unknown))} has no help page: name nodes as web/docs does", 2)
    found = browser.find_or_install(cache.home() / "logs" / "apt-get.log", progress)
    if found is None:
        raise DevError(f"there is no Chromium on this machine: install one, or name it in {browser.VARIABLE}", 2)
    os.environ[browser.VARIABLE] = found
    return run_inside("dev.screenshots", arguments, arguments.nodes, progress)
