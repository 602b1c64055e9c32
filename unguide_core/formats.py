"""Erasure adapters in the formats that files hold them in, to and from `Adapter`.

    official   the research code's `lora.pth`: a torch zip of `<module path>.lora.A` [in, rank], `.lora.B` [rank, out]
    kohya      safetensors of `lora_unet_<stem>.lora_down.weight`, `.lora_up.weight`, `.alpha` (LECO, SPM, sliders)
    generic    safetensors: the same with ComfyUI's own names, `diffusion_model.<module path>`

The format is told by the content, never by the file's name. Anything else is refused by name. Knows neither how files
are opened (see containers.py) nor any model: whether an adapter's layers fit one is found out by whoever applies it.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .adapter import Adapter, Card, LowRank
from .containers import read_tensors, write_safetensors

OFFICIAL_SCALE = 8.0
"""The official scripts merge with alpha = 8 and no division by the rank; their files store neither."""

_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
_A, _B = ".lora.A", ".lora.B"
_DIFFUSION_STEMS = {"kohya": "lora_unet_", "generic": "diffusion_model."}
_TEXT_ENCODER_STEMS = ("lora_te", "text_encoder")

_REFUSED = (
    (r"dora_scale", "DoRA", "it rescales the whole weight, which no low-rank change added to the base can do"),
    (r"\.hada_", "LoHa", "it is a product of two low-rank matrices, element by element"),
    (r"\.lokr_", "LoKr", "it is a Kronecker product, not a low-rank matrix"),
    (r"\.b?oft_", "OFT", "it rotates the weight instead of adding to it"),
    (r"\.[ab][12]\.weight$", "GLoRA", "it multiplies the weight as well as adding to it"),
    (r"\.lora_mid\.weight$", "LoCon with a third factor (CP decomposition)", "it is no product of two matrices"),
    (r"\.(diff|diff_b|w_norm|b_norm)$", "full weight differences", "they are no low-rank matrix"),
    (r"\.set_weight$", "full replacement weights", "they are no low-rank matrix"),
    (r"\.lora_[AB]\b|[._]lora\.(down|up)\.weight$", "PEFT or diffusers naming", "it is not read"),
)
_REMEDY = (
    "use a LoRA in official UnGuide, kohya (lora_unet_...) or ComfyUI (diffusion_model...) format, or convert it to one"
)


class AdapterError(ValueError):
    """A file is no erasure adapter that can be used, or one cannot be written. The message names file and remedy."""


def load_adapter(path: str | os.PathLike[str], *, alpha: float | None = None) -> Adapter:
    """Return the adapter in a file.

    Args:
        path: an official `.pth`, or safetensors with kohya or generic ComfyUI names.
        alpha: overrides the alpha of every layer, in the usual terms: scale = alpha / rank. None takes the file's. A
            layer without one has scale 1, as in the stock LoRA loader; official files, which never hold one, have scale
            8, that is alpha = 8 * rank.
    Returns: float tensors on the CPU, as stored. `notes` tells which rule gave the scale and what was left out.
    Raises: AdapterError, naming the file, what is wrong with it and what to do.
    """
    path = Path(path)
    try:
        tensors, metadata = read_tensors(path)
        source_format, layers, notes = _layers(tensors, alpha)
        return Adapter(layers, _completed(Card.from_metadata(metadata), source_format, layers), tuple(notes))
    except ValueError as error:
        raise AdapterError(f"adapter '{path.name}': {error}") from error
    except OSError as error:
        raise AdapterError(f"adapter '{path.name}' cannot be read: {error}; check the file's permissions") from error


def save_adapter(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Write the adapter as safetensors that ComfyUI's stock LoRA loader takes as well, its card in the metadata.

    Layer names stay as they are: `diffusion_model.<path>` gives a generic file, kohya stems a kohya file. Tensors keep
    their precision and their bits, and so does the scale if alpha = scale * rank is a float32 number (else to one ulp
    of float64). An existing file is replaced in one step, after the new one is complete.

    Raises: AdapterError if the path does not end in .safetensors, or cannot be written; an existing file is untouched.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise AdapterError(
            f"cannot save to '{path.name}': expected a name ending in .safetensors, by which loaders know it"
        )
    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        tensors[name + _DOWN], tensors[name + _UP] = layer.down, layer.up
        alpha = torch.tensor(_alpha(layer), dtype=torch.float64)
        tensors[name + _ALPHA] = alpha.float() if alpha.float() == alpha else alpha
    try:
        write_safetensors(path, tensors, adapter.card.to_metadata())
    except OSError as error:
        raise AdapterError(
            f"cannot save '{path}': {error.strerror or error}; "
            "check that the folder exists and may be written, and that the disk has room"
        ) from error


def _alpha(layer: LowRank) -> float:
    """The alpha that gives the layer's scale: scale * rank, rounded to float32 where that still gives that scale."""
    exact = layer.scale * layer.rank
    rounded = torch.tensor(exact, dtype=torch.float64).float().item()
    return rounded if rounded / layer.rank == layer.scale else exact


def _completed(card: Card, source_format: str, layers: Mapping[str, LowRank]) -> Card:
    """The card with what the layers themselves tell, which outranks what is written in it."""
    ranks, alphas = {layer.rank for layer in layers.values()}, {_alpha(layer) for layer in layers.values()}
    return replace(
        card,
        source_format=card.source_format or source_format,
        rank=ranks.pop() if len(ranks) == 1 else None,
        alpha=alphas.pop() if len(alphas) == 1 else None,
    )


def _layers(tensors: Mapping[str, Tensor], alpha: float | None) -> tuple[str, dict[str, LowRank], list[str]]:
    """The format's name, the layers by name, and notes. Raises ValueError."""
    if not tensors:
        raise ValueError("it holds no tensors; expected low-rank layers")
    if alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"the overriding alpha is {alpha}; expected a finite number")
    if any(key.endswith((_A, _B)) for key in tensors):
        return "official", *_official_layers(tensors, alpha)
    for mark, name, reason in _REFUSED:
        key = next((key for key in tensors if re.search(mark, key)), None)
        if key is not None:
            raise ValueError(f"it is in the format {name} ('{key}'), which is refused: {reason}; {_REMEDY}")
    if not any(key.endswith((_DOWN, _UP)) for key in tensors):
        raise ValueError(
            f"it holds no low-rank layers but, for instance, '{next(iter(tensors))}', perhaps full weights; {_REMEDY}"
        )
    return _named_layers(tensors, alpha)


def _official_layers(tensors: Mapping[str, Tensor], alpha: float | None) -> tuple[dict[str, LowRank], list[str]]:
    """W += alpha * (A @ B)^T, A [in, rank], B [rank, out]: down = A^T, up = B^T (official lora.py and utils.py)."""
    stems = _stems(tensors, (_A, _B))
    layers = {}
    for stem in stems:
        a, b = _pair(tensors, stem, _A, _B)
        scale = OFFICIAL_SCALE if alpha is None else alpha / a.shape[-1]
        name = _DIFFUSION_STEMS["generic"] + stem.removeprefix(_DIFFUSION_STEMS["generic"])
        layers[name] = _low_rank(stem, a.transpose(0, -1).contiguous(), b.transpose(0, -1).contiguous(), scale)
    rule = "alpha = 8 * rank, the official scripts' constant, for the file stores none" if alpha is None else None
    return layers, [_scale_note(rule, alpha)]


def _named_layers(tensors: Mapping[str, Tensor], alpha: float | None) -> tuple[str, dict[str, LowRank], list[str]]:
    """The layers of a kohya or generic file; both may stand in one file, as the host allows."""
    stems = _stems(tensors, (_DOWN, _UP, _ALPHA))
    text = [stem for stem in stems if stem.startswith(_TEXT_ENCODER_STEMS)]
    diffusion = [stem for stem in stems if stem.startswith(tuple(_DIFFUSION_STEMS.values()))]
    strange = sorted(set(stems) - set(text) - set(diffusion))
    if strange:
        raise ValueError(f"it has {len(strange)} layers of unknown naming, such as '{strange[0]}'; {_REMEDY}")
    if not diffusion:
        raise ValueError(
            f"it changes only the text encoder ({len(text)} layers, such as '{text[0]}'), and UnGuide blends "
            "predictions of the diffusion model; use a LoRA that changes the diffusion model"
        )
    layers = {}
    for stem in diffusion:
        down, up = _pair(tensors, stem, _DOWN, _UP)
        layer_alpha = alpha if alpha is not None else _stored_alpha(tensors, stem)
        layers[stem] = _low_rank(stem, down, up, 1.0 if layer_alpha is None else layer_alpha / down.shape[0])
    missing = sum(stem + _ALPHA not in tensors for stem in diffusion)
    rule = "the file's alpha" if not missing else f"the file's alpha; scale 1 for {missing} layers that have none"
    notes = [_scale_note(rule, alpha)]
    if text:
        notes.append(
            f"{len(text)} text-encoder layers were left out: UnGuide blends predictions of the diffusion model"
        )
    kohya = any(stem.startswith(_DIFFUSION_STEMS["kohya"]) for stem in diffusion)
    return "kohya" if kohya else "generic", layers, notes


def _scale_note(rule: str | None, alpha: float | None) -> str:
    return f"scale = alpha / rank: {f'alpha {alpha}, as asked for' if alpha is not None else rule}"


def _stems(tensors: Iterable[str], suffixes: tuple[str, ...]) -> list[str]:
    """What stands before the suffixes, in the file's order. Raises ValueError for a key with none of them."""
    stems: dict[str, None] = {}
    for key in tensors:
        suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), None)
        if suffix is None:
            raise ValueError(f"it holds '{key}', which belongs to no low-rank layer; {_REMEDY}")
        stems[key.removesuffix(suffix)] = None
    return list(stems)


def _pair(tensors: Mapping[str, Tensor], stem: str, first: str, second: str) -> tuple[Tensor, Tensor]:
    """Both factors of a layer, copied: tensors of a safetensors file are views into it while it lies open."""
    for suffix, partner in ((first, second), (second, first)):
        if stem + suffix not in tensors:
            raise ValueError(
                f"'{stem}{partner}' has no partner '{stem}{suffix}'; the file is incomplete, download it again"
            )
        shape = list(tensors[stem + suffix].shape)
        if len(shape) < 2 or 0 in shape:
            raise ValueError(f"'{stem}{suffix}' has shape {shape}; expected a matrix: the file is damaged")
    return tensors[stem + first].detach().clone(), tensors[stem + second].detach().clone()


def _stored_alpha(tensors: Mapping[str, Tensor], stem: str) -> float | None:
    stored = tensors.get(stem + _ALPHA)
    if stored is None:
        return None
    numbers = stored.flatten()[:4].tolist()
    if stored.numel() != 1 or isinstance(numbers[0], complex) or not math.isfinite(numbers[0]):
        raise ValueError(f"'{stem}{_ALPHA}' is {numbers}; expected one finite number")
    return float(numbers[0])


def _low_rank(stem: str, down: Tensor, up: Tensor, scale: float) -> LowRank:
    try:
        return LowRank(down, up, scale)
    except ValueError as error:
        raise ValueError(f"layer '{stem}': {error}") from error
