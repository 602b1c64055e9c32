from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev import server
from dev.api import ExecutionFailedError, Graph, PromptRejectedError
from dev.host import Host
from dev.report import DevError
from dev.server import Server, running_server
from dev.workspace import PACK


@pytest.fixture
def dying(tmp_path: Path) -> Host:
    """A host whose main.py ends at once."""
    (tmp_path / "ComfyUI").mkdir()
    (tmp_path / "ComfyUI" / "main.py").write_text("raise SystemExit('the model folder is gone')")
    base = tmp_path / "base"
    base.mkdir()
    return Host(comfyui=tmp_path / "ComfyUI", python=Path(sys.executable), base_directory=base, device="cpu")


def test_a_busy_port_is_one_sentence(dying: Host) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((server.LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DevError, match=f"port {port} is in use: give another with --port"):
            Server(dying, port)


def test_an_impossible_port_is_one_sentence(dying: Host) -> None:
    with pytest.raises(DevError, match="port 99999 cannot be used"):
        Server(dying, 99999)


def test_a_server_that_ends_is_one_sentence_with_its_last_words(dying: Host) -> None:
    with (
        pytest.raises(DevError, match=r"stopped by itself \(exit status 1\), .* ends with 'the model folder is gone'"),
        running_server(dying),
    ):
        pytest.fail("it never answered")
    assert list((dying.base_directory / "runs").iterdir()) == []


KILLED = """
import os, signal
from dev.host import Host
from dev.server import running_server
with running_server(Host.from_environment()) as server:
    print(server.port, server.run_folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.host
def test_a_comfyui_dies_with_a_program_that_is_killed() -> None:
    environment = os.environ | {"PYTHONPATH": str(PACK)}
    killed = subprocess.run([sys.executable, "-c", KILLED], env=environment, capture_output=True, text=True)
    port, folder = killed.stdout.split()
    deadline = time.monotonic() + 60
    while Path(folder).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(folder).exists()
    server.require_free(int(port))


@pytest.fixture(scope="module")
def comfyui() -> Iterator[Server]:
    with running_server(Host.from_environment()) as running:
        yield running


IMAGE: Graph = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 2, "color": 0xFF0000}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "test/red"}},
}


@pytest.mark.host
class TestApi:
    """Against a real ComfyUI."""

    def test_a_graph_gives_its_images(self, comfyui: Server) -> None:
        images = comfyui.api.images(comfyui.api.run(IMAGE))
        assert list(images) == ["2"]
        assert [data[:4] for data in images["2"]] == [b"\x89PNG", b"\x89PNG"]
        assert len(list(comfyui.output_directory.glob("test/red*.png"))) == 2

    def test_this_pack_is_loaded(self, comfyui: Server) -> None:
        assert any(name.startswith("UnGuide") for name in comfyui.api.get("/object_info"))

    def test_a_graph_that_is_wrong_is_rejected_with_node_and_reason(self, comfyui: Server) -> None:
        graph = {**IMAGE, "1": {"class_type": "EmptyImage", "inputs": {"width": -3, "height": 16}}}
        with pytest.raises(PromptRejectedError, match=r"EmptyImage \(node 1\): Value -3 smaller than min") as caught:
            comfyui.api.run(graph)
        assert "1" in caught.value.details["node_errors"]

    def test_a_node_that_raises_is_reported_with_its_message(self, comfyui: Server) -> None:
        graph = {
            **IMAGE,
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "../up"}},
        }
        with pytest.raises(
            ExecutionFailedError, match=r"SaveImage \(node 2\) failed: .*outside the output folder"
        ) as caught:
            comfyui.api.run(graph)
        assert caught.value.details["node_id"] == "2"

    def test_the_page_for_a_browser_is_served(self, comfyui: Server) -> None:
        with urllib.request.urlopen(comfyui.api.url) as answer:
            assert b"<html" in answer.read(2000)
