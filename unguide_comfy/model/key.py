"""Names for a loaded model, so that what was measured on one model is not used with another.

`model_key` samples the weights and covers all patches; it is cheap. `base_hash` reads every weight and names the
unpatched model alike in every program.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.utils
import torch

from ...unguide_core.adapter.lowrank import weights_hash
from .weights import dequantized, unpatched_weights

OURS = "unguide"
"""The key of this pack's own wrappers on a model."""

_HARMLESS = (OURS, "torch.compile")
"""Keys of wrappers that do not change what the network computes."""

_hashes: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_names: WeakKeyDictionary[Any, bytes] = WeakKeyDictionary()
_SAMPLED_WEIGHTS = 16
_SAMPLED_VALUES = 64


def model_key(patcher: Any) -> str:
    """Return the key of a `ModelPatcher`: 16 hexadecimal digits.

    It covers the model's class, the kind of prediction and the noise levels, all names and shapes, samples of the
    weights and of the patches on them, and the names of the patches and wrappers on its forward. Weights that the host
    patched in place are read from its backup, so a loaded and an unloaded model agree, as do half and single precision.
    """
    digest = hashlib.sha256(type(patcher.model).__name__.encode())
    sampling = patcher.get_model_object("model_sampling")
    digest.update(" ".join(base.__name__ for base in type(sampling).__mro__).encode())
    digest.update(f"{float(sampling.sigma_min):.5g} {float(sampling.sigma_max):.5g}".encode())
    digest.update(str(sorted(_forward_patches(patcher))).encode())
    digest.update(_named_weights(patcher))
    for name in sorted(patcher.patches):
        for patch in patcher.patches[name]:
            digest.update(f"{name}{patch[0]}{patch[2]}".encode())
            for tensor in _tensors(patch[1]):
                digest.update(_sample(tensor))
    return digest.hexdigest()[:16]


def base_hash(patcher: Any) -> str:
    """Return the sha256 of a `ModelPatcher`'s unpatched diffusion weights, the same in every program.

    Reads every weight, once for a loaded model, with progress on the node.
    """
    if patcher.model not in _hashes:
        _hashes[patcher.model] = weights_hash(_each_weight(patcher))
    return _hashes[patcher.model]


def _named_weights(patcher: Any) -> bytes:
    """Names and shapes of all unpatched weights, and samples of some; collected once for a loaded model."""
    if patcher.model not in _names:
        weights = unpatched_weights(patcher)
        names = sorted(weights)
        said = [f"{name}{tuple(weights[name].shape)}".encode() for name in names]
        sampled = names[:: max(1, len(names) // _SAMPLED_WEIGHTS)]
        _names[patcher.model] = b"".join([*said, *(_sample(dequantized(weights[name])) for name in sampled)])
    return _names[patcher.model]


def _each_weight(patcher: Any) -> Iterator[torch.Tensor]:
    weights = unpatched_weights(patcher).values()
    bar = comfy.utils.ProgressBar(len(weights))
    for weight in weights:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield dequantized(weight)
        bar.update(1)


def matches_model(key: str, patcher: Any, own_key: str) -> bool:
    """Return whether a calibration's key names this model.

    That is `own_key` (see `model_key`), or the hash of the weights where nothing patches the model: programs without
    ComfyUI know only the hash, which says nothing about patches.
    """
    if key == own_key:
        return True
    patched = patcher.patches or patcher.object_patches or has_forward_patches(patcher)
    return not patched and len(key) == hashlib.sha256().digest_size * 2 and key == base_hash(patcher)


def has_forward_patches(patcher: Any) -> bool:
    """Return whether other nodes have put something into the network's forward."""
    return any(_forward_patches(patcher))


def _forward_patches(patcher: Any) -> Iterator[str]:
    """Names of what other nodes put into the network's forward: attention patches, wrappers and the like."""
    options = patcher.model_options.get("transformer_options", {})
    if "model_function_wrapper" in patcher.model_options:
        yield f"function {_named(patcher.model_options['model_function_wrapper'])}"
    yield from (f"object {name}" for name in patcher.object_patches if name != "model_sampling")
    for kind, patches in options.get("patches", {}).items():
        yield from (f"{kind} {_named(patch)}" for patch in patches)
    for kind, places in options.get("patches_replace", {}).items():
        yield from (f"{kind} {place} {_named(patch)}" for place, patch in places.items())
    for wrappers in (patcher.wrappers, options.get("wrappers", {})):
        for kind, by_key in wrappers.items():
            yield from (f"{kind} {key}" for key, found in by_key.items() if key not in _HARMLESS and found)
    for name in ("injections", "weight_wrapper_patches"):
        yield from (f"{name} {key}" for key in getattr(patcher, name, {}))


def _named(patch: Any) -> str:
    return getattr(patch, "__qualname__", type(patch).__qualname__)


def _sample(weight: torch.Tensor) -> bytes:
    values = weight.detach().flatten()[:_SAMPLED_VALUES].to(device="cpu", dtype=torch.bfloat16)
    return str(values.tolist()).encode()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors inside a patch, which the host keeps in tuples or in an object's `weights`."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "weights"):
        yield from _tensors(value.weights)
