"""Which layers of a loaded model an adapter's low-rank layers belong to. Knows files by name only."""

from __future__ import annotations

import comfy.lora
import torch

from ..unguide_core.adapter import Adapter, LowRank
from ..unguide_core.formats import AdapterError


def match_layers(adapter: Adapter, model: torch.nn.Module, name: str) -> dict[str, LowRank]:
    """The adapter's layers by the path of the module they add to, in `model` (a host `BaseModel`).

    The host's own key map resolves every naming it knows (ldm, diffusers, kohya).

    Raises: AdapterError if a layer has no counterpart in the model or another shape; nothing is left out silently.
    """
    key_map = comfy.lora.model_lora_keys_unet(model, {})
    modules = dict(model.named_modules())
    matched: dict[str, LowRank] = {}
    unmatched: list[str] = []
    for layer, low_rank in adapter.layers.items():
        path = _module_path(key_map.get(layer), layer, name)
        if path is None or path not in modules:
            unmatched.append(layer)
            continue
        matched[path] = _shaped(low_rank, modules[path], path, name)
    if unmatched:
        raise AdapterError(
            f"erasure LoRA {name!r} matches {len(matched)} of {len(adapter.layers)} layers of this model "
            f"({type(model).__name__}); without a counterpart are {_listed(unmatched)}: it was made for another "
            "architecture; load an erasure LoRA made for this model, or the checkpoint that this one was made for"
        )
    return matched


def _module_path(key: str | tuple[object, ...] | None, layer: str, name: str) -> str | None:
    if isinstance(key, tuple):
        raise AdapterError(
            f"erasure LoRA {name!r}: layer {layer!r} is one part of a fused weight ({key[0]!r}) of this model, "
            "and fused weights are not supported yet; use an adapter for an SD 1.x, SD 2.x or SDXL model"
        )
    return None if key is None else key.removesuffix(".weight")


def _shaped(low_rank: LowRank, module: torch.nn.Module, path: str, name: str) -> LowRank:
    try:
        return low_rank.reshaped(module.get_parameter("weight").shape)
    except ValueError as error:
        raise AdapterError(
            f"erasure LoRA {name!r}, layer {path!r}: {error}: it was made for another architecture; load an "
            "erasure LoRA made for this model"
        ) from error


def _listed(names: list[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
