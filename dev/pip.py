"""pip as a subprocess: quiet, logged, and its failures told in one sentence."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

from dev.report import DevError
from dev.supervise import die_with_parent

UNREACHABLE = re.compile(
    r"NewConnectionError|Connection refused|ConnectionError|Temporary failure in name resolution|Max retries exceeded"
    r"|ReadTimeoutError|ConnectTimeout|Network is unreachable|ProxyError|Failed to establish",
    re.IGNORECASE,
)
RETRIES = "3"  # pip's 5 take long to say that there is no network


def clean_environment() -> dict[str, str]:
    """This process' environment without what would leak another Python's packages into a virtual environment."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return environment | {"PYTHONNOUSERSITE": "1", "PIP_REQUIRE_VIRTUALENV": "false", "PIP_NO_INPUT": "1"}


def pip(python: Path | str, *arguments: str, log: Path, purpose: str) -> None:
    """Runs `python -m pip` with its output in `log`.

    Raises: DevError with the likely cause: no pip, no network, no free disk, a file that is not the pinned one.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as output:
        result = subprocess.run(
            [str(python), "-m", "pip", *arguments, "--disable-pip-version-check", "--retries", RETRIES],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=clean_environment(),
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
    if result.returncode != 0:
        raise DevError(explain(log.read_text(encoding="utf-8", errors="replace"), python, log, purpose))


def explain(output: str, python: Path | str, log: Path, purpose: str) -> str:
    """The sentence for a failed pip, from what it printed."""
    if "No module named pip" in output:
        return f"{purpose} needs pip, and {python} has none: install it (on Debian: python3-pip and python3-venv)"
    if "No space left on device" in output:
        return f"{purpose} filled the disk: free some, or set UNGUIDE_DEV_HOME to a folder on another disk"
    if "DO NOT MATCH THE HASHES" in output:
        return f"{purpose} was refused: the file that the package index served is not the pinned one (log: {log})"
    errors = [line.removeprefix("ERROR: ").strip() for line in output.splitlines() if line.startswith("ERROR:")]
    last = errors[-1] if errors else (output.strip().splitlines() or ["nothing"])[-1]
    nothing_found = last.startswith("No matching distribution") and UNREACHABLE.search(output)
    if nothing_found or UNREACHABLE.search(last):
        return (
            f"{purpose} found no package index: check the network (or the index that pip is set to), "
            f"or set COMFYUI_PATH to a ComfyUI of your own (log: {log})"
        )
    return f"{purpose} failed, pip says '{last}' (log: {log})"
