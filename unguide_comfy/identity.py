"""A short key of a loaded model, so that a decision or baseline of one model is not used with another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..unguide_core.layers import weights_hash
from .weights import numbers, own_weights

DIFFUSION = "diffusion_model."
_hashes: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_SAMPLED_WEIGHTS = 16
_SAMPLED_VALUES = 64


def model_key(model: Any) -> str:
    """Key of a `ModelPatcher`: its class, kind of prediction and noise levels, all names and shapes, samples of the
    weights and of the patches on them, and which patches change its forward.

    Weights that the host patched in place are read from its backup, so a loaded and an unloaded model agree; so do
    half and single precision.
    """
    digest = hashlib.sha256(type(model.model).__name__.encode())
    sampling = model.get_model_object("model_sampling")
    digest.update(" ".join(base.__name__ for base in type(sampling).__mro__).encode())
    digest.update(f"{float(sampling.sigma_min):.5g} {float(sampling.sigma_max):.5g}".encode())
    digest.update(str(sorted(_forward_patches(model.model_options.get("transformer_options", {})))).encode())
    weights = own_weights(model, DIFFUSION)
    names = sorted(weights)
    for name in names:
        digest.update(f"{name}{tuple(weights[name].shape)}".encode())
    for name in names[:: max(1, len(names) // _SAMPLED_WEIGHTS)]:
        digest.update(_sample(numbers(weights[name])))
    for name in sorted(model.patches):
        for patch in model.patches[name]:
            digest.update(f"{name}{patch[0]}{patch[2]}".encode())
            for tensor in _tensors(patch[1]):
                digest.update(_sample(tensor))
    return digest.hexdigest()[:16]


def base_hash(model: Any) -> str:
    """The name of a `ModelPatcher`'s diffusion weights without patches, whatever program loaded them.

    Every weight is read, once for a loaded model.
    """
    if model.model not in _hashes:
        _hashes[model.model] = weights_hash(numbers(weight) for weight in own_weights(model, DIFFUSION).values())
    return _hashes[model.model]


def is_called(model: Any, key: str, own_key: str) -> bool:
    """Whether a calibration's key is this model's: `own_key`, or the hash of its weights where nothing patches it.

    The hash is what programs know that have no ComfyUI; it says nothing of patches and other sampling.
    """
    if key == own_key:
        return True
    forward = any(_forward_patches(model.model_options.get("transformer_options", {})))
    plain = not (model.patches or model.object_patches or forward)
    return plain and len(key) == len(hashlib.sha256().hexdigest()) and key == base_hash(model)


def _forward_patches(options: dict[str, Any]) -> Iterator[str]:
    """Names of what other nodes hang into the network's forward (attention patches and the like)."""
    for kind, patches in options.get("patches", {}).items():
        yield from (f"{kind} {_named(patch)}" for patch in patches)
    for kind, places in options.get("patches_replace", {}).items():
        yield from (f"{kind} {place} {_named(patch)}" for place, patch in places.items())


def _named(patch: Any) -> str:
    return getattr(patch, "__qualname__", type(patch).__qualname__)


def _sample(weight: torch.Tensor) -> bytes:
    values = weight.detach().flatten()[:_SAMPLED_VALUES].to(device="cpu", dtype=torch.bfloat16)
    return str(values.tolist()).encode()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Tensors inside a patch: the host keeps them in tuples or in an object's `weights`."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "weights"):
        yield from _tensors(value.weights)
