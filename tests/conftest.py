"""What all tests share: the repository's place, and the pack loaded the way ComfyUI loads it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACK = "comfyui_unguide"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below tests/host and tests/workflows needs the host, and is marked so."""
    for item in items:
        if {"host", "workflows"} & set(item.path.relative_to(ROOT).parts):
            item.add_marker(pytest.mark.host)


def load_pack() -> ModuleType:
    """The pack, loaded by its location under a name of its own, as ComfyUI does it."""
    if PACK not in sys.modules:
        location = ROOT / "__init__.py"
        spec = importlib.util.spec_from_file_location(PACK, location, submodule_search_locations=[str(ROOT)])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK] = module
        spec.loader.exec_module(module)
    return sys.modules[PACK]


def pack_module(name: str) -> ModuleType:
    """A module of the pack, such as `unguide_comfy.gating`."""
    load_pack()
    return importlib.import_module(f"{PACK}.{name}")


def start_host() -> None:
    """Sets the host's options before anything of it is imported; needs `python3 dev test`'s environment."""
    if "UNGUIDE_COMFYUI" not in os.environ:
        pytest.fail("this test needs a ComfyUI: run it with `python3 dev test`", pytrace=False)
    from comfy.cli_args import args

    args.cpu = os.environ.get("UNGUIDE_HOST_DEVICE", "cpu") == "cpu"
    args.base_directory = os.environ["UNGUIDE_BASE_DIRECTORY"]
