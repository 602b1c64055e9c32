"""Encoded prompts as rows of one batch: a calibration denoises many, and one forward of eight costs less than eight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from ..lora.load import Conditioning

T = TypeVar("T")

ROWS = 8
"""A batch has at least so many rows, prompts permitting."""


def batches(items: Iterable[T], rows: Callable[[T], int], alike: Callable[[T, T], bool]) -> Iterator[list[T]]:
    """Yield runs of items that are alike, each as short as `ROWS` allows.

    Args:
        rows: how many rows an item takes.
        alike: whether two items can be in one batch.
    """
    batch: list[T] = []
    for item in items:
        if batch and (sum(map(rows, batch)) >= ROWS or not alike(batch[-1], item)):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def alike(one: Conditioning, other: Conditioning) -> bool:
    """Return whether two encoded prompts can be rows of one batch: a single entry each, of the same shapes."""
    if len(one) != 1 or len(other) != 1:
        return False
    (text, options), (second, others) = one[0], other[0]
    if set(options) - {"pooled_output"} or set(options) != set(others) or text.shape != second.shape:
        return False
    pooled, pooled_too = options.get("pooled_output"), others.get("pooled_output")
    return (pooled is None) == (pooled_too is None) and (pooled is None or pooled.shape == pooled_too.shape)


def joined(prompts: Sequence[tuple[Conditioning, int]]) -> Conditioning:
    """Return encoded prompts that are `alike` as one, each in so many rows."""
    if len(prompts) == 1:
        return prompts[0][0]
    entries = [(conditioning[0], count) for conditioning, count in prompts]
    text = torch.cat([text.expand(count, *text.shape[1:]) for (text, _), count in entries])
    pooled = [(options.get("pooled_output"), count) for (_, options), count in entries]
    if pooled[0][0] is None:
        return [[text, {}]]
    return [[text, {"pooled_output": torch.cat([row.expand(count, *row.shape[1:]) for row, count in pooled])}]]
