"""`python3 dev test`: sets up what is missing and runs the tests: all, the quick ones, or those that are named."""

from __future__ import annotations

import argparse
import os

from dev import browser, cache, prepare
from dev.host import Host
from dev.pip import clean_environment
from dev.report import Progress
from dev.tools import require_modules, run_child
from dev.workspace import PACK

WORKERS = 2  # each starts servers and loads models of its own
SLOWEST = 15
SUMMARY = "run the test suite in a real ComfyUI, or with --quick the cheap part of it (arguments go to pytest)"
EXTRA = "any other arguments are pytest's (-k golden -s, tests/host)"
# not `python -m pytest`: that puts the pack's folder first on the path, where nodes/ hides ComfyUI's nodes.py
MODULES = (
    *("pytest", "xdist", "hypothesis", "diffusers", "peft", "ray", "nudenet", "torchmetrics", "matplotlib"),
    "playwright",
)
BROWSER = "tests/browser"
START = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main())"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="only what is not marked slow: under 5 minutes on 2 cores")


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    host = prepare.prepare(arguments, progress)
    require_modules(host.python, MODULES)
    kept = f"cache_dir={host.base_directory / 'pytest_cache'}"
    options = ["--import-mode=importlib", f"--rootdir={PACK}", "-o", kept, f"--durations={SLOWEST}"]
    options += ["-m", "not slow"] if arguments.quick else []
    environment = test_environment(host)
    named = any(part.startswith(BROWSER) for part in extra)
    if named or not (extra or arguments.quick):
        found = browser.find_or_install(cache.home() / "logs" / "apt-get.log", progress)
        environment |= {} if found is None else {browser.VARIABLE: found}
    if not named and not arguments.quick:
        options += ["-m", "not lengthy"]
    if not extra:
        options += [f"--numprocesses={WORKERS}", "--dist=loadfile", "--no-loadscope-reorder"]
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // WORKERS))
    return run_child([str(host.python), "-c", START, *options, *extra], PACK, environment)


def test_environment(host: Host) -> dict[str, str]:
    """Return the variables for tests: `Host.from_environment`, and a path where ComfyUI stands before the pack."""
    return clean_environment() | host.environment() | {"PYTHONPATH": os.pathsep.join([str(host.comfyui), str(PACK)])}
