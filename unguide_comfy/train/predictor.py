"""The host's model with an adapter in training: its own `apply_model`, the adapter added in the forward.

The base model's weights are neither copied nor written. The adapter is kept in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.samplers
import torch
import torch.utils.checkpoint

from ...unguide_core.adapter import LowRank
from ...unguide_core.training.layers import chosen_layers
from ...unguide_core.training.recipe import Recipe
from ...unguide_core.training.trainer import fresh_layers
from ..lora.inject import ALL_ROWS, adapted_rows
from ..model.weights import DIFFUSION

log = logging.getLogger(__name__)


class HostPredictor:
    """The host's model as a `Predictor` of `unguide_core.training.rollout`.

    Args:
        model: a host `BaseModel`, loaded.
        conds: processed `model_conds` by prompt.
        layers: trainable, by module path.
        sigmas: the noise level of each timestep, [1000], on the model's device.
        options: the transformer options, in which other packs keep their patches.
    """

    def __init__(
        self,
        model: Any,
        conds: Mapping[str, Mapping[str, Any]],
        layers: Mapping[str, LowRank],
        sigmas: torch.Tensor,
        options: Mapping[str, Any],
    ):
        self.model, self.conds, self.layers, self.sigmas = model, conds, layers, sigmas
        self.options = dict(options)
        self.modules = {path: model.get_submodule(path) for path in layers}
        self.adapting, self.checkpointing = False, False
        self.note = ""

    def __call__(self, z: torch.Tensor, timesteps: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the predicted noise of each row, float32; that of a v model is computed from its x0."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        sigma = self.sigmas[timesteps.to(self.sigmas.device)]
        level = sigma.view(-1, *[1] * (z.ndim - 1))
        x = z * (1.0 + level**2).sqrt()
        cond = comfy.samplers.cond_cat([self.conds[prompt] for prompt in prompts])
        kind = {"cond_or_uncond": [0], "sigmas": sigma}
        with self._checkpointed() if self.checkpointing and torch.is_grad_enabled() else nullcontext():
            x0 = self.model.apply_model(x, sigma, transformer_options={**self.options, **kind}, **cond)
        return (x - x0.float()) / level

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Within the block the adapter acts, also on what gradient checkpointing computes again."""
        if self.adapting:
            yield
            return
        self.adapting = True
        try:
            with adapted_rows(self.modules, [(ALL_ROWS, self.layers)], 0):
                yield
        finally:
            self.adapting = False

    def relieve(self) -> bool:
        """Turn gradient checkpointing on; return whether it was off."""
        if self.checkpointing:
            return False
        self.checkpointing = True
        self.note = "Memory ran out: the network's blocks are now computed twice (gradient checkpointing), slower."
        log.warning("UnGuide: %s", self.note)
        comfy.model_management.soft_empty_cache()
        return True

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Within the block the network's blocks keep no intermediate results for the backward pass."""
        blocks = list(_blocks(self.model.diffusion_model))
        for block in blocks:
            block.__dict__["forward"] = _Checkpointed(block.forward)
        try:
            yield
        finally:
            for block in blocks:
                del block.__dict__["forward"]


class _Checkpointed:
    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


def _blocks(network: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The outermost modules that hold others, without plain containers: residual and transformer blocks."""
    for child in network.children():
        if isinstance(child, torch.nn.ModuleList | torch.nn.Sequential | torch.nn.ModuleDict):
            yield from _blocks(child)
        elif next(child.children(), None) is not None and "forward" not in child.__dict__:
            yield child


def trainable_layers(model: Any, recipe: Recipe, layers: str, pattern: str, device: torch.device) -> dict[str, LowRank]:
    """Return untrained layers by module path, on the device.

    Each is initialised by its kohya name, so that training outside the host with the same seed starts with the same
    numbers.

    Args:
        model: a host `BaseModel`.
        layers, pattern: as for `chosen_layers`.
    """
    linear = {
        name: module
        for name, module in model.diffusion_model.named_modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features")
    }
    paths = {DIFFUSION + name: linear[name] for name in chosen_layers(linear, layers, pattern)}
    kohya = _kohya_names(model)
    features = {kohya.get(path, path): (module.in_features, module.out_features) for path, module in paths.items()}
    drawn = fresh_layers(features, recipe)
    return {path: _trainable(drawn[kohya.get(path, path)], device) for path in paths}


def _trainable(layer: LowRank, device: torch.device) -> LowRank:
    down, up = (tensor.detach().to(device).requires_grad_() for tensor in (layer.down, layer.up))
    return LowRank(down, up, layer.scale)


def _kohya_names(model: Any) -> dict[str, str]:
    """kohya's names (`lora_unet_down_blocks_0_...`) by module path, from the host's own key map."""
    names: dict[str, str] = {}
    for name, key in comfy.lora.model_lora_keys_unet(model, {}).items():
        path = key.removesuffix(".weight") if isinstance(key, str) else ""
        own = f"lora_unet_{path.removeprefix(DIFFUSION).replace('.', '_')}"
        if name.startswith("lora_unet_") and name != own:
            names[path] = min(name, names.get(path, name))  # the map has two for some, in no fixed order
    return names
