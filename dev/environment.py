"""The virtual environment of a pinned ComfyUI: its requirements, unguide_train's and unguide_bench's, and the tools
for test and lint.

pip decides which build of torch fits the machine: it takes a CPU build where the package index (or an extra index that
pip is set to) has one, else the plain one. The registry's torchvision and torchaudio are CUDA builds; beside a CPU
torch they are made importable here.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from dev import cache
from dev.pip import clean_environment, pip
from dev.report import DevError, Progress
from dev.supervise import die_with_parent

REQUIREMENTS = Path(__file__).with_name("requirements")
SHIM = Path(__file__).with_name("site") / "unguide_dev_torchvision.py"
# hundreds of MB of example graphs, missed by ComfyUI with a message only
SKIPPED = ("comfyui-workflow-templates",)
# GPU builds of torch bring some 5 GB of libraries
MEGABYTES = {"cpu": 4000, "gpu": 12000}


def build(comfyui: Path, folder: Path, device: str, logs: Path, progress: Progress) -> Path:
    """The python of the environment in `folder`, which is built, completed or repaired where necessary."""
    wanted = host_requirements(comfyui)
    inputs = cache.digest(
        wanted,
        [path.read_text(encoding="utf-8") for path in (*sorted(REQUIREMENTS.glob("*.txt")), SHIM)],
        sys.version,
    )
    python = folder / "bin" / "python"
    found = cache.stamped_inputs(folder)
    if found == inputs:
        return python
    if found is None:
        if folder.exists():
            progress("repairing the environment: it is incomplete and is built anew")
            cache.discard(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        cache.require_space(folder.parent, MEGABYTES[device], "the environment")
        progress("creating the environment")
        create(folder)
    install(python, wanted, logs, progress)
    progress("checking torch, torchvision and torchaudio")
    mend_torchvision(python, folder)
    mend_torchaudio(python, folder)
    if device == "gpu" and failure(python, "torch; assert torch.cuda.is_available()"):
        raise DevError(f"the torch in {folder} sees no GPU: update the driver, or choose --device cpu")
    cache.stamp(folder, inputs)
    return python


def host_requirements(comfyui: Path) -> list[str]:
    """What that ComfyUI asks for, less torch and its companions (pinned here) and what is skipped."""
    lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    stripped = (line.split("#")[0].strip() for line in lines)
    dropped = {"torch", "torchvision", "torchaudio", *SKIPPED}
    return [line for line in stripped if line and re.split(r"[^\w.-]", line)[0].lower() not in dropped]


def create(folder: Path) -> None:
    """Creates an empty virtual environment with pip in it."""
    result = subprocess.run(
        [sys.executable, "-m", "venv", str(folder)],
        capture_output=True,
        text=True,
        env=clean_environment(),
        preexec_fn=die_with_parent(signal.SIGKILL),
    )
    if result.returncode != 0:
        said = (result.stdout + result.stderr).strip().splitlines() or ["nothing"]
        raise DevError(f"{sys.executable} -m venv failed and said '{said[0]}' (on Debian, install python3-venv)")


def install(python: Path, wanted: list[str], logs: Path, progress: Progress) -> None:
    """Installs torch first, by itself, so that nothing else can choose another build of it."""
    constraints = str(REQUIREMENTS / "constraints.txt")
    torch = str(REQUIREMENTS / "torch.txt")
    progress("installing torch")
    pip(
        python,
        *("install", "--requirement", torch, "--constraint", constraints),
        log=logs / "pip-torch.log",
        purpose="installing torch",
    )
    listed = logs / "requirements.txt"
    cache.write_atomically(listed, "\n".join(wanted) + "\n")
    progress(f"installing ComfyUI's {len(wanted)} requirements, unguide_train's, unguide_bench's and the test tools")
    ours = [str(REQUIREMENTS / name) for name in ("tools.txt", "train.txt", "bench.txt")]
    pip(
        python,
        *("install", "--requirement", str(listed), *(part for name in ours for part in ("--requirement", name))),
        *("--constraint", constraints, "--constraint", torch),
        log=logs / "pip-requirements.log",
        purpose="installing ComfyUI's requirements",
    )
    pip(
        python,
        *("install", "--no-deps", "--requirement", str(REQUIREMENTS / "alone.txt")),
        log=logs / "pip-alone.log",
        purpose="installing what stands alone",
    )


def failure(python: Path, module: str) -> str | None:
    """The last line of what `import module` printed where it failed, else None."""
    result = subprocess.run(
        [str(python), "-c", f"import {module}"], capture_output=True, text=True, env=clean_environment()
    )
    return None if result.returncode == 0 else (result.stderr.strip().splitlines() or ["no message"])[-1]


def site_packages(folder: Path) -> Path:
    """The environment's site-packages."""
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def mend_torchvision(python: Path, folder: Path) -> None:
    """Where torchvision does not import (a CUDA build beside a CPU torch), lets it."""
    said = failure(python, "torchvision")
    if said and "torchvision::nms" in said:
        site = site_packages(folder)
        shutil.copyfile(SHIM, site / SHIM.name)
        (site / f"{SHIM.stem}.pth").write_text(f"import {SHIM.stem}\n", encoding="utf-8")
        said = failure(python, "torchvision")
    if said:
        raise DevError(f"torchvision does not import in {folder}: '{said}'; its build does not fit torch's")


def mend_torchaudio(python: Path, folder: Path) -> None:
    """Where torchaudio's native libraries do not load (likewise), removes them: it then falls back to Python."""
    said = failure(python, "torchaudio")
    if said and "Could not load this library" in said:
        for library in (site_packages(folder) / "torchaudio" / "lib").glob("*.so"):
            library.unlink()
        said = failure(python, "torchaudio")
    if said:
        raise DevError(f"torchaudio does not import in {folder}: '{said}'; its build does not fit torch's")
