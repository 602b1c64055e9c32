"""What all tests share: the repository's place, and the pack loaded the way ComfyUI loads it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dev.host import Host
from dev.pack import load_pack, pack_module, start_host
from dev.server import Server, running_server
from dev.workspace import PACK as ROOT

__all__ = ["ROOT", "awaited", "load_pack", "pack_module", "start_host"]

BROWSER = "tests/browser/"
JUDGED = ("tests/host/test_benchmark.py", "tests/experiments/test_instant.py")
SLOW = (
    "workflows/test_runs.py",
    "host/test_benchmark.py",
    "experiments/test_instant.py",
    "browser/",
    "train/",
    "bench/test_runs.py",
    "host/test_training.py",
    "host/test_gate.py",
    "host/test_blending.py",
    "host/test_architectures.py",
    "host/test_foreign.py",
    "policy/test_server.py",
    "bench/test_suites.py",
    "bench/test_technique.py",
    "host/test_erase.py",
    "host/test_official.py",
    "host/test_image_stage.py",
    "host/test_decisions.py",
    "host/test_resist_adversarial.py",
    "workflows/test_failures.py",
    "workflows/test_demo.py",
)
"""Below tests/, what takes more than half a minute: training, sampling at length, servers that run whole workflows.
They are run first, and in this order, so that all workers end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the host, and what `python3 dev test --quick` leaves out; run that first."""
    for item in items:
        if _path(item).startswith(("browser/", "host/", "policy/", "workflows/")):
            item.add_marker(pytest.mark.host)
        if _slowness(item) < len(SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=_slowness)


def _path(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT / "tests").as_posix()


def _slowness(item: pytest.Item) -> int:
    """A test's place in `SLOW`."""
    return next((place for place, prefix in enumerate(SLOW) if _path(item).startswith(prefix)), len(SLOW))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A ComfyUI that all tests of a worker share; its calibrations are quick ones."""
    paths = tmp_path_factory.mktemp("paths") / "paths.yaml"
    paths.write_text(f"tests:\n  custom_nodes: {ROOT / 'tests' / 'custom_nodes'}\n", encoding="utf-8")
    arguments = ("--extra-model-paths-config", str(paths))
    with running_server(Host.from_environment(), arguments=arguments) as running:
        yield running


def awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine returns; in a thread of its own, for an open page keeps a loop running in this one."""
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(asyncio.run, coroutine).result()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one worker, and files that share something to the same: a server and a page, or a judge."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            shared = [group for group in ((BROWSER,), JUDGED) if nodeid.startswith(group)]
            return shared[0][0] if shared else str(super()._split_scope(nodeid))

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None
