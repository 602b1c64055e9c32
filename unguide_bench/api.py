"""The HTTP API of a running ComfyUI, with the standard library alone.

It does not know the server's process or files.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from typing import Any

Graph = dict[str, dict[str, Any]]
"""A workflow in ComfyUI's API format: node id -> {"class_type": ..., "inputs": ...}."""

POLL_QUEUE = 0.5
"""Seconds between two queries of the queue for a prompt that is not known to run: how exactly its start is known."""
CHECK_QUEUE_AFTER = 5.0
"""Seconds between two queries for a prompt that runs: how fast a restarted server is noticed."""
RUNNING, PENDING = "queue_running", "queue_pending"
"""The two parts of ComfyUI's queue."""


class ApiError(Exception):
    """What a ComfyUI did not do, in one sentence."""


class NoAnswerError(ApiError):
    """The server does not answer, or has forgotten what it was asked: it is gone, or was restarted."""


class PromptRejectedError(ApiError):
    """ComfyUI did not accept a graph; `details` is its whole answer."""

    def __init__(self, details: dict[str, Any]) -> None:
        super().__init__(f"ComfyUI rejected the workflow: {_rejection(details)}")
        self.details = details


class ExecutionFailedError(ApiError):
    """A node raised while it ran; `details` is ComfyUI's message: exception_type, node_id, traceback and more."""

    def __init__(self, details: dict[str, Any]) -> None:
        node = f"{details.get('node_type', 'a node')} (node {details.get('node_id', '?')})"
        super().__init__(f"{node} failed: {str(details.get('exception_message', details)).strip()}")
        self.details = details


def _rejection(details: dict[str, Any]) -> str:
    sentences = [str(details.get("error", {}).get("message", "unknown reason"))]
    for node, found in (details.get("node_errors") or {}).items():
        for error in found.get("errors", []):
            sentences.append(f"{found.get('class_type')} (node {node}): {error.get('message')}, {error.get('details')}")
    return "; ".join(sentences)


def seconds_of(entry: dict[str, Any]) -> float:
    """How long the server worked on a finished prompt, by its history entry."""
    times = {kind: details["timestamp"] for kind, details in entry["status"]["messages"] if "timestamp" in details}
    return round((times["execution_success"] - times["execution_start"]) / 1000.0, 3)


class Api:
    """Calls to one server.

    Args:
        url: "http://127.0.0.1:8188".
        check: called while waiting; raises if there is no point in going on, as where the server has died.
    """

    def __init__(self, url: str, check: Callable[[], None] = lambda: None) -> None:
        self.url = url
        self.check = check

    def request(self, path: str, data: Any = None, timeout: float = 120.0) -> bytes:
        """The body of the answer to a GET, or to a POST of `data` as JSON.

        Raises: NoAnswerError; ApiError for an answer that is an error.
        """
        try:
            return self._send(path, data, timeout)
        except urllib.error.HTTPError as error:
            raise ApiError(
                f"{self.url}{path} does not answer like a ComfyUI ({error}); give the address of one"
            ) from error

    def get(self, path: str, **query: str) -> Any:
        """The JSON answer to a GET, as of /object_info, /system_stats, /queue. Raises: as `request`."""
        body = self.request(f"{path}?{urllib.parse.urlencode(query)}" if query else path)
        try:
            return json.loads(body)
        except ValueError as error:
            raise ApiError(f"{self.url}{path} does not answer with JSON; give the address of a ComfyUI") from error

    def _send(self, path: str, data: Any, timeout: float = 120.0) -> bytes:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, data=body, headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException) as error:
            self.check()
            raise NoAnswerError(f"ComfyUI at {self.url} does not answer: {error}") from error

    def queue(self, graph: Graph, **more: Any) -> str:
        """Queues a graph and returns its prompt id. Raises: PromptRejectedError with the reasons for each node.

        Args:
            more: what else the request holds, such as partial_execution_targets.
        """
        try:
            answer = self._send("/prompt", {"prompt": graph, "client_id": uuid.uuid4().hex, **more})
        except urllib.error.HTTPError as error:
            raise PromptRejectedError(_json_or_text(error.read())) from None
        return str(json.loads(answer)["prompt_id"])

    def wait(self, prompt_id: str, timeout: float = 600.0) -> dict[str, Any]:
        """The finished prompt's history entry ("outputs", "status", "prompt").

        Args:
            timeout: seconds that it may run. Its time behind other prompts in the queue does not count.
        Raises: ExecutionFailedError if a node raised or the run was interrupted, NoAnswerError if the server does not
            know the prompt any more, ApiError at the timeout, after which the prompt is cancelled.
        """
        place, check = PENDING, 0.0
        deadline = float("inf")
        while time.monotonic() < deadline:
            if time.monotonic() >= check:
                place = self._place(prompt_id)
                if place == RUNNING and deadline == float("inf"):
                    deadline = time.monotonic() + timeout
                check = time.monotonic() + (CHECK_QUEUE_AFTER if place == RUNNING else POLL_QUEUE)
            # after the queue, so that what finishes between the two is not taken for forgotten
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is None and not place:
                raise NoAnswerError(f"ComfyUI at {self.url} has forgotten the workflow: it was restarted")
            if entry and entry.get("status", {}).get("completed"):
                return dict(entry)
            if entry and entry.get("status", {}).get("status_str") == "error":
                raise ExecutionFailedError(_error_message(entry["status"].get("messages", [])))
            self.check()
            time.sleep(0.1)
        self.cancel(prompt_id)
        raise ApiError(f"the workflow did not finish within {timeout:g} s of running; it was cancelled")

    def _place(self, prompt_id: str) -> str:
        """The part of the queue that a prompt is in; "" where it is in none."""
        queue = self.get("/queue")
        return next((part for part in (RUNNING, PENDING) if any(item[1] == prompt_id for item in queue[part])), "")

    def run(self, graph: Graph, timeout: float = 600.0) -> dict[str, Any]:
        """Queues a graph and waits for it: its history entry. What a KeyboardInterrupt leaves is cancelled."""
        prompt_id = self.queue(graph)
        try:
            return self.wait(prompt_id, timeout)
        except KeyboardInterrupt:
            with contextlib.suppress(ApiError):
                self.cancel(prompt_id)
            raise

    def cancel(self, prompt_id: str) -> None:
        """Takes a prompt out of the queue, or stops it if it runs. Others' prompts stay."""
        self.request("/queue", {"delete": [prompt_id]})
        if self._place(prompt_id) == RUNNING:
            self.request("/interrupt", {"prompt_id": prompt_id})

    def interrupt(self) -> None:
        """Stops what runs."""
        self.request("/interrupt", {})

    def images(self, entry: dict[str, Any]) -> dict[str, list[bytes]]:
        """The image files that a finished prompt wrote, by the id of the node that did."""
        return {
            node: [self.view(**image) for image in output["images"]]
            for node, output in entry["outputs"].items()
            if output.get("images")
        }

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        """One file of the server's output, temp or input folder."""
        query = urllib.parse.urlencode({"filename": filename, "subfolder": subfolder, "type": type})
        return self.request(f"/view?{query}")


def _json_or_text(body: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(body))
    except ValueError:
        return {"error": {"message": body.decode(errors="replace")}}


def _error_message(messages: list[Any]) -> dict[str, Any]:
    for kind, details in messages:
        if kind == "execution_error":
            return dict(details)
        if kind == "execution_interrupted":
            return {**details, "exception_message": "the run was interrupted"}
    return {"exception_message": "no reason given"}
