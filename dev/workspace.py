"""The base directory of a ComfyUI run: this pack linked into custom_nodes, the demo's models, an input folder.

One for each checkout of the pack, in the cache. ComfyUI is started with --base-directory on it, so that neither a
pinned nor a user's own ComfyUI is ever written to, and no other custom nodes are loaded.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dev import cache

PACK = Path(__file__).resolve().parent.parent
LINK = "unguide"


def base_directory(home: Path, pack: Path = PACK) -> Path:
    """Where the workspace of that checkout is, whether it exists or not."""
    return home / "workspaces" / f"{pack.name}-{cache.digest(str(pack))[:8]}"


def prepare(base: Path, pack: Path = PACK) -> None:
    """Makes the workspace, or what is missing of it."""
    make_folders(base)
    for place in (base / "custom_nodes").iterdir():
        if place.is_symlink() and place.name != LINK:
            place.unlink()  # the pack's link under an earlier name, which would load it twice
    link(base / "custom_nodes" / LINK, pack)


def make_folders(base: Path) -> None:
    """Makes the folders that ComfyUI expects below its base directory."""
    for name in ("custom_nodes", "input", "output", "user", "models/checkpoints", "models/loras"):
        (base / name).mkdir(parents=True, exist_ok=True)


def link(place: Path, target: Path) -> None:
    """Makes `place` a link to `target`, whatever stood there."""
    if place.is_symlink() and Path(os.readlink(place)) == target:
        return
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(target)
