"""The client of ComfyUI's API where workflows wait, run for too long, or are given up."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from dev.models import CHECKPOINT
from dev.server import Server
from unguide_bench.api import PENDING, RUNNING, ApiError, ExecutionFailedError, Graph, NoAnswerError

pytestmark = pytest.mark.host
SHORT: Graph = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 0}},
    "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
}


def long(seed: int) -> Graph:
    """A workflow that would run for minutes."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    sampling = {"seed": seed, "steps": 9999, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    sampling |= {"model": ["c", 0], "positive": ["t", 0], "negative": ["t", 0], "latent_image": ["l", 0]}
    return {
        "c": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "t": node("CLIPTextEncode", text="", clip=["c", 1]),
        "l": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "s": node("KSampler", **sampling),
        "v": node("VAEDecode", samples=["s", 0], vae=["c", 2]),
        "i": node("PreviewImage", images=["v", 0]),
    }


def until_empty(server: Server) -> None:
    """Returns once nothing runs and nothing waits."""
    deadline = time.monotonic() + 60
    while any(server.api.get("/queue").values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def until_running(server: Server, prompt_id: str) -> None:
    deadline = time.monotonic() + 60
    while not any(item[1] == prompt_id for item in server.api.get("/queue")[RUNNING]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_time_behind_others_in_the_queue_is_not_counted(server: Server) -> None:
    first = server.api.queue(long(1))
    second = server.api.queue(SHORT)
    timer = threading.Timer(1.5, server.api.cancel, [first])
    timer.start()
    entry = server.api.wait(second, timeout=1.0)
    timer.join()
    assert entry["status"]["status_str"] == "success"
    with pytest.raises(ExecutionFailedError, match="interrupted"):
        server.api.wait(first)


def test_what_runs_for_too_long_is_cancelled_and_the_next_one_runs(server: Server) -> None:
    with pytest.raises(ApiError, match=r"did not finish within 0\.5 s of running; it was cancelled"):
        server.api.run(long(2), timeout=0.5)
    assert server.api.run(SHORT, timeout=10)["status"]["completed"]
    until_empty(server)


def test_what_waits_is_taken_out_of_the_queue_and_what_runs_goes_on(server: Server) -> None:
    first, second = server.api.queue(long(3)), server.api.queue(SHORT)
    until_running(server, first)
    server.api.cancel(second)
    queue = server.api.get("/queue")
    assert [item[1] for item in queue[RUNNING]] == [first]
    assert queue[PENDING] == []
    with pytest.raises(NoAnswerError, match="forgotten"):
        server.api.wait(second)
    server.api.cancel(first)
    until_empty(server)
