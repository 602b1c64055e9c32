"""What the tests of dev share: a cache folder of their own, and pip cut off from every index."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dev.report import Progress
from dev.workspace import PACK

Dev = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, which UNGUIDE_DEV_HOME names."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("UNGUIDE_DEV_HOME", str(folder))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip asks a loopback port that refuses, and nothing else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def progress() -> Progress:
    return Progress()


@pytest.fixture
def dev() -> Dev:
    """Runs `python3 dev ...` as a person would."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "dev", *arguments]
        return subprocess.run(command, cwd=PACK, capture_output=True, text=True, timeout=300)

    return run
