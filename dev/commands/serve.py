"""`python3 dev serve`: runs the host with this pack for a person with a browser, until Ctrl+C."""

from __future__ import annotations

import argparse
import time

from dev import prepare
from dev.report import Progress
from dev.server import require_free, running_server

SUMMARY = "open ComfyUI with this pack for a browser"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)
    parser.add_argument("--port", type=int, help="where to listen on 127.0.0.1 (default: a free port)")


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    if arguments.port is not None:
        require_free(arguments.port)  # before a long set-up, not after it
    host = prepare.prepare(arguments, progress)
    progress("starting ComfyUI")
    with running_server(host, arguments.port, keep_output=True) as server:
        print(f"{server.api.url}  (Ctrl+C stops; images in {server.output_directory}; log: {server.log})", flush=True)
        while True:
            server.check()
            time.sleep(0.5)
