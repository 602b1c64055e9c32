"""Images as tasks on Ray, one worker a ComfyUI. Needs the extra `bench-ray`."""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .api import ApiError, NoAnswerError
from .errors import BenchError
from .generator import GeneratedImage, ImageGenerator, Plan
from .graphs import Job

log = logging.getLogger("unguide_bench")

RESTARTS = 3
"""How often Ray starts a worker again that was lost; it then generates its image again."""


class Worker:
    """Generates on one server, in a process of its own."""

    def __init__(self, url: str, plan: Plan, timeout: float) -> None:
        self.generator, self.plan = ImageGenerator(url, plan.settings, timeout), plan

    def generate(self, job: Job) -> GeneratedImage | str:
        """The image; a sentence where the server is gone.

        Raises: RuntimeError with what else the server said, for another server would say the same.
        """
        try:
            return self.generator.generate(job, self.plan)
        except NoAnswerError as error:
            return str(error)
        except ApiError as error:
            raise RuntimeError(str(error)) from None


def generate_on_ray(
    jobs: Sequence[Job], plan: Plan, urls: Sequence[str], address: str, timeout: float
) -> Iterator[tuple[Job, GeneratedImage]]:
    """Yield every job with its image, in the order in which they are finished.

    Ray restarts a worker that dies; a server that no longer answers is left out, and another one generates its image.

    Args:
        address: "local" for a Ray on this machine, "auto" for the cluster that is there, else its address.
    Raises: BenchError without Ray or its cluster, and where no server is left; ApiError with what a server said.
    """
    ray = _started(address, len(urls))
    try:
        remote = ray.remote(num_cpus=0, max_restarts=RESTARTS, max_task_retries=RESTARTS)(Worker)
        idle = deque((url, remote.remote(url, plan, timeout)) for url in urls)
        waiting = deque(jobs)
        running: dict[Any, tuple[str, Any, Job]] = {}
        gone: list[str] = []
        while waiting or running:
            while waiting and idle:
                url, worker = idle.popleft()
                job = waiting.popleft()
                running[worker.generate.remote(job)] = (url, worker, job)
            if not running:
                raise BenchError(f"no server is left: {'; '.join(gone)}; start again to resume")
            (done,), _ = ray.wait(list(running), num_returns=1)
            url, worker, job = running.pop(done)
            found = _result(ray, done, url)
            if isinstance(found, GeneratedImage):
                idle.append((url, worker))
                yield job, found
            else:
                gone.append(found)
                waiting.appendleft(job)
                log.warning("%s; the others continue without it", found)
    finally:
        ray.shutdown()


def _result(ray: Any, done: Any, url: str) -> GeneratedImage | str:
    """What a worker returned; a sentence where it or its server is lost for good."""
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise ApiError(str(error.cause)) from None
    except ray.exceptions.RayError as error:
        return f"the worker of {url} was lost {RESTARTS + 1} times ({type(error).__name__})"


def _started(address: str, workers: int) -> Any:
    """The module `ray`, connected. Raises: BenchError."""
    try:
        import ray
    except ImportError as error:
        raise BenchError("more than one server needs Ray; install it: pip install 'unguide[bench-ray]'") from error
    host, _, port = address.removeprefix("ray://").rpartition(":")
    absent = f"there is no Ray cluster at {address!r}; start one with 'ray start --head', or use --ray local"
    root = str(Path(__file__).resolve().parent.parent)
    try:
        if host and port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(
            address=None if address == "local" else address,
            num_cpus=workers if address == "local" else None,
            include_dashboard=False,
            runtime_env={"env_vars": {"PYTHONPATH": root}},
            log_to_driver=False,
        )
    except Exception as error:  # of a node that does not start in time Ray raises no more special one
        raise BenchError(f"{absent} ({error})") from error
    return ray
