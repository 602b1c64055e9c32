"""The demo's models in a workspace: its checkpoint, unpacked from the seed file that ships, and its erasure LoRAs."""

from __future__ import annotations

from pathlib import Path

from dev.report import Progress


def prepare(python: Path, base: Path, progress: Progress) -> None:
    """Unpacks and links what ships with the pack; nothing where it is up to date."""
