"""A loaded model's own weights, without patches, whether the host has patched them in place or not.

The host's `get_key_patches` is no help here: it fails on quantised layers, whose scales are in the state dict but are
not attributes of the layer.
"""

from __future__ import annotations

from typing import Any

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
