"""Which of a loaded model's modules an adapter's low-rank layers belong to. It knows files only by name.

The host's own key map resolves every naming that it knows (ldm, diffusers, kohya). Where several layers of the file
are one weight of the model (the fused q, k, v of SD3 and Flux), they become one low-rank layer: the `down` factors are
stacked, and the `up` factors stand side by side, each in the rows of its own part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import comfy.lora
import torch

from ...unguide_core.adapter import Adapter, LowRank
from ...unguide_core.adapter.names import dotted, underscored
from ...unguide_core.formats import AdapterError, BaseWeights
from ..model.weights import dequantized, unpatched_weights

Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Place:
    """Where a layer acts: rows `start` to `start + length` of a module's weight, or all of them where length is None.

    Args:
        function: the host's reordering of the rows, which is its own inverse; None where they are in order.
    """

    path: str
    start: int = 0
    length: int | None = None
    function: Function | None = None


@dataclass(frozen=True)
class Match:
    """How an adapter fits a model.

    Args:
        layers: by the path of the module that each adds to.
        matched: how many layers of the file they come from.
        lacking: layers of the file without a counterpart in the model.
        untouched: modules of the kinds that the adapter changes, but that it leaves alone.
    """

    layers: dict[str, LowRank]
    matched: int
    lacking: tuple[str, ...]
    untouched: tuple[str, ...]


def match(adapter: Adapter, model: torch.nn.Module, name: str) -> Match:
    """Return how the adapter fits `model` (a host `BaseModel`); `Matcher` does the same for many.

    Raises: as `Matcher.match`.
    """
    return Matcher(model).match(adapter, name)


class Matcher:
    """Fits adapters to one model, a host `BaseModel`."""

    def __init__(self, model: torch.nn.Module):
        self.family = type(model).__name__
        self.key_map = comfy.lora.model_lora_keys_unet(model, {})
        self.modules = dict(model.named_modules())

    def match(self, adapter: Adapter, name: str) -> Match:
        """Return how the adapter fits the model.

        Raises: AdapterError if a layer has another shape than the model's, if none has a counterpart, or if some have
            none and the adapter is not `partial`. Nothing is left out silently.
        """
        placed: dict[str, list[tuple[Place, str]]] = {}
        lacking: list[str] = []
        for layer in adapter.layers:
            place = place_of(self.key_map, layer)
            if place is None or place.path not in self.modules:
                lacking.append(layer)
            else:
                placed.setdefault(place.path, []).append((place, layer))
        total = len(adapter.layers)
        if lacking and (not placed or not adapter.partial):
            raise AdapterError(
                f"erasure LoRA {name!r} matches {total - len(lacking)} of {total} layers of this model "
                f"({self.family}); without a counterpart are {_listed(lacking)}: it was made for another "
                "architecture; load an erasure LoRA made for this model, or the checkpoint that this one was made for"
                + ("" if not placed else ", or allow partial matches in Load Erasure LoRA")
            )
        layers = {path: _layer(adapter, parts, self.modules[path], path, name) for path, parts in placed.items()}
        return Match(layers, total - len(lacking), tuple(lacking), tuple(self._untouched(layers)))

    def _untouched(self, layers: Mapping[str, LowRank]) -> list[str]:
        kinds = {_kind(path) for path in layers}
        return [path for path, kind in self._kinds.items() if path not in layers and kind in kinds]

    @cached_property
    def _kinds(self) -> dict[str, str]:
        """The kind of each module that has a weight."""
        return {
            path: _kind(path) for path, module in self.modules.items() if getattr(module, "weight", None) is not None
        }


def place_of(key_map: Mapping[str, Any], layer: str) -> Place | None:
    """Return where a layer acts, by the host's key map; None where the model has no such layer."""
    key = next((key_map[name] for name in (layer, underscored(layer), dotted(layer)) if name in key_map), None)
    if key is None:
        return None
    if isinstance(key, str):
        return Place(key.removesuffix(".weight"))
    weight, offset, function = (*key, None)[:3]
    dimension, start, length = offset or (0, 0, None)
    if dimension != 0:
        raise AdapterError(f"the host places layer {layer!r} in columns of {weight!r}, which is not supported")
    return Place(weight.removesuffix(".weight"), start, length, function)


def base_weights(model: Any) -> BaseWeights:
    """Return a function that finds a `ModelPatcher`'s unpatched parameters by the names that adapters use."""
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = unpatched_weights(model)

    def parameter(name: str) -> torch.Tensor | None:
        layer, _, kind = name.rpartition(".")
        place = place_of(key_map, layer)
        found = None if place is None else weights.get(f"{place.path}.{kind}")
        if place is None or found is None:
            return None
        weight = dequantized(found)
        if place.length is not None:
            weight = weight.narrow(0, place.start, place.length)
        return weight if place.function is None else place.function(weight)

    return parameter


def _layer(
    adapter: Adapter, parts: Sequence[tuple[Place, str]], module: torch.nn.Module, path: str, name: str
) -> LowRank:
    """Return the one low-rank layer that several layers of the file make on one module."""
    if isinstance(module, torch.nn.modules.conv._ConvTransposeNd):
        raise AdapterError(
            f"erasure LoRA {name!r} changes {path!r}, a transposed convolution, whose weight has its inputs first; no "
            "known tool trains one: the file is damaged, or not a LoRA"
        )
    shape = module.get_parameter("weight").shape
    _require_apart(parts, shape[0], path, name)
    fitted = []
    for place, layer in parts:
        try:
            low_rank = adapter.layers[layer].reshaped((shape[0] if place.length is None else place.length, *shape[1:]))
        except ValueError as error:
            raise AdapterError(
                f"erasure LoRA {name!r}, layer {path!r}: {error}: it was made for another architecture; load an "
                "erasure LoRA made for this model"
            ) from error
        fitted.append(low_rank if place.function is None else replace(low_rank, up=place.function(low_rank.up)))
    if len(parts) == 1 and parts[0][0].length is None:
        return fitted[0]
    return _side_by_side([place.start for place, _ in parts], fitted, shape[0])


def _side_by_side(starts: Sequence[int], layers: Sequence[LowRank], rows: int) -> LowRank:
    """Return layers on rows of one weight as one layer on all of it; their scales go into `up`."""
    ups = [layer.up.float() * layer.scale for layer in layers]
    up = ups[0].new_zeros((rows, sum(layer.rank for layer in layers), *ups[0].shape[2:]))
    rank = 0
    for start, part in zip(starts, ups, strict=True):
        up[start : start + part.shape[0], rank : rank + part.shape[1]] = part
        rank += part.shape[1]
    return LowRank(torch.cat([layer.down.float() for layer in layers]), up)


def _require_apart(parts: Sequence[tuple[Place, str]], rows: int, path: str, name: str) -> None:
    """Raises: AdapterError where two layers are for the same rows."""
    ordered = sorted(parts, key=lambda part: part[0].start)
    for (first, one), (second, other) in pairwise(ordered):
        if first.start + (rows if first.length is None else first.length) > second.start:
            raise AdapterError(
                f"erasure LoRA {name!r} has two layers for {path!r} of this model, {one!r} and {other!r}; keep one "
                "adapter in the file"
            )


def _kind(path: str) -> str:
    """Return what a module is, wherever it is in the model: its path after the last numbered block."""
    return re.sub(r"^.*blocks?\.\d+\.", "", path)


def _listed(names: Sequence[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
