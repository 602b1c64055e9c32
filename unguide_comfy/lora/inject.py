"""Low-rank layers added to a model's leaf modules for one forward, without touching a weight.

Inside `adapted_rows` the named modules' `forward` adds the low-rank change to some rows of the batch. When the block
ends, also by an exception, every module is exactly as it was. This module knows nothing of sampling, gates or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ...unguide_core.adapter import LowRank

ALL_ROWS = slice(None)


class NotBatchable(RuntimeError):
    """The rows of a batch cannot be told apart in one forward: a tensor's first dimension is not the batch."""


class AdaptedForward:
    """A module's forward, plus the change of low-rank layers on their rows of the batch."""

    def __init__(self, module: torch.nn.Module, parts: Sequence[tuple[slice, LowRank]], rows: int):
        self.forward = module.forward
        self.module = module
        self.parts = parts
        self.rows = rows

    def __call__(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if x.shape[0] != self.rows and any(part != ALL_ROWS for part, _ in self.parts):
            raise NotBatchable(f"a layer got {x.shape[0]} rows, and the batch has {self.rows}")
        out = self.forward(x, *args, **kwargs)
        for part, low_rank in self.parts:
            out[part] += self._delta(low_rank, x[part].to(low_rank.down.dtype)).to(out.dtype)
        return out

    def _delta(self, low_rank: LowRank, x: torch.Tensor) -> torch.Tensor:
        module = self.module
        if not isinstance(module, torch.nn.modules.conv._ConvNd):
            return low_rank.delta(x)
        if module.groups == 1 and module.padding_mode == "zeros":
            return low_rank.delta(x, stride=module.stride, padding=module.padding, dilation=module.dilation)
        # `down` alone is not a grouped convolution: only the product has the weight's shape
        return module._conv_forward(x, low_rank.weight_delta(), None)  # type: ignore[operator]


@contextmanager
def adapted_rows(
    modules: Mapping[str, torch.nn.Module], groups: Sequence[tuple[slice, Mapping[str, LowRank]]], rows: int
) -> Iterator[None]:
    """Within the block, each group's layers act on their rows of a batch of `rows`.

    Args:
        modules: the model's modules by path.
        groups: pairs of a slice of the batch and the layers that act on it, {module path: LowRank}.
        rows: size of the batch that the model is called with; `ALL_ROWS` acts on a batch of any size.
    Raises: NotBatchable from the forward, if a touched layer gets another number of rows.
    """
    parts: dict[str, list[tuple[slice, LowRank]]] = {}
    for part, layers in groups:
        for path, low_rank in layers.items():
            parts.setdefault(path, []).append((part, low_rank))
    before: list[tuple[torch.nn.Module, object | None]] = []
    try:
        for path, touched in parts.items():
            module = modules[path]
            adapted = AdaptedForward(module, touched, rows)
            before.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = adapted
        yield
    finally:
        for module, forward in reversed(before):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
