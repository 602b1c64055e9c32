"""What a person sees: progress lines with the elapsed time, and errors that are one sentence."""

from __future__ import annotations

import sys
import time


class DevError(Exception):
    """A failure that its one sentence explains: what, what was found, the remedy. Shown without a traceback.

    Args:
        sentence: the explanation.
        code: the exit status; 1 for a failure, 2 for a wrong request.
    """

    def __init__(self, sentence: str, code: int = 1) -> None:
        super().__init__(sentence)
        self.code = code


class Progress:
    """Prints one line for each stage as it begins, after the seconds since the start; on stderr, so that the
    commands' own output stays clean."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def __call__(self, stage: str) -> None:
        print(f"[{self.elapsed():6.1f} s] {stage}", file=sys.stderr, flush=True)

    def elapsed(self) -> float:
        return time.monotonic() - self.started
