"""Text on the node that is being executed, and in the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from comfy_execution.utils import get_executing_context
from server import PromptServer

from .records import Verdict
from .text import summary

log = logging.getLogger(__name__)


def say(text: str) -> None:
    """Put a text on the node that is being executed, where a page is looking."""
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is not None and server is not None:
        server.send_progress_text(text, context.node_id)


def show(verdicts: Sequence[Verdict], finished: bool = False) -> None:
    """Say how things stand on the node that is being executed; at the end of the run also in the log."""
    lines = [summary(verdict, finished) for verdict in verdicts]
    for line in lines if finished else ():
        log.log(logging.WARNING if "WARNING" in line else logging.INFO, "UnGuide: %s", line)
    say("\n".join(lines))
