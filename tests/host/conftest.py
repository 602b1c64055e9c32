"""Models for the tests inside the host's process: real checkpoints, loaded and sampled by the host's own code."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dev.pack import lora_patches
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


@pytest.fixture(scope="session")
def merged_model(golden_model, golden_lora):
    """The golden network with the adapter merged into its weights by the host's own LoRA loader."""
    patches = lora_patches(golden_lora.adapter)
    model, _ = comfy.sd.load_lora_for_models(golden_model, None, patches, 1.0, 0.0)
    return model


@pytest.fixture(scope="session")
def encode(manifest: dict[str, Any], recipe: ModuleType):
    """The golden data's stand-in text encoder: a prompt's CONDITIONING."""
    return lambda prompt, tokens=77: conditioning(recipe.text_context(manifest["salt"], prompt, tokens))


def fixed(model: Any, lora: Any, weight: float) -> Any:
    """A model that blends with a fixed weight."""
    gating, deciding = pack_module("unguide_comfy.gating"), pack_module("unguide_comfy.deciding")
    gate = gating.Gate(gating.FIXED, deciding.ProbeSettings(weight_detected=weight))
    return gating.guided(model, (lora,), gate)


CHECKPOINT = "unguide-demo.safetensors"
LORA = "unguide-demo/selective/cat.safetensors"


@pytest.fixture(scope="session")
def demo() -> Demo:
    """The embedded demo model, loaded by the host's own node."""
    import nodes

    return Demo(*nodes.CheckpointLoaderSimple().load_checkpoint(CHECKPOINT))


@pytest.fixture(scope="session")
def demo_lora(demo: Demo):
    """The demo's erasure LoRA for "cat", its prompts encoded."""
    with torch.inference_mode():
        return pack_module("unguide_comfy.erasure").load_erasure_lora(LORA, 1.0, demo.clip)


class Demo:
    """A loaded checkpoint: `model`, `clip`, `vae`, and its prompts as CONDITIONING."""

    def __init__(self, model: Any, clip: Any, vae: Any):
        self.model, self.clip, self.vae = model, clip, vae

    def encode(self, prompt: str) -> list[list[Any]]:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))
