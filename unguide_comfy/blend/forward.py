"""The network's forward, repeated with other rows or other layers than the host asked for."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import comfy.model_management
import torch

from ..lora.inject import ALL_ROWS, NotBatchable, adapted_rows
from .state import Run

Group = tuple[int, int | None]
"""Rows of a forward: those of one conditioning of the call, by its number, and the adapter that computes them."""


@dataclass(frozen=True)
class Call:
    """One call of the network, as the host makes it: the batches of several conditionings, one below the other.

    Args:
        executor: the host's, which calls the network.
        tensors: latent, timesteps, c_concat, c_crossattn.
        control: ControlNet residuals, from whose lists the network pops.
        options: the transformer options.
        extra: other conditioning.
        run: the sampling run.
    """

    executor: Callable[..., torch.Tensor]
    tensors: tuple[torch.Tensor | None, ...]
    control: Mapping[str, Any] | None
    options: dict[str, Any]
    extra: dict[str, Any]
    run: Run

    @property
    def latent(self) -> torch.Tensor:
        """The network's input, [rows, C, ...]."""
        assert self.tensors[0] is not None
        return self.tensors[0]

    @property
    def conds(self) -> int:
        """How many conditionings are in the batch."""
        return len(self.options.get("cond_or_uncond", (0,)))

    @property
    def samples(self) -> int:
        """How many latents each conditioning has."""
        return len(self.latent) // self.conds

    def whole(self, adapter: int | None) -> list[Group]:
        """The groups of the call as it is, all computed by one adapter."""
        return [(cond, adapter) for cond in range(self.conds)]

    def forward(self, groups: Sequence[Group], samples: torch.Tensor | None = None) -> torch.Tensor:
        """Return x0 of some groups of rows in one forward, [len(groups) * samples, C, ...].

        Args:
            groups: in the order of the result; conditionings may be left out or repeated.
            samples: numbers of the latents that take part, None for all.
        Raises: NotBatchable if the rows cannot be told apart.
        """
        size = self.samples if samples is None else len(samples)
        adapters = {adapter for _, adapter in groups}
        index = None
        if samples is not None or [cond for cond, _ in groups] != list(range(self.conds)):
            chosen = torch.arange(self.samples) if samples is None else samples.cpu()
            index = torch.cat([cond * self.samples + chosen for cond, _ in groups])
        tensors, control, extra = (
            _rows_of(value, len(self.latent), index) for value in (self.tensors, self.control, self.extra)
        )
        rows, options = size * len(groups), self._options(groups)
        features = self.run.features if samples is None else None
        if features is not None:
            options = features.patched(options)
        with adapted_rows(self.run.modules(self._model), self._layers(groups, size, adapters), rows):
            out = self.executor(*tensors, control, options, **extra)
        if features is not None:
            numbers = self.options.get("cond_or_uncond", (0,))
            features.take([(numbers[cond], adapter) for cond, adapter in groups])
        self.run.evaluations.count(rows, adapted=size * sum(adapter is not None for _, adapter in groups))
        return out

    def forward_each(self, groups: Sequence[Group]) -> list[torch.Tensor]:
        """Return x0 of every group, [samples, C, ...] each: in one forward where memory and layers allow."""
        adapters = dict.fromkeys(adapter for _, adapter in groups)
        if len(adapters) == 1 or (self.run.batchable and self._fits(len(groups))):
            try:
                return list(self.forward(groups).chunk(len(groups)))
            except NotBatchable:
                self.run.batchable = False
        parts = {adapter: self._forward_of(adapter, groups) for adapter in adapters}
        return [parts[adapter][cond] for cond, adapter in groups]

    def _forward_of(self, adapter: int | None, groups: Sequence[Group]) -> dict[int, torch.Tensor]:
        """x0 of one adapter's groups by conditioning, in a forward of their own, or of the whole call."""
        own = [group for group in groups if group[1] == adapter]
        try:
            out = self.forward(own)
        except NotBatchable:
            own = self.whole(adapter)
            out = self.forward(own)
        return {cond: part for (cond, _), part in zip(own, out.chunk(len(own)), strict=True)}

    @property
    def _model(self) -> Any:
        return self.executor.class_obj  # type: ignore[attr-defined]

    def _layers(
        self, groups: Sequence[Group], size: int, adapters: set[int | None]
    ) -> list[tuple[slice, Mapping[str, Any]]]:
        """Which layers act on which rows."""
        dtype = self._model.get_dtype_inference()
        found, start = [], 0
        for adapter, same in groupby(adapter for _, adapter in groups):
            end = start + size * len(list(same))
            if adapter is not None:
                rows = ALL_ROWS if len(adapters) == 1 else slice(start, end)
                found.append((rows, self.run.cast(adapter, self.latent.device, dtype)))
            start = end
        return found

    def _options(self, groups: Sequence[Group]) -> dict[str, Any]:
        """The transformer options, whose lists have one entry per conditioning."""
        options = dict(self.options)
        if "cond_or_uncond" in options:
            options["cond_or_uncond"] = [options["cond_or_uncond"][cond] for cond, _ in groups]
        if options.get("uuids") is not None:
            options["uuids"] = [_derived(options["uuids"][cond], adapter) for cond, adapter in groups]
        return options

    def _fits(self, groups: int) -> bool:
        """Whether a forward of so many groups fits into memory, by the host's own estimate and margin."""
        if groups <= self.conds:
            return True
        shape = [self.samples * groups, *self.latent.shape[1:]]
        free = comfy.model_management.get_free_memory(self.latent.device)
        return self._model.memory_required(shape) * 1.5 < free


def _derived(own: uuid.UUID, adapter: int | None) -> uuid.UUID:
    """Another uuid for an adapter's rows, so that caches that other packs key by uuid do not mix."""
    return own if adapter is None else uuid.uuid5(own, f"unguide {adapter}")


def _rows_of(value: Any, rows: int, index: torch.Tensor | None) -> Any:
    """A structure with every tensor of `rows` rows indexed by row, all other values as they are; containers are copied.

    They are copied even without an index, because the network pops from control lists.
    """
    if isinstance(value, torch.Tensor):
        if index is None or value.ndim == 0 or (value.shape[0] == 1 and rows != 1):
            return value
        if value.shape[0] != rows:
            raise NotBatchable(f"a conditioning has {value.shape[0]} rows, and the batch has {rows}")
        return value[index.to(value.device)]
    if isinstance(value, dict):
        return {key: _rows_of(item, rows, index) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rows_of(item, rows, index) for item in value)
    return value
