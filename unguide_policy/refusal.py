"""Refusals, and errors that do not show the pack's files to a client."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Any

PACK = str(Path(__file__).parents[1])
"""As the host has loaded it, so that it is how the frames of a traceback begin."""

SHORT = "this server does not generate this image"


class Refused(RuntimeError):
    """The policy refuses an image or a training.

    Args:
        reason: what is refused, for the log; shown to clients only where the policy tells them.
    """

    tell = False

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"this server's policy refuses {self.reason}" if self.tell else SHORT


Refused.__module__ = "builtins"  # the host's dialog shows it before the name


def is_ours(error: BaseException) -> bool:
    """Return whether an error was raised by the pack's own code."""
    files = _files(error.__traceback__)
    return bool(files) and files[-1].startswith(PACK)


def without_our_frames(error: BaseException) -> BaseException:
    """Return the error with a traceback that names no file of the pack; the host sends it to clients."""
    kept: TracebackType | None = None
    links = []
    link = error.__traceback__
    while link is not None:
        links.append(link)
        link = link.tb_next
    for link in reversed(links):
        if not link.tb_frame.f_code.co_filename.startswith(PACK):
            kept = TracebackType(kept, link.tb_frame, link.tb_lasti, link.tb_lineno)
    return error.with_traceback(kept)


def named(thing: Any) -> tuple[str, str]:
    """Return what a thing's class is called, and its file.

    The host loads each file of comfy_extras twice, so that `isinstance` fails with the class that is imported here.
    """
    kind = type(thing)
    return kind.__name__, Path(getattr(sys.modules.get(kind.__module__), "__file__", None) or "").name


def _files(traceback: TracebackType | None) -> list[str]:
    files = []
    while traceback is not None:
        files.append(traceback.tb_frame.f_code.co_filename)
        traceback = traceback.tb_next
    return files
