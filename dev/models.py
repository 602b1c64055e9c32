"""The demo's models in a workspace: its checkpoint, unpacked from the packed one that ships, and its erasure LoRAs."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from dev import cache
from dev.pip import clean_environment
from dev.report import DevError, Progress
from dev.supervise import die_with_parent
from dev.workspace import PACK, link

CHECKPOINT = "unguide-demo.safetensors"
LORAS = "unguide-demo"
DEMO = PACK / "demo"
# what the unpacked checkpoint depends on; the demo's other files train, generate and judge
SOURCES = ("demo_model.safetensors", "unpack.py", "seed.py", "shapes.py")


def prepare(python: Path, base: Path, progress: Progress) -> None:
    """Puts both where ComfyUI looks for models; what is up to date stays."""
    if (DEMO / "unpack.py").is_file():
        unpacked = unpack(python, base / "unpacked", progress)
        link(base / "models" / "checkpoints" / CHECKPOINT, unpacked / CHECKPOINT)
    if (DEMO / "loras").is_dir():
        link(base / "models" / "loras" / LORAS, DEMO / "loras")


def unpack(python: Path, folder: Path, progress: Progress) -> Path:
    """The folder of the unpacked checkpoint, made anew if any of SOURCES has changed.

    Raises: DevError with the last line that `python -m demo.unpack` printed, where it fails.
    """
    sources = [DEMO / name for name in SOURCES if (DEMO / name).is_file()]
    inputs = cache.digest([[path.name, cache.file_digest(path)] for path in sources])
    if cache.stamped_inputs(folder) == inputs:
        return folder
    cache.discard(folder)
    cache.require_space(folder.parent, 1000, "unpacking the demo model")
    progress("unpacking the demo model")
    folder.mkdir()
    result = subprocess.run(
        [str(python), "-m", "demo.unpack", str(folder / CHECKPOINT)],
        cwd=PACK,
        env=clean_environment() | {"PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_parent(signal.SIGKILL),
    )
    if result.returncode != 0 or not (folder / CHECKPOINT).is_file():
        said = (result.stdout.strip().splitlines() or ["nothing"])[-1]
        raise DevError(f"the demo model cannot be unpacked, python -m demo.unpack says '{said}'")
    cache.stamp(folder, inputs)
    return folder
