"""`python3 dev lint`: ruff, ruff format, mypy, and the checks of what ships to users (as `python3 dev package`)."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from dev import package, prepare
from dev.pip import clean_environment
from dev.report import Progress
from dev.tools import require_modules, run_child
from dev.workspace import PACK

SUMMARY = "check style, types and what ComfyUI asks of a pack (--fix mends what can be)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)
    parser.add_argument("--fix", action="store_true", help="let ruff mend and format the files")


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    python = prepare.prepare(arguments, progress).python
    require_modules(python, ("ruff", "mypy", "comfy_test"))
    fix = arguments.fix
    checks = {
        "ruff check": ["-m", "ruff", "check", *(["--fix"] if fix else []), "."],
        "ruff format": ["-m", "ruff", "format", *([] if fix else ["--check"]), "."],
        "mypy": ["-m", "mypy", *typed_packages()],
    }
    failed = []
    for name, command in checks.items():
        progress(name)
        if run_child([str(python), *command], PACK, clean_environment()) != 0:
            failed.append(name)
    with tempfile.TemporaryDirectory() as scratch:
        archive = package.build(Path(scratch), progress)
        if wrong := package.check(archive, package.unpack(archive, Path(scratch, "pack")), python, progress):
            print("\n".join(wrong))
            failed.append("package")
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


def typed_packages() -> list[str]:
    """What mypy checks: every package at the top of the checkout but the tests."""
    return sorted(path.parent.name for path in PACK.glob("*/__init__.py") if path.parent.name != "tests")
