"""The files that erasure adapters come in, to and from `Adapter`.

    official   the research code's `lora.pth`: a torch zip of `<module path>.lora.A` [in, rank], `.lora.B` [rank, out]
    kohya      safetensors of `lora_unet_<stem>.lora_down.weight`, `.lora_up.weight`, `.alpha` (LECO, SPM, sliders)
    generic    safetensors: the same with ComfyUI's own names, `diffusion_model.<module path>`

The format is told by the content, never by the file's name. Anything else is refused by name. Knows no model: whether
an adapter's layers fit one is found out by whoever applies it.
"""

import math
import os
import pickle
import re
import secrets
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .adapter import Adapter, Card, LowRank

OFFICIAL_SCALE = 8.0
"""The official scripts merge with alpha = 8 and no division by the rank; their files store neither."""

_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
_A, _B = ".lora.A", ".lora.B"
_DIFFUSION_STEMS = {"kohya": "lora_unet_", "generic": "diffusion_model."}
_TEXT_ENCODER_STEMS = ("lora_te", "text_encoder")
_ZIP_MAGIC, _PICKLE_MAGIC = b"PK\x03\x04", b"\x80"

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
        tensors, metadata = _read(path)
        card = Card.from_metadata(metadata)
        source_format, layers, notes = _layers(tensors, alpha)
    except ValueError as error:
        raise AdapterError(f"adapter '{path.name}': {error}") from error
    ranks, alphas = {layer.rank for layer in layers.values()}, {_alpha(layer) for layer in layers.values()}
    card = replace(
        card,
        source_format=card.source_format or source_format,
        rank=ranks.pop() if len(ranks) == 1 else None,
        alpha=alphas.pop() if len(alphas) == 1 else None,
    )
    return Adapter(layers, card, tuple(notes))


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
        # clone, for safetensors refuses tensors that share memory
        tensors[name + _DOWN] = layer.down.detach().cpu().clone(memory_format=torch.contiguous_format)
        tensors[name + _UP] = layer.up.detach().cpu().clone(memory_format=torch.contiguous_format)
        tensors[name + _ALPHA] = torch.tensor(_alpha(layer), dtype=torch.float64)
        if tensors[name + _ALPHA].float().item() == _alpha(layer):
            tensors[name + _ALPHA] = tensors[name + _ALPHA].float()
    _write_atomically(path, save(tensors, {"format": "pt", **adapter.card.to_metadata()}))


def _alpha(layer: LowRank) -> float:
    """The alpha that gives the layer's scale: scale * rank, rounded to float32 where that still gives that scale."""
    exact = layer.scale * layer.rank
    rounded = torch.tensor(exact, dtype=torch.float32).item()
    return rounded if rounded / layer.rank == layer.scale else exact


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise AdapterError(
            f"cannot save '{path}': {error.strerror or error}; "
            "check that the folder exists and may be written, and that the disk has room"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors and metadata, whatever its container. Raises ValueError."""
    if not path.is_file():
        raise ValueError("no such file; put adapters into ComfyUI's folder models/loras")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
    if size == 0:
        raise ValueError("the file is empty; download or save it again")
    if start.startswith(_ZIP_MAGIC):
        tensors, metadata = _read_torch_zip(path, size), dict[str, str]()
    elif start.startswith(_PICKLE_MAGIC) and not (len(start) == 9 and start[8:] == b"{"):
        raise ValueError(
            "it is a bare pickle, which may run code when opened, and is not read; expected safetensors or a torch "
            "zip: save it again with a current torch, or as safetensors"
        )
    else:
        _check_safetensors_header(start, size)
        tensors, metadata = _read_safetensors(path)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if stored > size:
        raise ValueError(
            f"its tensors claim {stored} bytes and the file has {size}; it is damaged or forged, do not use it"
        )
    return tensors, metadata


def _check_safetensors_header(start: bytes, size: int) -> None:
    """safetensors begins with the header's length, 8 bytes little-endian, and the header, a JSON object."""
    header = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
    if start[8:] != b"{":
        raise ValueError("it is neither safetensors nor a torch zip; expected an adapter saved by a LoRA trainer")
    if header > size - 8:
        raise ValueError(f"it is truncated: its header has {header} bytes and the file only {size}; download it again")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            metadata.pop("format", None)  # the container's own: which library wrote it
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"its safetensors content is damaged or truncated ({error}); download or save it again"
        ) from error


def _read_torch_zip(path: Path, size: int) -> dict[str, Tensor]:
    """A torch zip's tensors, without unpickling anything but tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"its torch zip is damaged or truncated ({error}); download or save it again") from error
    # torch stores without compression, so anything bigger than the file is a zip bomb
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise ValueError("it is a compressed zip, and torch writes none; expected a file saved by torch")
    if not any(member.filename.endswith("data.pkl") for member in members):
        raise ValueError(
            "it is a zip without a torch pickle; expected a file saved by torch: unpack it and use what is in it"
        )
    try:
        with path.open("rb") as file:  # by its path, torch.load would go by the name's ending
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "it holds more than tensors, perhaps code, and is refused; expected an official lora.pth, a plain dict of "
            "tensors"
        ) from error
    except Exception as error:  # torch raises nearly anything on damaged content
        raise ValueError(f"its torch content is damaged ({error}); download or save it again") from error
    values = list(content.values()) if isinstance(content, dict) else [content]
    strange = [
        v for v in values if not (isinstance(v, Tensor) and v.layout == torch.strided and v.device.type == "cpu")
    ]
    if strange or not isinstance(content, dict):
        raise ValueError(
            f"it holds a {type((strange or values)[0]).__name__} where a dict of plain tensors is expected; "
            "use the lora.pth that the official trainer wrote"
        )
    return {str(key): value for key, value in content.items()}


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
    if stored.numel() != 1 or not math.isfinite(stored.item()):
        raise ValueError(f"'{stem}{_ALPHA}' is {stored.flatten()[:4].tolist()}; expected one finite number")
    return float(stored.item())


def _low_rank(stem: str, down: Tensor, up: Tensor, scale: float) -> LowRank:
    try:
        return LowRank(down, up, scale)
    except ValueError as error:
        raise ValueError(f"layer '{stem}': {error}") from error
