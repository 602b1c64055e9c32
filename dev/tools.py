"""Runs pytest, ruff and the like with the host's python, in the foreground, as children that do not outlive us."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from pathlib import Path

from dev.pip import clean_environment
from dev.report import DevError
from dev.supervise import die_with_parent


def run_child(command: list[str], folder: Path, environment: dict[str, str]) -> int:
    """Runs the command in the foreground and returns its exit status, 128 + the signal where one ended it.

    Ctrl+C reaches it from the terminal: it gets a minute to clean up.
    """
    child = subprocess.Popen(command, cwd=folder, env=environment, preexec_fn=die_with_parent(signal.SIGTERM))
    try:
        with contextlib.suppress(KeyboardInterrupt):
            child.wait()
        status = child.wait(60)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    return status if status >= 0 else 128 - status


def require_modules(python: Path, modules: tuple[str, ...]) -> None:
    """Raises DevError if that python lacks one of the modules, as a user's own may."""
    code = f"import importlib.util as u; print([m for m in {modules!r} if not u.find_spec(m)])"
    result = subprocess.run([str(python), "-c", code], capture_output=True, text=True, env=clean_environment())
    if result.stdout.strip() != "[]":
        raise DevError(
            f"{python} lacks {result.stdout.strip() or 'everything'}: install {' '.join(modules)} into it, "
            "or unset COMFYUI_PATH to use an environment that dev makes",
            2,
        )
