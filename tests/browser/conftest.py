"""What the browser tests share: one server, one Chromium and one page, which every test leaves as it found it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from dev import package
from dev.browser import VARIABLE, find
from dev.host import Host
from dev.page import Canvas, opened
from dev.report import Progress
from dev.server import Server, running_server


@pytest.fixture(scope="session")
def browser_path() -> str:
    """A Chromium. `python3 dev test` installs one where it may, and stops where CI is set and there is none."""
    path = find()
    if path is None:
        assert not os.environ.get("CI"), "python3 dev test has to find or install a browser"
        pytest.skip(f"there is no Chromium on this machine: install one, or name it in {VARIABLE}")
    return path


@pytest.fixture(scope="session")
def server(browser_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A ComfyUI into which only the zip for the registry was unpacked: no model, no LoRA, no other node."""
    folder = tmp_path_factory.mktemp("installed")
    archive = package.build(folder / "zip", Progress())
    with running_server(package.install(archive, folder / "base", Host.from_environment())) as running:
        yield running


@pytest.fixture(scope="session")
def session_canvas(server: Server, browser_path: str) -> Iterator[Canvas]:
    with opened(server, browser_path) as canvas:
        yield canvas


@pytest.fixture
def canvas(session_canvas: Canvas) -> Iterator[Canvas]:
    """The page with an empty graph in the classic canvas; no test may leave an error in its console."""
    session_canvas.nodes_2(False)
    session_canvas.clear()
    yield session_canvas
    assert session_canvas.errors == []
