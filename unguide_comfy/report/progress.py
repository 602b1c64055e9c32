"""Text on the node that is being executed, verdicts for the page, and lines in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import comfy.utils
from comfy_execution.utils import get_executing_context
from server import PromptServer

from .records import Verdict
from .text import UNSURE, Line, verdict_line

log = logging.getLogger(__name__)

EVENT = "unguide.verdict"
"""The message by which the page's extension hears of a verdict: the node's id, and a `Line`'s fields."""


def say(text: str) -> None:
    """Put a text on the node that is being executed, where a page is looking."""
    node, server = _watched()
    if server is not None:
        server.send_progress_text(text, node)


def show(verdicts: Sequence[Verdict], *, sampling: bool = True, finished: bool = False) -> None:
    """Say how things stand on the node that is being executed, and on the UnGuide nodes behind its model.

    Args: as for `verdict_line`. At the end of the run it is said in the log as well.
    """
    line = verdict_line(verdicts, sampling=sampling, finished=finished)
    if finished:
        log.log(logging.WARNING if line.kind == UNSURE else logging.INFO, "UnGuide: %s", line.text)
    say(line.text)
    node, server = _watched()
    if server is None:
        return
    _tell(server, node, line)
    for origin in {verdict.node for verdict in verdicts} - {"", node}:
        own = [verdict for verdict in verdicts if verdict.node == origin]
        _tell(server, origin, verdict_line(own, sampling=sampling, finished=finished))


class Counter:
    """Counts on the node that is being executed, in words and in its progress bar, and says how long the rest takes.

    Args:
        doing: what is being done, such as "Encoding".
        things: what is counted, such as "prompts".
    """

    def __init__(self, doing: str, things: str):
        self.doing, self.things = doing, things
        self.bar, self.started = comfy.utils.ProgressBar(1), time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        """Show how many are done of how many."""
        left = (time.perf_counter() - self.started) / done * (total - done)
        self.bar.update_absolute(done, total)
        say(f"{self.doing} {self.things}: {done} of {total}; {left:.0f} s left")


def _tell(server: Any, node: str, line: Line) -> None:
    server.send_sync(EVENT, {"node": node, **asdict(line)}, server.client_id)


def _watched() -> tuple[str, Any]:
    """The node that is being executed and the server that tells the page; no server outside of one."""
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    return ("", None) if context is None or server is None else (context.node_id, server)
