"""The host's state while training: weights that can be differentiated through, and the model's noise levels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch


@contextmanager
def differentiable(model: torch.nn.Module) -> Iterator[None]:
    """Within the block every weight can be differentiated through, and none takes a gradient of its own.

    The host loads models under inference mode, and some versions leave gradients on. Ordinary tensors over the same
    memory stand in for such weights, which come back afterwards: nothing is copied or written.
    """
    before: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        for module in model.modules():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for store in stores:
                for name, tensor in store.items():
                    if tensor is not None and (tensor.is_inference() or tensor.requires_grad):
                        before.append((store, name, tensor))
                        store[name] = _ordinary(tensor)
        yield
    finally:
        for store, name, tensor in before:
            store[name] = tensor


def _ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers as an ordinary tensor over the same memory; a tensor of a special type is copied."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        ordinary = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage(), *place)
    else:
        ordinary = tensor.detach().clone()
    return torch.nn.Parameter(ordinary, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else ordinary


@contextmanager
def marked_as_training() -> Iterator[None]:
    """Within the block the host takes differentiable paths through quantised layers (0.26 and later)."""
    management = comfy.model_management
    if not hasattr(management, "in_training"):
        yield
        return
    before, management.in_training = management.in_training, True
    try:
        yield
    finally:
        management.in_training = before


def discrete_sigmas(model: Any) -> torch.Tensor:
    """Return the noise level of each of the model's 1000 timesteps, [1000].

    Raises: ValueError for a model with another schedule.
    """
    sigmas = getattr(model.model_sampling, "sigmas", None)
    if sigmas is None or len(sigmas) != 1000 or not hasattr(model.model_sampling, "log_sigmas"):
        raise ValueError(
            f"the model ({type(model.model_config).__name__}) has no schedule of 1000 discrete timesteps, as SD 1.x, "
            "SD 2.x and SDXL have; erasure LoRAs can be trained on those only"
        )
    return sigmas.detach().float().clone()
