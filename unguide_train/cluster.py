"""Many concepts as independent jobs on Ray. Needs the extra `ray` (pip install unguide[ray])."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from .config import Concept, Config
from .job import Summary, train_concept
from .text import first_line

log = logging.getLogger("unguide_train")

RETRIES = 3
"""How often a concept whose worker was lost is restarted, from its last checkpoint. Ray's own retries are off: it
restarts a worker that it killed for memory without end, whatever number of retries it is given."""


class ClusterError(RuntimeError):
    """Ray is not installed, or no cluster was found."""


def train_on_ray(
    config: Config, concepts: Sequence[Concept], address: str, workers: int | None = None
) -> Iterator[tuple[Concept, Summary | Exception]]:
    """Yield every concept when it is finished, with its summary or the exception that it failed with.

    All workers must be able to write to the folder of the results; checkpoints are stored there too.

    Args:
        address: "auto" for the cluster that is running, "local" for one on this machine, or an address.
        workers: of a local cluster; None takes one per core.
    Raises: ClusterError.
    """
    try:
        import ray
    except ImportError as error:
        raise ClusterError("Ray is not installed; install it: pip install 'unguide[ray]'") from error
    _require_reachable(address)
    root = str(Path(__file__).resolve().parent.parent)
    try:
        ray.init(
            address=None if address == "local" else address,
            num_cpus=workers if address == "local" else None,
            include_dashboard=False,
            runtime_env={"env_vars": {"PYTHONPATH": root}},
            log_to_driver=False,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(_absent(address, error)) from error
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_task)
        values = config.model_dump()
        waiting = {remote.remote(values, concept.model_dump()): (concept, 0) for concept in concepts}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            concept, lost = waiting.pop(done)
            try:
                yield concept, ray.get(done)
            except ray.exceptions.RayTaskError as error:
                yield concept, error.cause if isinstance(error.cause, Exception) else error
            except ray.exceptions.RayError as error:
                if lost == RETRIES:
                    yield concept, ClusterError(_given_up(error))
                    continue
                log.warning("%s: its worker was lost (%s); it is restarted", concept.concept, first_line(error))
                waiting[remote.remote(values, concept.model_dump())] = concept, lost + 1
    finally:
        ray.shutdown()


def _require_reachable(address: str) -> None:
    """Raises ClusterError if nothing listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ClusterError(_absent(address, error)) from error


def _given_up(error: Exception) -> str:
    return (
        f"its worker was lost {RETRIES + 1} times, the last time with: {first_line(error)}; if memory ran out, train "
        "fewer concepts at once (--workers), in half precision (--precision fp16), or with a smaller batch (--rows)"
    )


def _absent(address: str, error: Exception) -> str:
    return f"there is no Ray cluster at {address!r} ({error}); start one with 'ray start --head', or use --ray local"


def _task(values: dict, concept: dict) -> Summary:
    return train_concept(Config.model_validate(values), Concept.model_validate(concept), quiet=True)
