"""A loaded model's own weights: without patches, whether the host has patched them in place or not.

Not by the host's `get_key_patches`, which fails on quantised layers: their scales are among the state's names, but no
attributes of the layer.
"""

from __future__ import annotations

from typing import Any

import torch


def own_weights(patcher: Any, prefix: str) -> dict[str, torch.Tensor]:
    """The weights of a `ModelPatcher` by name, those that begin with `prefix`; see `numbers` for quantised ones."""
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


def numbers(weight: torch.Tensor) -> torch.Tensor:
    """A weight as an ordinary tensor: one of the host's quantised type as what it stands for."""
    quantised = type(weight).dequantize is not torch.Tensor.dequantize
    return weight.dequantize() if quantised else weight  # type: ignore[no-untyped-call]
