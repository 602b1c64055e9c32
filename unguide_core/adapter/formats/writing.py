"""Writes adapters in each format: the layers' names and the files' bytes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..containers import safetensors_bytes, torch_bytes
from ..lowrank import Adapter, LowRank
from ..names import HOST, KOHYA, TRANSFORMER, UNET, renamed, underscored
from . import peft
from .elsewhere import ALWAYS_OURS, for_others
from .official import official_tensors

Files = Mapping[str, bytes]
"""Contents by file name; a single file has the name ""."""


@dataclass(frozen=True)
class Format:
    """A format that can be written.

    suffix: of the file; "" for a folder.
    files: returns the contents. Raises ValueError for an adapter that the format cannot hold.
    """

    suffix: str
    files: Callable[[Adapter, str | None], Files]


def alpha_of(layer: LowRank) -> float:
    """Return the layer's alpha: scale * rank, rounded to float32 if the scale stays the same."""
    exact = layer.scale * layer.rank
    rounded = torch.tensor(exact, dtype=torch.float64).float().item()
    return rounded if rounded / layer.rank == layer.scale else exact


def metadata_of(adapter: Adapter) -> dict[str, str]:
    """Return the card and other programs' metadata; of these, keys that came with the adapter are kept."""
    others = for_others(adapter)
    kept = {key: text for key, text in adapter.card.to_metadata().items() if key not in ALWAYS_OURS}
    return {**others, **kept}


def _named(adapter: Adapter, to: str, layout: str | None) -> dict[str, LowRank]:
    names = renamed(adapter.layers, to, layout)
    return {names[name]: layer for name, layer in adapter.layers.items()}


def _kohya_factors(layers: Mapping[str, LowRank]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = layer.down, layer.up
        alpha = torch.tensor(alpha_of(layer), dtype=torch.float64)
        tensors[f"{name}.alpha"] = alpha.float() if alpha.float() == alpha else alpha
    return tensors


def _peft_factors(layers: Mapping[str, LowRank], prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}{name}.lora_{side}.weight": factor
        for name, layer in layers.items()
        for side, factor in (("A", layer.down), ("B", layer.up))
    }


def _as_they_are(adapter: Adapter, layout: str | None) -> Files:
    """ComfyUI's names and stems are kept; diffusers' names in a UNet become stems."""
    layers = {underscored(name) if name.startswith(UNET) else name: layer for name, layer in adapter.layers.items()}
    if len(layers) < len(adapter.layers):
        raise ValueError("two of its layers are the same one under different names; keep one adapter in the file")
    return {"": safetensors_bytes(_kohya_factors(layers), metadata_of(adapter))}


def _kohya(adapter: Adapter, layout: str | None) -> Files:
    return {"": safetensors_bytes(_kohya_factors(_named(adapter, KOHYA, layout)), metadata_of(adapter))}


def _generic(adapter: Adapter, layout: str | None) -> Files:
    return {"": safetensors_bytes(_kohya_factors(_named(adapter, HOST, layout)), metadata_of(adapter))}


def _official(adapter: Adapter, layout: str | None) -> Files:
    return {"": torch_bytes(official_tensors(_named(adapter, HOST, layout)), metadata_of(adapter))}


def _diffusers(adapter: Adapter, layout: str | None) -> Files:
    layers = _named(adapter, UNET, layout)
    prefix, bare = _bare(layers)
    config = peft.config_of(bare, {path: alpha_of(layer) for path, layer in bare.items()})
    packed = {prefix + key: value for key, value in config.items()}
    metadata = {**metadata_of(adapter), peft.DIFFUSERS_KEY: json.dumps(packed, sort_keys=True)}
    return {"": safetensors_bytes(_peft_factors(bare, prefix), metadata)}


def _peft(adapter: Adapter, layout: str | None) -> Files:
    _, bare = _bare(_named(adapter, UNET, layout))
    alphas = {path: alpha_of(layer) for path, layer in bare.items()}
    config = peft.config_of(bare, alphas, adapter.card.base_model)
    return {
        peft.WEIGHTS: safetensors_bytes(_peft_factors(bare, "base_model.model."), metadata_of(adapter)),
        peft.CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
    }


def _bare(layers: Mapping[str, LowRank]) -> tuple[str, dict[str, LowRank]]:
    """The layers' common prefix, UNet or transformer, and the layers without it. Raises: ValueError."""
    for prefix in (UNET, TRANSFORMER):
        if all(name.startswith(prefix) for name in layers):
            return prefix, {name.removeprefix(prefix): layer for name, layer in layers.items()}
    strange = [name for name in layers if not name.startswith((UNET, TRANSFORMER))] or list(layers)
    raise ValueError(
        f"diffusers has no name for the layer '{strange[0]}' together with the others; choose the format generic, "
        "which keeps names"
    )


FORMATS: Mapping[str, Format] = {
    "generic": Format(".safetensors", _generic),
    "kohya": Format(".safetensors", _kohya),
    "diffusers": Format(".safetensors", _diffusers),
    "peft": Format("", _peft),
    "official": Format(".pth", _official),
}
AS_IT_IS = Format(".safetensors", _as_they_are)
