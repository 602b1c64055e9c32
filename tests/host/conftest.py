"""Models for the tests inside the host's process: real checkpoints, loaded and sampled by the host's own code."""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from demo.shapes import NARROW_WIDTH
from experiments.narrow import load_narrow_model, narrow_lora
from experiments.studio import lora_patches
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


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch):
    """Calibrations fit their image probes to a few rough images, in seconds."""
    image = pack_module("unguide_comfy.probe.image")
    for name, few in {"CONCEPT_IMAGES": 8, "OTHER_IMAGES": 8, "STEPS": 2}.items():
        monkeypatch.setattr(image, name, few)


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
    return pack_module("unguide_comfy.lora.load").ErasureLora(path.name, adapter)


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


class Observer:
    """Keeps what the sampling runs of a guided model report: the verdict on each erasure LoRA, and the cost."""

    def __init__(self) -> None:
        self.runs: list[tuple[Any, Any]] = []

    def __call__(self, verdicts: Any, cost: Any) -> None:
        self.runs.append((verdicts, cost))

    @property
    def verdicts(self) -> Any:
        """The last run's verdicts."""
        return self.runs[-1][0]

    @property
    def cost(self) -> Any:
        """The last run's cost."""
        return self.runs[-1][1]

    @property
    def decision(self) -> Any:
        """The last run's leading decision on its last erasure LoRA."""
        return self.verdicts[-1].decision


def settings(**chosen: Any) -> Any:
    """The gate's settings."""
    return pack_module("unguide_comfy.probe.settings").Settings(**chosen)


def guided(model: Any, loras: Any, *arguments: Any, observer: Any = None, **chosen: Any) -> Any:
    """A model behind the gate of one or several erasure LoRAs, with some settings.

    Args:
        arguments: further ones of `attach.guided`, such as decisions.
    """
    loras = loras if isinstance(loras, tuple) else (loras,)
    attach = pack_module("unguide_comfy.gate.attach")
    return attach.guided(model, loras, settings(**chosen), *arguments, observer=observer)


def fixed(model: Any, lora: Any, weight: float) -> Any:
    """A model that always blends, with one weight."""
    return guided(model, lora, decide="always erase", weight_detected=weight)


def latent(batch: int = 1, size: int = 8, **more: Any) -> dict[str, Any]:
    """An empty latent."""
    return {"samples": torch.zeros(batch, 4, size, size), **more}


def ksampler(
    model: Any,
    positive: Any,
    negative: Any,
    image: Any = None,
    *,
    batch: int = 1,
    steps: int = 3,
    cfg: float = 4.0,
    sampler_name: str = "euler",
    scheduler: str = "normal",
    seed: int = 3,
    last_step: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """KSampler's latents, from an empty latent if no image is given."""
    import nodes

    (out,) = nodes.common_ksampler(
        model,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        negative,
        latent(batch) if image is None else image,
        last_step=last_step,
        **options,
    )
    return out["samples"]


CHECKPOINT = "unguide-demo.safetensors"
LORA = "unguide-demo/selective/cat.safetensors"
CAT = "a photo of the cat"
UNRELATED = ("a photo of the dog", "a photo of the ship", "a photo of the forest", "")


@pytest.fixture(scope="session")
def wide() -> Demo:
    """The embedded demo model, loaded by the host's own node; without the idle layers of its text encoder."""
    import nodes

    loaded = Demo(*nodes.CheckpointLoaderSimple().load_checkpoint(CHECKPOINT))
    pack_module("nodes.demo").skip_idle_layers(loaded.clip)
    return loaded


@pytest.fixture(scope="session")
def demo(wide: Demo) -> Demo:
    """Its narrow twin, the same function at an eighth of the work; tests/host/test_benchmark.py compares the two."""
    return Demo(load_narrow_model(), wide.clip, wide.vae)


@pytest.fixture(scope="session")
def text_lora(demo: Demo):
    """The demo's erasure LoRA for "cat" as it is shipped, its prompts encoded."""
    with torch.inference_mode():
        return load("selective", "cat", demo)


@pytest.fixture(scope="session")
def demo_lora(text_lora: Any):
    """The same without the text stage, which would decide most prompts by itself."""
    return without_text(text_lora)


def without_text(lora: Any) -> Any:
    """An erasure LoRA whose calibration has no text stage."""
    card = replace(lora.adapter.card, calibration={**lora.adapter.card.calibration, "text": None})
    return replace(lora, adapter=replace(lora.adapter, card=card))


def load(kind: str, concept: str, demo: Demo) -> Any:
    """An erasure LoRA of the demo, for the narrow model where that is given."""
    name = f"unguide-demo/{kind}/{concept}.safetensors"
    lora = pack_module("unguide_comfy.lora.load").load_erasure_lora(name, 1.0, demo.clip)
    width = demo.model.model.diffusion_model.model_channels
    return narrow_lora(lora, demo.model) if width == NARROW_WIDTH else lora


@dataclass(frozen=True)
class Trained:
    """An adapter that was trained on the host's model, uncalibrated, and its losses."""

    adapter: Any
    losses: list[float]
    held_out: list[float]


def trained_adapter(model: Any, job: Any, latent: torch.Tensor, observer: Any = None) -> Trained:
    """The adapter of a training job."""
    done = pack_module("unguide_comfy.train.job").train(model, job, latent, observer)
    finish = pack_module("unguide_core.training.finish").finish
    adapter = finish(done.training, done.card, None, log=logging.warning)
    return Trained(adapter, done.training.losses, done.training.held_out)


class Demo:
    """A loaded checkpoint: `model`, `clip`, `vae`, and its prompts as CONDITIONING."""

    def __init__(self, model: Any, clip: Any, vae: Any):
        self.model, self.clip, self.vae = model, clip, vae
        self.encoded: dict[str, list[list[Any]]] = {}

    def encode(self, prompt: str) -> list[list[Any]]:
        """A conditioning of the caller's own; the tensors of equal prompts are the same."""
        if prompt not in self.encoded:
            self.encoded[prompt] = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))
        return [[states, dict(options)] for states, options in self.encoded[prompt]]
