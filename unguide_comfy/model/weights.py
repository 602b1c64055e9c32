"""A loaded model's weights, without patches or with them, whether the host has patched them in place or not.

The host's `get_key_patches` does not help here: it fails on quantised layers, whose scales are in the state dict but
are not attributes of the layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import comfy.lora
import torch

DIFFUSION = "diffusion_model."
"""Prefix of the diffusion network's modules in a host `BaseModel`."""


def unpatched_weights(patcher: Any, prefix: str = DIFFUSION) -> dict[str, torch.Tensor]:
    """Return the weights of a `ModelPatcher` whose names begin with `prefix`; quantised ones as they are stored."""
    model = patcher.model
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {}
    for name in patcher.model_state_dict(prefix):
        if name in patcher.hook_backup:
            found[name] = patcher.hook_backup[name][0]
        elif name in patcher.backup:
            found[name] = patcher.backup[name].weight
        elif name in tensors:
            found[name] = tensors[name]
    return found


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """Return an ordinary tensor of the values that a weight of one of the host's quantised types stands for."""
    quantized = type(weight).dequantize is not torch.Tensor.dequantize
    return weight.dequantize() if quantized else weight  # type: ignore[no-untyped-call]


def used_weights(patcher: Any, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return weights of a `ModelPatcher` as its network uses them: with patches, not quantised, float32 on the CPU.

    Args:
        names: as in `unpatched_weights`.
    """
    stored, used = unpatched_weights(patcher), {}
    for name in names:
        module, _, kind = name.rpartition(".")
        # quantised layers convert with what belongs to the layer, such as a scale
        convert = getattr(patcher.model.get_submodule(module), f"convert_{kind}", dequantized)
        weight = convert(stored[name]).detach().to("cpu", torch.float32, copy=True)
        patches = patcher.patches.get(name)
        used[name] = comfy.lora.calculate_weight(patches, weight, name) if patches else weight
    return used
