"""Runs an experiment's tasks and keeps what comes of them: processes, progress, JSON, Markdown, documents.

It knows neither models nor methods.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from dev.cache import write_atomically
from dev.supervise import die_with_parent

Key = TypeVar("Key", bound=Hashable)


def start_worker() -> None:
    """Give this process one core, and end it with the one that started it."""
    if end_with_parent := die_with_parent(signal.SIGTERM):
        end_with_parent()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes with one core each."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), start_worker) as pool:
        yield pool


def results(what: str, tasks: Mapping[Key, Future[Any]]) -> Iterator[tuple[Key, Any]]:
    """Yield every task's result, in the order of the tasks, with progress; the first failure ends the others."""
    try:
        for key, task in tqdm(tasks.items(), what):
            yield key, task.result()
    finally:
        for task in tasks.values():
            task.cancel()


def kept(path: Path | None) -> Any:
    """Return what an earlier run left in a JSON file; an empty list where there is none."""
    return json.loads(path.read_text()) if path and path.exists() else []


def keep(path: Path | None, content: Any) -> None:
    """Write a JSON file, if one is asked for, whole or not at all."""
    if path:
        write_atomically(path, json.dumps(content, indent=1) + "\n")


def publish(text: str, document: Path | None = None, marker: str = "") -> None:
    """Print a report, and put it between a document's `<!-- marker: begin -->` and `<!-- marker: end -->`."""
    print(text)
    if document:
        begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
        before, rest = document.read_text().split(begin)
        write_atomically(document, f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")
