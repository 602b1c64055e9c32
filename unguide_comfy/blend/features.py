"""Features of the images in a denoising step, read from the network while it runs.

The network is a UNet of SD 1.x, 2.x or SDXL, and what is read is its middle block's output, where it enters the first
output block: every host version calls a patch there. Reading changes nothing, not a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...unguide_core.probe.image import image_features

_FIRST = ("output", 0)


def is_readable(model: Any) -> bool:
    """Return whether a host's `BaseModel` has the block that is read."""
    network = getattr(model, "diffusion_model", None)
    return isinstance(network, UNetModel) and network.middle_block is not None


class Features:
    """The features of a denoising step's images, by conditioning and adapter.

    `by_group` has those of each conditioning of the host's call, by its number and the adapter that computed it (None:
    the base model), [B, F].
    """

    def __init__(self) -> None:
        self.by_group: dict[tuple[int, int | None], torch.Tensor] = {}
        self._last: torch.Tensor | None = None

    def patched(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return transformer options with which the network's forward is read."""
        patches = options.get("patches", {})
        ours = [self._patch, *patches.get("output_block_patch", ())]
        self._last = None
        return {**options, "patches": {**patches, "output_block_patch": ours}}

    def _patch(self, hidden: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        if tuple(options.get("block", ())) == _FIRST:
            self._last = image_features(hidden)
        return hidden, skip

    def take(self, groups: Sequence[tuple[int, int | None]]) -> None:
        """Keep what the last forward read of its groups of rows: conditionings by number, each with its adapter."""
        if self._last is not None:
            self.by_group.update(zip(groups, self._last.chunk(len(groups)), strict=True))

    def of(self, conditioning: int) -> torch.Tensor | None:
        """Return a conditioning's features, the base model's where there are any, [B, F]."""
        found = [adapter for number, adapter in self.by_group if number == conditioning]
        if not found:
            return None
        return self.by_group[conditioning, None if None in found else found[0]]
