"""From a command's arguments to a ComfyUI that is ready to run; what an earlier run left in order is reused."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from dev import cache, environment, host, models, workspace
from dev.host import Host
from dev.pip import clean_environment
from dev.report import DevError, Progress

DEVICES = ("auto", "cpu", "gpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that choose a host, the same for every command that needs one."""
    parser.add_argument(
        "--comfyui",
        metavar="VERSION",
        help=f"which pinned ComfyUI: {', '.join(host.RELEASES)} (default: {host.DEFAULT})",
    )
    parser.add_argument(
        "--device", choices=DEVICES, help="what ComfyUI runs on (default: UNGUIDE_DEVICE, else what the machine has)"
    )


def prepare(arguments: argparse.Namespace, progress: Progress) -> Host:
    """Sets up what is missing and returns the host. Raises: DevError, one sentence, where that cannot be done."""
    device = arguments.device or os.environ.get("UNGUIDE_DEVICE") or "auto"
    if device not in DEVICES:
        raise DevError(f"UNGUIDE_DEVICE is {device!r}: set it to one of {', '.join(DEVICES)}", 2)
    home = cache.home()
    if own := host.own_comfyui():
        if arguments.comfyui:
            raise DevError("COMFYUI_PATH and --comfyui each choose a ComfyUI: unset one of the two", 2)
        comfyui, python = own, own_python(own)
        device = own_device(python, device)
    else:
        wanted = host.release(arguments.comfyui or host.DEFAULT)
        device = found_device() if device == "auto" else device
        comfyui, python = pinned(wanted, home, device, progress)
    base = workspace.base_directory(home)
    with cache.locked(base, progress):
        workspace.prepare(base)
        models.prepare(python, base, progress)
    progress(f"ComfyUI in {comfyui} is ready, on the {device.upper()}")
    return Host(comfyui=comfyui, python=python, base_directory=base, device=device)


def pinned(wanted: host.Release, home: Path, device: str, progress: Progress) -> tuple[Path, Path]:
    """The folder and the python of a pinned ComfyUI, both in the cache."""
    with cache.locked(home / "hosts" / wanted.comfyui, progress):
        comfyui = host.fetch(wanted, home, progress)
        folder = home / "environments" / wanted.comfyui
        return comfyui, environment.build(comfyui, folder, device, home / "logs" / wanted.comfyui, progress)


def found_device() -> str:
    """ "gpu" where the NVIDIA driver lists one, else "cpu"."""
    if not shutil.which("nvidia-smi"):
        return "cpu"
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return "gpu" if listed.returncode == 0 and "GPU" in listed.stdout else "cpu"


def own_python(comfyui: Path) -> Path:
    """The interpreter of a user's own ComfyUI: COMFYUI_PYTHON, else its venv, else the one that runs this."""
    named = os.environ.get("COMFYUI_PYTHON")
    candidates = [comfyui / name / "bin" / "python" for name in ("venv", ".venv")]
    python = Path(named).expanduser() if named else next((p for p in candidates if p.exists()), Path(sys.executable))
    if not python.exists():
        raise DevError(f"COMFYUI_PYTHON is {python}, and no such file exists: correct it", 2)
    return python


def own_device(python: Path, wanted: str) -> str:
    """The device to use with a user's own ComfyUI: what its torch can use, unless he chose."""
    result = subprocess.run(
        [str(python), "-c", "import aiohttp, torch; print(torch.cuda.is_available())"],
        capture_output=True,
        text=True,
        env=clean_environment(),
    )
    if result.returncode != 0:
        said = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise DevError(
            f"{python} cannot run your ComfyUI, it says '{said}': set COMFYUI_PYTHON to the python that does", 2
        )
    return wanted if wanted != "auto" else "gpu" if "True" in result.stdout else "cpu"
