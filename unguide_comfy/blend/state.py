"""The state of one sampling run that the blend reads: the adapters' layers, the weights in force, and what was spent.

It lives in the run's transformer options and ends with the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import torch

from ...unguide_core.adapter import LowRank
from ..lora.load import ErasureLora
from .features import Features

RUN = "unguide_run"
"""Key of the run in the transformer options."""

Weight = float | torch.Tensor
"""The base model's weight in the blend: one number, or one per sample, [B]."""


@dataclass
class Evaluations:
    """Model evaluations (NFE) of a run. One evaluation is one latent under one conditioning.

    Counted under a lock, because the host calls the network on several GPUs from several threads.

    Args:
        spent: by kind: "base" and "adapted" of the sampling itself, "probe" of the gates, "wasted" of a run that was
            started again.
        plain: what the sampler asked for, which is what the run costs without UnGuide.
    """

    spent: dict[str, int] = field(default_factory=lambda: {"base": 0, "adapted": 0, "probe": 0, "wasted": 0})
    plain: int = 0
    _kind: str | None = None
    _lock: Any = field(default_factory=Lock, repr=False)

    def ask(self, rows: int) -> None:
        """Count rows that the sampler asked for."""
        with self._lock:
            self.plain += rows

    def count(self, rows: int, adapted: int) -> None:
        """Count one forward of `rows`, of which `adapted` are an adapter's."""
        with self._lock:
            self.spent[self._kind or "base"] += rows - adapted
            self.spent[self._kind or "adapted"] += adapted

    @contextmanager
    def of(self, kind: str | None) -> Iterator[None]:
        """Within the block evaluations count as `kind` (None: as sampling), and none as asked for by the sampler."""
        before, plain, self._kind = self._kind, self.plain, kind
        try:
            yield
        finally:
            self._kind, self.plain = before, plain

    def discard(self) -> None:
        """Count the sampling so far as wasted, because the run starts again."""
        for kind in ("base", "adapted"):
            self.spent["wasted"] += self.spent[kind]
            self.spent[kind] = 0
        self.plain = 0


@dataclass
class Run:
    """One sampling run.

    Args:
        loras: the erasure LoRAs on the model.
        layers: of each, {module path: LowRank} as matched with the model, at strength 1.
        weights: of each, the base model's weight in the blend.
        batchable: whether base and adapted rows may share a forward; forbidden, or ruled out on the way.
        outside: adapters that are not blended here: their change is added to guided predictions (`gate.concept_delta`).
        evaluations: what was spent.
        predicting: within a probe, which adapter computes each conditioning of a call (None: the base model); an empty
            tuple is the base model for all. None while the run samples.
        features: takes those of the images while the network runs; None as a rule.
    """

    loras: tuple[ErasureLora, ...]
    layers: tuple[Mapping[str, LowRank], ...]
    weights: list[Weight] = field(default_factory=list)
    batchable: bool = True
    outside: frozenset[int] = frozenset()
    evaluations: Evaluations = field(default_factory=Evaluations)
    predicting: tuple[int | None, ...] | None = None
    features: Features | None = None
    strengths: tuple[float, ...] = ()
    _modules: dict[int, dict[str, torch.nn.Module]] = field(default_factory=dict, repr=False)
    _cast: dict[tuple[Any, ...], Mapping[str, LowRank]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.weights = self.weights or [1.0] * len(self.loras)
        self.strengths = tuple(lora.strength for lora in self.loras)

    def active(self) -> list[int]:
        """The adapters that take part in the blend: those whose weight is not 1 in every sample."""
        return [i for i, weight in enumerate(self.weights) if i not in self.outside and not is_all(weight, 1.0)]

    @contextmanager
    def predict_with(self, adapters: Sequence[int | None], *, erasing: bool = False) -> Iterator[None]:
        """Within the block nothing is blended: each conditioning of a call is computed by the adapter given for it.

        Args:
            adapters: one per conditioning, None for the base model, bit for bit; none at all for the base model alone.
            erasing: whether adapters act at the strength that they erase with, and not at 1, as the gate probes.
        """
        before = self.predicting, self.strengths
        self.predicting = tuple(adapters)
        if not erasing:
            self.strengths = (1.0,) * len(self.loras)
        try:
            yield
        finally:
            self.predicting, self.strengths = before

    @contextmanager
    def read(self) -> Iterator[Features]:
        """Within the block every forward leaves features of its images in what is yielded."""
        before, self.features = self.features, Features()
        try:
            yield self.features
        finally:
            self.features = before

    def modules(self, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """The touched modules of a model by path; a model on a second device has its own."""
        if id(model) not in self._modules:
            paths = {path for layers in self.layers for path in layers}
            self._modules[id(model)] = {path: model.get_submodule(path) for path in paths}
        return self._modules[id(model)]

    def cast(self, index: int, device: torch.device, dtype: torch.dtype) -> Mapping[str, LowRank]:
        """Return the layers of an adapter on a device, in the network's dtype, at the strength in force.

        Raises: ValueError if the adapter's numbers are too large for the dtype.
        """
        strength = self.strengths[index]
        key = (index, strength, device, dtype)
        if key not in self._cast:
            layers = {path: _scaled(layer.to(device, dtype), strength) for path, layer in self.layers[index].items()}
            finite = [torch.isfinite(factor).all() for layer in layers.values() for factor in (layer.down, layer.up)]
            if not bool(torch.stack(finite).all()):
                raise ValueError(
                    f"erasure LoRA {self.loras[index].name!r} holds numbers that are too large for {dtype}, in which "
                    "the model computes; run the model in bfloat16 or float32"
                )
            self._cast[key] = layers
        return self._cast[key]


def is_all(weight: Weight, value: float) -> bool:
    """Return whether a weight is `value` in every sample."""
    return bool((weight == value).all()) if isinstance(weight, torch.Tensor) else weight == value


def _scaled(layer: LowRank, strength: float) -> LowRank:
    return layer if strength == 1.0 else replace(layer, scale=layer.scale * strength)
