"""Erasure adapters: low-rank layers by name, and hashes that identify adapters and models.

Does not know file formats (see formats/) or models: whoever applies an adapter finds the layers by name.
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

from .card import Card

PRECISIONS = frozenset(
    (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
)
_CONVOLUTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


CHANGE_LIMIT = 65504.0
"""The largest change of a weight that a file may ask for: half precision's largest number. Real ones are below 1."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank change of one layer's weight: scale * up @ down, scale = alpha / rank  (arXiv 2106.09685).

    down: [rank, in] for a linear layer, [rank, in, *kernel] for a convolution.
    up: [out, rank], or [out, rank, 1, ...] for a convolution.
    scale: alpha / rank.

    Tensors may require gradients, see `initial_low_rank`. Their values are not checked here: `require_finite` is for
    files.
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
            if tensor.dtype not in PRECISIONS:
                raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating-point one")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale}; expected a finite number")

    def require_finite(self) -> "LowRank":
        """Return the layer itself.

        Raises: ValueError if it holds NaN or infinite values, or can change a weight by more than `CHANGE_LIMIT`.
        """
        bound = abs(self.scale) * self.rank
        for name, tensor in (("down", self.down), ("up", self.up)):
            values = tensor.detach().float()  # 8-bit floats have no isfinite
            if not bool(values.isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinite values; expected finite ones: the file is damaged")
            bound *= float(values.abs().max())
        if bound > CHANGE_LIMIT:
            raise ValueError(
                f"it can change a weight by {bound:.3g}, with scale {self.scale:.3g}; expected {CHANGE_LIMIT:g} at "
                "most: its alpha is wrong, or the file is damaged"
            )
        return self

    @property
    def rank(self) -> int:
        """The number of rows of `down`."""
        return self.down.shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight that the layer changes: [out, in] or [out, in, *kernel]."""
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
            x: [..., in] for a linear layer, [B, in, ...] for a convolution; dtype and device of `down` and `up`.
            stride, padding, dilation: of the convolution; a linear layer ignores them.
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
        """Return the same change for a weight [out, in] or [out, in, *kernel] that has another shape.

        Some trainers store a 1x1 convolution as a linear layer, or the reverse; the stock LoRA loader takes both.

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
    """Return an untrained change of a linear layer: float32 leaf tensors that require gradients.

    down ~ N(0, 1 / rank), up = 0  (the official initialisation, sampled as its A, [in, rank])

    Args:
        scale: alpha / rank; the official recipe has rank 1 and scale 8.
        generator: None uses torch's global one.
    """
    a = torch.randn(in_features, rank, generator=generator) * (1.0 / math.sqrt(rank))
    down = a.T.contiguous().requires_grad_()
    return LowRank(down, torch.zeros(out_features, rank, requires_grad=True), scale)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An erasure adapter.

    layers: by name, see names.py: `diffusion_model.<module path>`, `unet.<diffusers' path>`, ..., or a kohya stem
        (`lora_unet_down_blocks_1_...`) as written in the file.
    card: its metadata.
    notes: sentences for the user on how the file was read: where the scale comes from, what was left out.
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
        """A sha256 of the layers' names, shapes, scales and values; independent of the card and of the precision."""
        return _digest(f"{name} ".encode() + _digested(self.layers[name]) for name in sorted(self.layers))

    @cached_property
    def signature(self) -> str:
        """A sha256 of the same without the names, so that it is the same in all formats."""
        return _digest(sorted(_digested(layer) for layer in self.layers.values()))


def weights_hash(weights: Iterable[Tensor]) -> str:
    """Return a sha256 that identifies a model by its weights, whichever program loaded it.

    It hashes the sorted sha256 of every tensor's values in half precision. Names, shapes and order do not count because
    programs differ in them.
    """
    digests = []
    for weight in weights:
        values = weight.detach().to("cpu", torch.float32).half().contiguous().flatten()
        digests.append(hashlib.sha256(values.numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _digested(layer: LowRank) -> bytes:
    """A sha256 of a layer's shapes, values and scale."""
    digest = hashlib.sha256()
    for tensor in (layer.down, layer.up):
        digest.update(f"{list(tensor.shape)} ".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    digest.update(struct.pack("<d", layer.scale))
    return digest.digest()


def _digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()
