"""A server under a policy, or without one, and what graphs show on it. It does not know what they should show."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dev.api import ExecutionFailedError, PromptRejectedError
from dev.host import Host
from dev.server import Server, running_server
from experiments.policy.graphs import Case

NODES = Path(__file__).with_name("custom_nodes")
REFUSAL = "this server"
"""How the policy's errors begin."""


@dataclass(frozen=True)
class Shown:
    """What a graph came to.

    Args:
        images: the files that it saved, without those of earlier graphs of its case.
        error: why there are none.
        details: the host's message about that.
        prompt_id: of the last graph.
    """

    images: tuple[bytes, ...] = ()
    error: str = ""
    details: str = ""
    prompt_id: str = ""

    @property
    def refused(self) -> bool:
        """Whether the policy refused it."""
        return self.error.startswith(REFUSAL)


@contextlib.contextmanager
def policy_server(host: Host, demo: Path, policy: Path | None) -> Iterator[Server]:
    """A server with the narrow demo of a folder and the test's own nodes, under that policy or none."""
    folders = {"custom_nodes": NODES, "checkpoints": demo / "checkpoints", "loras": demo / "loras"}
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder, "paths.yaml")
        lines = "".join(f"  {kind}: {path}\n" for kind, path in folders.items())
        paths.write_text(f"policy_test:\n{lines}", encoding="utf-8")
        variables = {} if policy is None else {"UNGUIDE_POLICY": str(policy)}
        with running_server(host, arguments=("--extra-model-paths-config", str(paths)), variables=variables) as server:
            yield server


def show(server: Server, case: Case) -> Shown:
    """Return what a case comes to."""
    prompt_id = ""
    try:
        for number, graph in enumerate(case.graphs, start=1):
            more = case.request if number == len(case.graphs) else {}
            prompt_id = server.api.queue(graph, **more)
            shown = outcome(server, prompt_id)
            if shown.error:
                break
    except PromptRejectedError as error:
        return _failed(error, prompt_id)
    return shown


def outcome(server: Server, prompt_id: str) -> Shown:
    """Wait for a queued graph, and return what it comes to."""
    try:
        entry = server.api.wait(prompt_id)
    except ExecutionFailedError as error:
        return _failed(error, prompt_id)
    found = (image for output in entry["outputs"].values() for image in output.get("images", ()))
    saved = [image for image in found if image["type"] == "output"]  # a plot is none
    return Shown(tuple(server.api.view(**image) for image in saved), prompt_id=prompt_id)


def _failed(error: ExecutionFailedError | PromptRejectedError, prompt_id: str) -> Shown:
    said = str(error.details.get("exception_message", error)).strip()
    return Shown(error=said.splitlines()[0], details=str(error.details), prompt_id=prompt_id)
