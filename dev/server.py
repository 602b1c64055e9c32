"""One running ComfyUI server: started headless on loopback, waited for, stopped with everything that it started.

`with running_server(host) as server: entry = server.api.run(graph)` is all that a caller needs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from dev.api import Api, ApiError
from dev.host import Host
from dev.pip import clean_environment
from dev.report import DevError

SUPERVISE = Path(__file__).with_name("supervise.py")
LOOPBACK = "127.0.0.1"
KEPT_LOGS = 20
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def require_free(port: int) -> None:
    """Raises DevError if something listens on that port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen()  # binding alone succeeds beside a listener that lets its address be shared
        except (OSError, OverflowError) as error:
            in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "is in use" if in_use else f"cannot be used ({error})"
            raise DevError(f"port {port} {reason}: give another with --port, or none for a free one", 2) from None


class Server:
    """A ComfyUI process under supervision. Its output, user and temporary files are in `run_folder`, removed with it.

    Args:
        host: what to run.
        port: where it listens; None for a free port.
        keep_output: write to the workspace's own output and user folders, which stay.
        arguments: more command line arguments for ComfyUI.
        variables: more environment variables.
    """

    def __init__(
        self,
        host: Host,
        port: int | None = None,
        *,
        keep_output: bool = False,
        arguments: tuple[str, ...] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        if port is not None:
            require_free(port)
        self.port = port or free_port()
        self.api = Api(f"http://{LOOPBACK}:{self.port}", self.check)
        runs = host.base_directory / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        self.run_folder = Path(tempfile.mkdtemp(prefix="run-", dir=runs))
        kept = host.base_directory if keep_output else self.run_folder
        self.output_directory = kept / "output"
        self.log = _new_log(host.base_directory / "logs")
        command = [str(host.python), str(host.comfyui / "main.py"), *self._arguments(host, kept), *arguments]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SUPERVISE), "--remove", str(self.run_folder), "--", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.run_folder,
                env=clean_environment()
                | host.environment()
                | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
                | dict(variables or {}),
                start_new_session=True,
            )

    def _arguments(self, host: Host, kept: Path) -> list[str]:
        (kept / "output").mkdir(exist_ok=True)
        (kept / "user").mkdir(exist_ok=True)
        return [
            *(["--cpu"] if host.device == "cpu" else []),
            *("--listen", LOOPBACK, "--port", str(self.port), "--disable-auto-launch", "--disable-api-nodes"),
            *("--base-directory", str(host.base_directory)),
            *("--output-directory", str(kept / "output"), "--user-directory", str(kept / "user")),
            *("--temp-directory", str(self.run_folder)),
            *("--database-url", f"sqlite:///{self.run_folder / 'comfyui.db'}"),
        ]

    def check(self) -> None:
        """Raises DevError if the process has ended."""
        if self.process.poll() is not None:
            said = _last_line(self.log)
            status = self.process.returncode
            raise DevError(f"ComfyUI stopped by itself (exit status {status}), its log {self.log} ends with '{said}'")

    def wait_until_ready(self, timeout: float = 600.0) -> None:
        """Returns once the server answers. Raises: DevError if it ends before, or at the timeout."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(ApiError, OSError, ValueError):
                self.api.get("/system_stats")
                return
            time.sleep(0.2)
        raise DevError(f"ComfyUI did not answer within {timeout:.0f} s (log: {self.log})")

    def stop(self, patience: float = 60.0) -> None:
        """Ends the server and everything it started; nothing if it has ended."""
        assert self.process.stdin is not None  # it is a pipe
        self.process.stdin.close()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # the server dies with its supervisor
            self.process.wait()


@contextlib.contextmanager
def running_server(
    host: Host,
    port: int | None = None,
    *,
    keep_output: bool = False,
    arguments: tuple[str, ...] = (),
    variables: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server that answers, stopped at the end of the block however that comes; arguments as for Server."""
    server = Server(host, port, keep_output=keep_output, arguments=arguments, variables=variables)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def _new_log(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.glob("server-*.log"))[:-KEPT_LOGS]:
        old.unlink(missing_ok=True)
    return folder / f"server-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns() % 10000:04d}.log"


def _last_line(log: Path) -> str:
    text = COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "nothing")
