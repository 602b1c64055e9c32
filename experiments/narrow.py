"""The demo model at its narrow width: the shipped checkpoint's function at a fraction of the work.

The shipped UNet is the narrow one with every channel copied five times (`demo.seed`). Here the host's own SD 1.5 class
runs the narrow weights, so that its samplers, wrappers and LoRA patches do what they do with the checkpoint, to fp32
summation (`python3 dev benchmark` compares the two on every run). For measurements of many thousands of images.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from demo.erasure import PREFIX, narrowed
from demo.narrow import Narrow, load_narrow
from demo.seed import COPIES, narrow_unet_state_dict
from demo.shapes import NARROW_WIDTH
from demo.unet import CHANNEL_MULT, CONTEXT_DIM, HEADS
from dev.pack import pack_module
from unguide_core.adapter import LowRank


def tokenizer_folder() -> Path:
    """Return the host's folder of CLIP's tokenizer."""
    return Path(os.environ["UNGUIDE_COMFYUI"]) / "comfy" / "sd1_tokenizer"


@lru_cache(maxsize=1)
@torch.inference_mode(False)
def plain_narrow_model() -> Narrow:
    """Return the narrow model in plain torch, through which gradients flow."""
    return load_narrow(tokenizer_folder())


def load_narrow_model() -> Any:
    """A `ModelPatcher` of the host's SD 1.5 class at width 64, fp32, on the host's device.

    Latents, noise levels and prompts are those of the shipped checkpoint.
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    device = comfy.model_management.get_torch_device()
    config = comfy.supported_models.SD15(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": NARROW_WIDTH,
            "channel_mult": CHANNEL_MULT,
            "num_res_blocks": [1] * len(CHANNEL_MULT),
            "transformer_depth": [1] * len(CHANNEL_MULT),
            "transformer_depth_output": [1] * 2 * len(CHANNEL_MULT),
            "transformer_depth_middle": 1,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": False,
            "use_temporal_attention": False,
            "adm_in_channels": None,
            "context_dim": CONTEXT_DIM,
            "num_heads": HEADS,
            "num_head_channels": -1,
            "legacy": False,
            "dtype": torch.float32,
        }
    )
    config.set_inference_dtype(torch.float32, None)
    weights = {f"model.diffusion_model.{name}": value for name, value in narrow_unet_state_dict().items()}
    model = config.get_model(weights, "model.diffusion_model.", device=device)
    model.load_model_weights(weights, "model.diffusion_model.")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def narrow_lora(lora: Any, model: Any) -> Any:
    """Return an erasure LoRA of the shipped checkpoint, for the narrow model.

    Both models predict the same, so the calibration holds for both; its keys become the narrow model's and adapter's.
    """
    narrow = replace(lora, adapter=replace(lora.adapter, layers=with_prefix(narrowed(lora.adapter))))
    content = dict(lora.adapter.card.calibration)
    if content.get("image"):
        image = pack_module("unguide_core.probe.image").ImageProbe.from_card(content["image"])
        content["image"] = narrow_probe(image).to_card()
    keys = {"model": pack_module("unguide_comfy.model.key").model_key(model), "adapter": narrow.adapter.signature}
    card = replace(lora.adapter.card, calibration={**content, **keys})
    return replace(narrow, adapter=replace(narrow.adapter, card=card))


def with_prefix(layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return an adapter's layers by the host's names, detached, given those by module path of the narrow UNet."""
    return {
        f"{PREFIX}{name}": LowRank(layer.down.detach(), layer.up.detach(), layer.scale)
        for name, layer in layers.items()
    }


def by_module(layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return an adapter's layers by module path of the narrow UNet, given those by the host's names."""
    return {name.removeprefix(PREFIX): layer for name, layer in layers.items()}


def narrow_probe(probe: Any) -> Any:
    """Return an image probe of the shipped checkpoint for the narrow model, whose channels are every fifth."""
    return _rescaled(probe, lambda channel: channel // COPIES, 1 / COPIES)


def wide_probe(probe: Any) -> Any:
    """Return an image probe of the narrow model for the shipped checkpoint, of each channel's first copy."""
    return _rescaled(probe, lambda channel: channel * COPIES, COPIES)


def _rescaled(probe: Any, moved: Callable[[int], int], factor: float) -> Any:
    channels = probe.width // 3
    width = round(channels * factor)
    places = tuple(place // channels * width + moved(place % channels) for place in probe.places)
    return replace(probe, width=3 * width, places=places)
