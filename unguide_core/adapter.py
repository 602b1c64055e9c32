"""Erasure adapters: low-rank layers, and the card that says what they erase (see card.py).

Knows no file format (see formats/) and no model: layers are found by name by whoever applies them.
"""

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from .card import CARD_VERSION, Card

__all__ = ["CARD_VERSION", "Adapter", "Card", "LowRank", "initial_low_rank"]

_PRECISIONS = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_CONVOLUTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


@dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank change of one layer's weight: scale * up @ down, scale = alpha / rank  (arXiv 2106.09685).

    down: [rank, in] for a linear layer, [rank, in, *kernel] for a convolution.
    up: [out, rank], or [out, rank, 1, ...] for a convolution.
    scale: alpha / rank.

    Tensors that require gradients stay what they are: a LowRank is its own trainable form, see `initial_low_rank`.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        down, up = list(self.down.shape), list(self.up.shape)
        if len(down) not in (2, *_CONVOLUTIONS) or len(up) != len(down) or any(size != 1 for size in up[2:]):
            raise ValueError(
                f"down has shape {down} and up {up}; expected [rank, in] and [out, rank], "
                "or [rank, in, *kernel] and [out, rank, 1, ...]"
            )
        if down[0] != up[1]:
            raise ValueError(f"rank mismatch: down has shape {down}, so rank {down[0]}, and up {up}, so rank {up[1]}")
        if self.down.numel() == 0 or self.up.numel() == 0:
            raise ValueError(f"down has shape {down} and up {up}; expected no empty dimension")
        for name, tensor in (("down", self.down), ("up", self.up)):
            if tensor.dtype not in _PRECISIONS:
                raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating-point one")
            # through float32, since 8-bit floats have no isfinite
            if not bool(tensor.detach().float().isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinite values; expected finite ones: the file is damaged")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale}; expected a finite number")

    @property
    def rank(self) -> int:
        """The number of rows of `down`."""
        return self.down.shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight that this changes: [out, in] or [out, in, *kernel]."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(
        self,
        x: Tensor,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
    ) -> Tensor:
        """Return what is added to the layer's output for the input `x`.

        delta = scale * up(down(x))

        Args:
            x: [..., in] for a linear layer, [B, in, ...] for a convolution; dtype and device of the tensors in here.
            stride, padding, dilation: the convolution's own; not used by a linear layer.
        Returns: [..., out] or [B, out, ...].
        """
        if self.down.ndim == 2:
            return functional.linear(functional.linear(x, self.down) * self.scale, self.up)
        convolution = _CONVOLUTIONS[self.down.ndim]
        reduced = convolution(x, self.down, stride=stride, padding=padding, dilation=dilation)
        return convolution(reduced * self.scale, self.up)

    def weight_delta(self) -> Tensor:
        """Return the change of the weight itself, shaped `weight_shape`: scale * up @ down."""
        merged = self.up.flatten(1) @ self.down.flatten(1) * self.scale
        return merged.reshape(self.weight_shape)

    def reshaped(self, weight_shape: Sequence[int]) -> "LowRank":
        """Return the same change for a weight of another shape with the same numbers in it.

        Some trainers write a 1x1 convolution's change as a linear one's, or the reverse; the stock LoRA loader takes
        both.

        Args:
            weight_shape: [out, in] or [out, in, *kernel].
        Raises: ValueError if the weight has other sizes.
        """
        out, *rest = weight_shape
        if out != self.up.shape[0] or math.prod(rest) != self.down[0].numel():
            raise ValueError(
                f"the adapter's layer changes a weight of shape {list(self.weight_shape)}, "
                f"and the model's weight has shape {list(weight_shape)}"
            )
        ones = [1] * (len(rest) - 1)
        return replace(self, down=self.down.reshape(self.rank, *rest), up=self.up.reshape(out, self.rank, *ones))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "LowRank":
        """Return the same change on another device, or in another precision."""
        return replace(self, down=self.down.to(device, dtype), up=self.up.to(device, dtype))


def initial_low_rank(
    in_features: int, out_features: int, rank: int, scale: float, generator: torch.Generator | None = None
) -> LowRank:
    """Return a change of a linear layer that changes nothing yet, ready to be trained.

    down ~ N(0, 1 / rank), up = 0  (the official initialisation, drawn as its A [in, rank] is)

    Args:
        scale: alpha / rank; the official recipe has rank 1 and scale 8.
        generator: where the random numbers come from; None uses torch's global one.
    Returns: float32 leaf tensors that require gradients.
    """
    drawn = torch.randn(in_features, rank, generator=generator) * (1.0 / math.sqrt(rank))
    down = drawn.T.contiguous().requires_grad_()
    return LowRank(down, torch.zeros(out_features, rank, requires_grad=True), scale)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An erasure adapter: what it changes, and its card.

    layers: by their names, see names.py: `diffusion_model.<module path>`, `unet.<diffusers' path>`, ..., or a kohya
        stem (`lora_unet_down_blocks_1_...`) as it stands in the file.
    card: what is known of it.
    notes: sentences for a person on how the file was read: which scale rule applied, what was left out.
    partial: whether it may be used on a model that lacks some of its layers.
    """

    layers: Mapping[str, LowRank]
    card: Card = field(default_factory=Card)
    notes: tuple[str, ...] = ()
    partial: bool = False

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("an adapter needs at least one layer, got none")

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 over the layers' names, shapes, scales and values; card and precision of storage do not count."""
        return _digest(f"{name} ".encode() + _digested(self.layers[name]) for name in sorted(self.layers))

    @cached_property
    def signature(self) -> str:
        """The same without the names, which differ from format to format of one adapter."""
        return _digest(sorted(_digested(layer) for layer in self.layers.values()))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Adapter":
        """Return the same adapter on another device, or in another precision."""
        return replace(self, layers={name: layer.to(device, dtype) for name, layer in self.layers.items()})


def _digested(layer: LowRank) -> bytes:
    """Identifies a layer's shapes, values and scale."""
    digest = hashlib.sha256()
    for tensor in (layer.down, layer.up):
        digest.update(f"{list(tensor.shape)} ".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    digest.update(struct.pack("<d", layer.scale))
    return digest.digest()


def _digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()
