"""Runs one command and lets it outlive neither its end nor ours: `python supervise.py [--remove FOLDER] -- COMMAND...`

The caller holds the write end of our standard input. When that closes, because the caller closed it or died in
whatever way, or when we get a signal, the command's whole process group is ended: asked first, killed after a moment.
Then FOLDER is removed and the command's exit status returned. Should we be killed ourselves, Linux ends the command.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable

PATIENCE = 5.0  # seconds between the request to end and the kill
PR_SET_PDEATHSIG = 1


def die_with_parent(sent: signal.Signals) -> Callable[[], None] | None:
    """A `preexec_fn` after which the child gets that signal when its parent dies; None where the system has no such
    thing."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, int(sent))


def end_group(process: subprocess.Popen[bytes], patience: float = PATIENCE) -> None:
    """Ends the process group that `process` leads, the members that outlive their leader included."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def caller_is_gone(seconds: float) -> bool:
    """Whether standard input closes within that time."""
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


def supervise(command: list[str]) -> int:
    """Runs the command until it ends or the caller is gone; its exit status, negative for a signal."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent(signal.SIGKILL)
    )
    try:
        while process.poll() is None and not caller_is_gone(0.2):
            pass
    finally:
        end_group(process)
    return process.returncode


def main(argv: list[str]) -> int:
    """Reads the command line and supervises."""
    options, command = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    for sent in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(sent, lambda number, _: sys.exit(128 + number))
    try:
        return supervise(command)
    finally:
        if options[:1] == ["--remove"]:
            shutil.rmtree(options[1], ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) % 256)
