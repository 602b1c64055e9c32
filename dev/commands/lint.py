"""`python3 dev lint`: ruff, ruff format, mypy, and comfy-test's lint of what ships to users."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from dev import prepare
from dev.pip import clean_environment
from dev.report import Progress
from dev.tools import require_modules, run_child
from dev.workspace import PACK

SUMMARY = "check style, types and what ComfyUI asks of a pack (--fix mends what can be)"
# what runs inside a user's ComfyUI; comfy-test's rules are not meant for training scripts and tests
SHIPPED = ("__init__.py", "pyproject.toml", "unguide_core", "unguide_comfy", "nodes", "web")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)
    parser.add_argument("--fix", action="store_true", help="let ruff mend and format the files")


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    python = prepare.prepare(arguments, progress).python
    require_modules(python, ("ruff", "mypy", "comfy_test"))
    fix = arguments.fix
    with tempfile.TemporaryDirectory() as scratch:
        shipped = copy_shipped(Path(scratch, "comfyui-unguide"))
        checks = {
            "ruff check": ["-m", "ruff", "check", *(["--fix"] if fix else []), "."],
            "ruff format": ["-m", "ruff", "format", *([] if fix else ["--check"]), "."],
            "mypy": ["-m", "mypy", *typed_packages()],
            "comfy-test lint": ["-m", "comfy_test", "lint", str(shipped)],
        }
        failed = []
        for name, command in checks.items():
            progress(name)
            if run_child([str(python), *command], PACK, clean_environment()) != 0:
                failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


def typed_packages() -> list[str]:
    """What mypy checks: every package at the top of the checkout but the tests."""
    return sorted(path.parent.name for path in PACK.glob("*/__init__.py") if path.parent.name != "tests")


def copy_shipped(folder: Path) -> Path:
    """A copy of what ships, for tools that look at everything they find."""
    folder.mkdir()
    for path in (PACK / name for name in SHIPPED if (PACK / name).exists()):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(path, folder / path.name)
    return folder
