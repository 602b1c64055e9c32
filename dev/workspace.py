"""The base directory of a ComfyUI run: this pack linked into custom_nodes, the demo's models, an input folder.

One for each checkout of the pack, in the cache. ComfyUI is started with --base-directory on it, so that neither a
pinned nor a user's own ComfyUI is ever written to, and no other custom nodes are loaded.
"""

from __future__ import annotations

import os
from pathlib import Path

from dev import cache
from dev.report import Progress

PACK = Path(__file__).resolve().parent.parent
LINK = "comfyui-unguide"


def base_directory(home: Path, pack: Path = PACK) -> Path:
    """Where the workspace of that checkout is, whether it exists or not."""
    return home / "workspaces" / f"{pack.name}-{cache.digest(str(pack))[:8]}"


def prepare(base: Path, progress: Progress, pack: Path = PACK) -> None:
    """Makes the workspace, or what is missing of it."""
    for name in ("custom_nodes", "input", "output", "user", "models/checkpoints", "models/loras"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / LINK
    if not link.is_symlink() or Path(os.readlink(link)) != pack:
        progress(f"linking the pack into {link.parent}")
        link.unlink(missing_ok=True)
        link.symlink_to(pack, target_is_directory=True)
