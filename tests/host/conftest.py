"""Models for the tests inside the host's process: real checkpoints, loaded and sampled by the host's own code."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, pack_module, start_host

start_host()

import comfy.samplers  # noqa: E402  (the host's options come first)
import comfy.sd  # noqa: E402

GOLDEN = ROOT / "tests" / "fixtures" / "golden"


@pytest.fixture(autouse=True)
def inference_mode():
    """The host executes nodes under inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def manifest() -> dict[str, Any]:
    return json.loads((GOLDEN / "c_manifest.json").read_text())


@pytest.fixture(scope="session")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_recipe", GOLDEN / "recipe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden_model(manifest: dict[str, Any], recipe: ModuleType):
    """The golden section C network as a `ModelPatcher` of the host: an SD 1.x UNet with reproducible random weights."""
    return comfy.sd.load_diffusion_model_state_dict(recipe.unet_state_dict(manifest))


@pytest.fixture(scope="session")
def golden_lora(tmp_path_factory: pytest.TempPathFactory):
    """The golden adapter, from a file in the official format."""
    path = tmp_path_factory.mktemp("lora") / "golden.pth"
    torch.save(load_file(GOLDEN / "c_lora.safetensors"), path)
    adapter = pack_module("unguide_core.formats").load_adapter(path)
    return pack_module("unguide_comfy.erasure").ErasureLora(path.name, adapter)


def conditioning(context: torch.Tensor) -> list[list[Any]]:
    """A CONDITIONING of text states [tokens, width]."""
    return [[context[None], {}]]
