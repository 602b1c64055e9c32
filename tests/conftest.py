"""What all tests share: the repository's place, and the pack loaded the way ComfyUI loads it."""

from __future__ import annotations

import pytest

from dev.pack import load_pack, pack_module, start_host
from dev.workspace import PACK as ROOT

__all__ = ["ROOT", "load_pack", "pack_module", "start_host"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below tests/host and tests/workflows needs the host, and is marked so."""
    for item in items:
        if {"host", "workflows"} & set(item.path.relative_to(ROOT).parts):
            item.add_marker(pytest.mark.host)
