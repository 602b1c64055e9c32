"""The pack inside a ComfyUI of this very process, for tests and measurements: no server, the host's own code.

Runs in the host's environment, with the variables that `python3 dev test` sets.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType

from dev.workspace import PACK

NAME = "unguide"


def start_host() -> None:
    """Sets the host's options; to be called before anything of the host is imported.

    Raises: RuntimeError without the environment of `python3 dev test`.
    """
    if "UNGUIDE_COMFYUI" not in os.environ:
        raise RuntimeError("this needs a ComfyUI on the import path: run it with `python3 dev test`")
    # up to 0.18, nodes.py puts comfy/, which holds another utils, in front of the host, and workers inherit the path
    hiding = os.path.join(os.environ["UNGUIDE_COMFYUI"], "comfy")
    sys.path[:] = [path for path in sys.path if path != hiding]
    import utils  # noqa: F401 - as main.py does it, before nodes.py
    from comfy.cli_args import args

    args.cpu = os.environ.get("UNGUIDE_HOST_DEVICE", "cpu") == "cpu"
    args.base_directory = os.environ["UNGUIDE_BASE_DIRECTORY"]


def load_pack() -> ModuleType:
    """The pack, loaded by its location under a name of its own, as ComfyUI does it."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module
        spec.loader.exec_module(module)
    return sys.modules[NAME]


def pack_module(name: str) -> ModuleType:
    """A module of the pack, such as `unguide_comfy.gate.attach`."""
    load_pack()
    return importlib.import_module(f"{NAME}.{name}")
