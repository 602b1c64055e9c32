"""Real processes that are ended in every way; what they started must end too."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dev.server import SUPERVISE
from dev.workspace import PACK

# a process that starts another and writes both ids down; the stubborn one refuses to end when it is asked
PROGRAM = """
import os, signal, subprocess, sys, time
if sys.argv[2:] == ["stubborn"]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[1] + ".new", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""
# a background job of a script starts with Ctrl+C ignored, and these tests may run in one
HEED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
# what a test runner or a command does: hold the pipe, and wait
CALLER = f"""{HEED}
import subprocess, sys, time
subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
time.sleep(600)
"""


def supervised(*arguments: str) -> list[str]:
    return [sys.executable, str(SUPERVISE), *arguments]


def program(ids: Path, *manner: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(ids), *manner]


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether that process runs; one that has ended and is not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def started(ids: Path) -> list[int]:
    wait_for(ids.exists)
    return [int(pid) for pid in ids.read_text().split()]


def assert_all_end(pids: list[int]) -> None:
    wait_for(lambda: not any(alive(pid) for pid in pids))


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks processes up in /proc")


def test_closing_the_pipe_ends_everything_and_removes_the_folder(tmp_path: Path) -> None:
    ids, scratch = tmp_path / "ids", tmp_path / "scratch"
    scratch.mkdir()
    command = supervised("--remove", str(scratch), "--", *program(ids, "stubborn"))
    with subprocess.Popen(command, stdin=subprocess.PIPE) as supervisor:
        pids = started(ids)
        assert all(alive(pid) for pid in pids)
    assert_all_end([*pids, supervisor.pid])
    assert not scratch.exists()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_caller_that_dies_leaves_nothing_behind(tmp_path: Path, sent: signal.Signals) -> None:
    ids, scratch = tmp_path / "ids", tmp_path / "scratch"
    scratch.mkdir()
    inner = supervised("--remove", str(scratch), "--", *program(ids))
    with subprocess.Popen([sys.executable, "-c", CALLER, *inner], stderr=subprocess.DEVNULL) as caller:
        pids = started(ids)
        caller.send_signal(sent)
    assert_all_end(pids)
    wait_for(lambda: not scratch.exists())


def test_a_supervisor_that_is_killed_takes_the_command_along(tmp_path: Path) -> None:
    ids = tmp_path / "ids"
    with subprocess.Popen(supervised("--", *program(ids)), stdin=subprocess.PIPE) as supervisor:
        command, grandchild = started(ids)
        supervisor.kill()
        assert_all_end([command])
    with contextlib.suppress(ProcessLookupError):
        os.kill(grandchild, signal.SIGKILL)


def test_the_exit_status_comes_through() -> None:
    command = supervised("--", sys.executable, "-c", "raise SystemExit(7)")
    with subprocess.Popen(command, stdin=subprocess.PIPE) as supervisor:
        assert supervisor.wait(60) == 7


RUNNER = f"""{HEED}
import os, sys
from pathlib import Path
from dev.tools import run_child
sys.exit(run_child(sys.argv[1:], Path("."), dict(os.environ)))
"""
CHILD = f"""{HEED}
import os, sys, time
with open(sys.argv[1], "w") as file:
    file.write(f"{{os.getpid()}}\\n")
time.sleep(600)
"""


def test_ctrl_c_while_pytest_runs_ends_both(tmp_path: Path) -> None:
    ids = tmp_path / "ids"
    command = [sys.executable, "-c", RUNNER, sys.executable, "-c", CHILD, str(ids)]
    environment = os.environ | {"PYTHONPATH": str(PACK)}
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL) as parent:
        wait_for(lambda: ids.exists() and ids.read_text().endswith("\n"))
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.wait(60) == 128 + signal.SIGINT
    assert_all_end([int(ids.read_text())])
