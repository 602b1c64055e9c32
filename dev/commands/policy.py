"""`python3 dev policy`: sends honest graphs and attacks to a real server, with and without a policy."""

from __future__ import annotations

import argparse

from dev import prepare
from dev.inside import run_inside
from dev.report import Progress

SUMMARY = "send graphs and attacks to a server with and without a policy"
EXTRA = "other arguments: --json FILE, --markdown FILE, --images N, --only TEXT, --soak IMAGES"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    return run_inside("dev.policy.main", arguments, extra, progress)
