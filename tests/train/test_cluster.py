"""Many concepts on a local Ray of two workers, one of which is killed on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from unguide_core.formats import load_adapter
from unguide_train import checkpoint as checkpoints
from unguide_train import cluster
from unguide_train.cluster import ClusterError, train_on_ray
from unguide_train.config import from_values
from unguide_train.job import train_concept


def kill_the_worker_behind(checkpoint: Path, killed: list[int], gone: threading.Event) -> None:
    """Kills the worker that writes a checkpoint, as soon as it has written it."""
    while not gone.is_set() and not killed:
        if checkpoint.exists():
            killed.append(checkpoints.writer(checkpoint))
            os.kill(killed[0], signal.SIGKILL)
        time.sleep(0.02)


@contextmanager
def one_thread() -> Iterator[None]:
    """As many as Ray gives a worker of one CPU: sums of other numbers of threads differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_a_killed_workers_concept_goes_on_and_one_that_cannot_be_trained_is_reported(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["recipe"] |= {"iterations": 8, "refresh": 4, "check": 0}
    (tmp_path / "blocked").write_text("a file where a folder is needed")
    settings["concepts"] = [
        {"concept": "cat", "reference": "forest"},
        {"concept": "ship", "reference": "sea", "out": str(tmp_path / "blocked" / "ship.safetensors")},
        {"concept": "dog", "reference": "field"},
    ]
    config = from_values(settings)
    killed: list[int] = []
    gone = threading.Event()
    watcher = threading.Thread(
        target=kill_the_worker_behind, args=(checkpoints.path_of(tmp_path / "cat.safetensors"), killed, gone)
    )
    watcher.start()
    try:
        finished = {concept.concept: result for concept, result in train_on_ray(config, config.concepts, "local", 2)}
    finally:
        gone.set()
        watcher.join()
    assert len(killed) == 1
    assert isinstance(finished["ship"], OSError)
    cat, dog = finished["cat"], finished["dog"]
    assert not isinstance(cat, Exception), cat
    assert not isinstance(dog, Exception), dog
    assert cat.resumed_at >= 4
    assert cat.process not in (killed[0], dog.process)
    assert dog.resumed_at == 0
    assert [cat.iterations, dog.iterations] == [8, 8]
    alone = from_values({**settings, "out": tmp_path / "alone"})
    with one_thread():
        expected = train_concept(alone, alone.concepts[0], quiet=True)
    assert load_adapter(cat.path).fingerprint == load_adapter(expected.path).fingerprint
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["cat.safetensors", "dog.safetensors"]
    assert list(tmp_path.glob(".*")) == []


def test_a_concept_whose_worker_is_killed_for_memory_every_time_is_given_up(settings, monkeypatch, caplog) -> None:
    """Ray itself would restart it for ever: here it finds memory full whenever it looks."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    monkeypatch.setattr(cluster, "RETRIES", 1)
    settings["preset"], settings["recipe"] = "paper", {"iterations": 1, "schedule_steps": 10}
    config = from_values(settings)
    ((_, error),) = train_on_ray(config, config.concepts, "local", 1)
    assert isinstance(error, ClusterError)
    assert "its worker was lost 2 times" in str(error)
    assert "memory" in str(error)
    assert caplog.text.count("cat: its worker was lost") == 1


def test_auto_uses_the_cluster_that_is_there_and_leaves_it_running(settings, monkeypatch) -> None:
    from ray.cluster_utils import Cluster

    settings |= {"preset": "paper", "recipe": {"iterations": 1, "schedule_steps": 10}}
    config = from_values(settings)
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        monkeypatch.setenv("RAY_ADDRESS", started.address)
        ((_, summary),) = train_on_ray(config, config.concepts, "auto")
        assert not isinstance(summary, Exception), summary
        assert load_adapter(summary.path).card.concept == "cat"
        assert started.remaining_processes_alive()
    finally:
        started.shutdown()


def test_no_cluster_is_said_in_a_sentence(config) -> None:
    with pytest.raises(ClusterError, match=r"ray start --head.*--ray local"):
        list(train_on_ray(config, config.concepts, "127.0.0.1:1"))
