"""The cache folder: where it is, a lock on it, free space, and stamps that tell a finished folder from a broken one.

A stamp stands beside the folder it vouches for and is written last, in one atomic step. It holds a digest of what the
folder was made from and the size of every file in it; bytes changed at equal size are not noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dev.report import DevError, Progress

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]


def home() -> Path:
    """The cache folder: UNGUIDE_DEV_HOME, or unguide-dev in the user's cache directory."""
    if chosen := os.environ.get("UNGUIDE_DEV_HOME"):
        return Path(chosen).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "unguide-dev"


@contextlib.contextmanager
def locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Holds a folder's lock, so that two set-ups never write into it at once; freed by the system if we die."""
    if fcntl is None:
        raise DevError("dev needs Linux or macOS (on Windows, run it in WSL)", 2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise DevError(
            f"the cache folder {folder} cannot be written ({error.strerror}): set UNGUIDE_DEV_HOME to another folder"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another set-up of the same to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def digest(*inputs: object) -> str:
    """One digest for what a folder is made from: anything that JSON takes."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader finds the old text or the new one, never a part."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _sizes(folder: Path) -> dict[str, int]:
    sizes = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in files:
            path = os.path.join(parent, name)
            sizes[os.path.relpath(path, folder)] = os.stat(path).st_size
    return sizes


def _stamp_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".stamp.json")


def stamp(folder: Path, inputs: str) -> None:
    """Records that `folder` is complete, made from `inputs` (a digest)."""
    write_atomically(_stamp_file(folder), json.dumps({"inputs": inputs, "sizes": _sizes(folder)}))


def stamped_inputs(folder: Path) -> str | None:
    """The digest of what `folder` was made from, or None where it is absent, unfinished or damaged."""
    try:
        record = json.loads(_stamp_file(folder).read_text(encoding="utf-8"))
        complete = all(os.stat(folder / name).st_size == size for name, size in record["sizes"].items())
        return record["inputs"] if complete else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def discard(folder: Path) -> None:
    """Removes a folder, its stamp first: a removal that breaks off leaves an unstamped folder, not a false claim."""
    _stamp_file(folder).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def require_space(folder: Path, megabytes: int, purpose: str) -> None:
    """Raises DevError if the disk that holds `folder` has less than `megabytes` free."""
    free = shutil.disk_usage(folder).free // (1 << 20)
    if free < megabytes:
        raise DevError(
            f"{purpose} needs {megabytes} MB of free disk and {folder} has {free} MB: "
            "free some, or set UNGUIDE_DEV_HOME to a folder on another disk"
        )
