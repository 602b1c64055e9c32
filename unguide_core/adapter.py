"""Erasure adapters: low-rank layers, and the card that says what they erase.

Knows no file format (see formats.py) and no model: layers are found by name by whoever applies them.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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


CARD_VERSION = 1
_PREFIX = "unguide."


@dataclass(frozen=True)
class Card:
    """What an adapter erases and how it came about.

    Stored as safetensors metadata, each field under the key `unguide.<field>`: text as it is, everything else as JSON.
    A field with its default value is not stored, except the version.

    version: of this list of keys.
    concept: what is erased, a word or two ("cat").
    synonyms: other words for it that were trained, or shall be tested.
    target: the prompt that was trained away ("a photo of the cat"), which is the concept's own prompt for the probe; if
        empty, the concept itself is, see `concept_prompt`.
    reference: the prompt whose prediction took its place.
    neutral: the prompt that the probe compares with; usually the empty one.
    objective: what it was trained towards ("paper", "selective", ...).
    base_model, base_hash: the model it was trained on: a name, and the sha256 of its diffusion weights.
    rank, alpha: of every layer, where all agree; scale = alpha / rank.
    source_format: the format the adapter first came in ("official", "kohya", "generic").
    settings: of the training, any JSON object.
    calibration: the influence on the concept's own prompt at the probe, "mean", "std" and "repeats", and the settings
        it holds for, such as "latent" ([4, 8, 8]), "steps", "step", "sigma", "cfg", "scheduler"; "threshold", where
        other prompts' influence was measured too and lies below it. Empty if not measured.
    author, licence: text.
    extra: metadata that this version does not know, `unguide.` or not; survives unchanged.
    """

    version: int = CARD_VERSION
    concept: str = ""
    synonyms: tuple[str, ...] = ()
    target: str = ""
    reference: str = ""
    neutral: str = ""
    objective: str = ""
    base_model: str = ""
    base_hash: str = ""
    rank: int | None = None
    alpha: float | None = None
    source_format: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    author: str = ""
    licence: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _TEXT_FIELDS:
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"the card's {name} is {getattr(self, name)!r}; expected text")
        if not isinstance(self.synonyms, tuple) or not all(isinstance(word, str) for word in self.synonyms):
            raise ValueError(f"the card's synonyms are {self.synonyms!r}; expected a tuple of texts")
        if not _is_number(self.version) or self.version != int(self.version):
            raise ValueError(f"the card's version is {self.version!r}; expected a whole number")
        if self.rank is not None and (not _is_number(self.rank) or self.rank != int(self.rank) or self.rank < 1):
            raise ValueError(f"the card's rank is {self.rank!r}; expected a whole number from 1 on")
        if self.alpha is not None and not _is_number(self.alpha):
            raise ValueError(f"the card's alpha is {self.alpha!r}; expected a finite number")
        for name in ("settings", "calibration"):
            _require_json_object(name, getattr(self, name))
        mean, std = self.calibration.get("mean", 1.0), self.calibration.get("std", 0.0)
        if not (_is_number(mean) and _is_number(std) and mean > 0.0 and std >= 0.0):
            raise ValueError(
                f"the card's calibration has mean {mean!r} and std {std!r}; expected a norm above 0, and its spread"
            )

    @property
    def concept_prompt(self) -> str:
        """The text to encode as the concept's own prompt; empty if the card knows no concept."""
        return self.target or self.concept

    def to_metadata(self) -> dict[str, str]:
        """Return the card as safetensors metadata."""
        metadata = {**self.extra, f"{_PREFIX}version": str(self.version)}
        for name, default in _STORED_FIELDS.items():
            value = getattr(self, name)
            if value != default:
                metadata[_PREFIX + name] = value if name in _TEXT_FIELDS else json.dumps(value, sort_keys=True)
        return metadata

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "Card":
        """Return the card that safetensors metadata holds; everything else in it becomes `extra`.

        Raises: ValueError if a value is not what its key promises.
        """
        values: dict[str, Any] = {}
        extra: dict[str, str] = {}
        for key, text in metadata.items():
            name = key.removeprefix(_PREFIX)
            if not key.startswith(_PREFIX) or name not in {"version", *_STORED_FIELDS}:
                extra[key] = text
            elif name in _TEXT_FIELDS:
                values[name] = text
            else:
                try:
                    values[name] = json.loads(text)
                except ValueError as error:
                    raise ValueError(f"the card's key '{key}' is '{text}'; expected JSON") from error
        if isinstance(values.get("synonyms"), list):
            values["synonyms"] = tuple(values["synonyms"])
        return cls(**values, extra=extra)


_TEXT_FIELDS = tuple(f.name for f in fields(Card) if f.type is str)
_STORED_FIELDS: dict[str, Any] = {
    f.name: {} if f.name in ("settings", "calibration") else f.default
    for f in fields(Card)
    if f.name not in ("version", "extra")
}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require_json_object(name: str, value: object) -> None:
    try:
        if not isinstance(value, Mapping):
            raise TypeError("not a mapping")
        json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the card's {name} are {value!r}; expected a JSON object of finite numbers and text"
        ) from error


@dataclass(frozen=True, eq=False)
class Adapter:
    """An erasure adapter: what it changes, and its card.

    layers: by the name under which the host program finds a layer: `diffusion_model.<module path>`, or a kohya stem
        (`lora_unet_down_blocks_1_...`) as it stands in the file.
    card: what is known of it.
    notes: sentences for a person on how the file was read: which scale rule applied, what was left out.
    """

    layers: Mapping[str, LowRank]
    card: Card = field(default_factory=Card)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("an adapter needs at least one layer, got none")

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 over the layers' names, shapes, scales and values; card and precision of storage do not count."""
        digest = hashlib.sha256()
        for name in sorted(self.layers):
            layer = self.layers[name]
            for tensor in (layer.down, layer.up):
                digest.update(f"{name} {list(tensor.shape)} ".encode())
                digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
            digest.update(struct.pack("<d", layer.scale))
        return digest.hexdigest()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Adapter":
        """Return the same adapter on another device, or in another precision."""
        return replace(self, layers={name: layer.to(device, dtype) for name, layer in self.layers.items()})
