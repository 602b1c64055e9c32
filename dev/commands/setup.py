"""`python3 dev setup`: sets up the host and stops there."""

from __future__ import annotations

import argparse

from dev.prepare import add_arguments, prepare
from dev.report import Progress

SUMMARY = "set up a ComfyUI with this pack, and print where everything is"

__all__ = ["SUMMARY", "add_arguments", "run"]


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    host = prepare(arguments, progress)
    print(f"ComfyUI:        {host.comfyui}\npython:         {host.python}\nbase directory: {host.base_directory}")
    return 0
