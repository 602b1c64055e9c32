"""Low-rank layers in the namings of kohya, SPM, sliders, PEFT, diffusers and ComfyUI.

A key is a layer's name and a factor's, `<name>.lora_down.weight`. The factor's name gives the format, and so the rule
for the scale. Does not know files or models.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..lowrank import LowRank
from ..names import HOST, STEMS, TRANSFORMER, UNET, of_path
from .refused import REMEDY

RANK_LIMIT = 8192
"""Twice the largest rank that ComfyUI itself offers."""

_FACTORS = (
    ("kohya", re.compile(r"(?P<name>.+)\.lora_(?P<side>down|up)\.weight")),
    ("peft", re.compile(r"(?P<name>.+)\.lora_(?P<side>A|B)(\.(?!weight$)[^.]+)?(\.weight)?")),
    ("diffusers, old", re.compile(r"(?P<name>.+?)[._]lora(_linear_layer)?\.(?P<side>down|up)\.weight")),
    ("alpha", re.compile(r"(?P<name>.+)\.(?P<side>alpha)")),
)
_DOWN = ("down", "A")
_TEXT_ENCODER = ("lora_te", "text_encoder", "text_model.", "text_encoders.", "te.", "clip_l.", "clip_g.", "t5xxl.")

Scales = Callable[[str, int], float | None]
"""Returns the scale that a configuration gives a layer (its path without a prefix, its rank); None if it gives none."""


@dataclass
class Parts:
    """The keys of one layer's factors in the file."""

    down: list[str] = field(default_factory=list)
    up: list[str] = field(default_factory=list)
    alpha: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Named:
    """What was read: the format's name, the layers by name, and notes for the user."""

    source_format: str
    layers: dict[str, LowRank]
    notes: list[str]


def factor(key: str) -> tuple[str, str, str] | None:
    """Return a key's naming, its layer's name as written, and its side ("down", "up", "A", "B", "alpha"), or None."""
    for naming, pattern in _FACTORS:
        match = pattern.fullmatch(key)
        if match:
            return naming, match["name"], match["side"]
    return None


def canonical(name: str) -> str | None:
    """Return a layer's name as in names.py; "" for a text encoder's, None for an unknown one."""
    name = name.removeprefix("base_model.model.").removeprefix("unet.base_model.model.").removeprefix("model.")
    if name.startswith(_TEXT_ENCODER):
        return ""
    if name.startswith((HOST, *STEMS)):
        return name
    for prefix in (UNET, TRANSFORMER):
        if name.startswith(prefix):
            return prefix + _current(name.removeprefix(prefix))
    known = of_path(name)
    return None if known is None else known + _current(name)


def _current(path: str) -> str:
    """diffusers' current path; its old ones have a processor in them, and no number after `to_out`."""
    path = path.replace(".processor.", ".")
    return path + ".0" if path.endswith(".to_out") else path


def read_named(tensors: Mapping[str, Tensor], alpha: float | None, scales: Scales | None, rule: str) -> Named:
    """Return the low-rank layers in a file's tensors.

    Args:
        alpha: overrides every layer's.
        scales: of the file's configuration; None without one.
        rule: where that configuration is, in words.
    Raises: ValueError for keys of other things than low-rank layers, and for incomplete or damaged layers.
    """
    namings, parts, text = _collected(tensors)
    if not parts:
        raise ValueError(
            f"it changes only the text encoder ({len(text)} layers, such as '{text[0]}'), and UnGuide blends "
            "predictions of the diffusion model; use a LoRA that changes the diffusion model"
        )
    layers: dict[str, LowRank] = {}
    rules: dict[str, int] = {}
    for name, part in parts.items():
        down, up = _pair(tensors, name, part)
        scale, said = _scale(tensors, name, part, down.shape[0], alpha, scales, rule)
        rules[said] = rules.get(said, 0) + 1
        layers[name] = low_rank(name, down, up, scale)
    notes = [scale_note(rules)]
    if text:
        notes.append(
            f"{len(text)} text-encoder layers were left out (such as '{text[0]}'): UnGuide blends predictions of the "
            "diffusion model"
        )
    return Named(_source_format(namings, layers), layers, notes)


def scale_note(rules: Mapping[str, int]) -> str:
    """Return a sentence on where the layers' scales come from."""
    if len(rules) == 1:
        return f"scale = alpha / rank: {next(iter(rules))}"
    return "scale = alpha / rank: " + "; ".join(f"{rule} ({count} layers)" for rule, count in rules.items())


def low_rank(name: str, down: Tensor, up: Tensor, scale: float) -> LowRank:
    """Return the layer, validated. Raises: ValueError with its name."""
    if down.ndim and down.shape[0] > RANK_LIMIT:
        raise ValueError(f"layer '{name}' has rank {down.shape[0]}; expected {RANK_LIMIT} at most: the file is damaged")
    try:
        return LowRank(down, up, scale).require_finite()
    except ValueError as error:
        raise ValueError(f"layer '{name}': {error}") from error


def matrices(tensors: Mapping[str, Tensor], keys: Iterable[str]) -> list[Tensor]:
    """Return copies of factors: tensors of a safetensors file are views of it. Raises: ValueError."""
    copies = []
    for key in keys:
        shape = list(tensors[key].shape)
        if len(shape) < 2 or 0 in shape:
            raise ValueError(f"'{key}' has shape {shape}; expected a matrix: the file is damaged")
        copies.append(tensors[key].detach().clone())
    return copies


def _collected(tensors: Mapping[str, Tensor]) -> tuple[set[str], dict[str, Parts], list[str]]:
    """The namings used, the factors of each layer of the diffusion model, and the text encoder's layers."""
    namings: set[str] = set()
    parts: dict[str, Parts] = {}
    text: dict[str, None] = {}
    strange: dict[str, None] = {}
    for key in tensors:
        found = factor(key)
        if found is None:
            raise ValueError(f"it holds '{key}', which does not belong to a low-rank layer; {REMEDY}")
        naming, written, side = found
        name = canonical(written)
        if name is None:
            strange[written] = None
        elif not name:
            text[written] = None
        else:
            namings.add(naming if not written.startswith("base_model.") else "peft folder")
            part = parts.setdefault(name, Parts())
            (part.down if side in _DOWN else part.alpha if side == "alpha" else part.up).append(key)
    if strange:
        raise ValueError(f"it has {len(strange)} layers of unknown naming, such as '{next(iter(strange))}'; {REMEDY}")
    return namings, parts, list(text)


def _pair(tensors: Mapping[str, Tensor], name: str, part: Parts) -> tuple[Tensor, Tensor]:
    for found, other, side in ((part.down, part.up, "up"), (part.up, part.down, "down"), (part.alpha, part.up, "up")):
        if found and not other:
            raise ValueError(
                f"'{found[0]}' has no partner '{name}.lora_{side}.weight'; the file is incomplete, download it again"
            )
        if len(found) > 1:
            raise ValueError(f"'{found[0]}' and '{found[1]}' are both for one layer; keep one adapter in the file")
    down, up = matrices(tensors, (part.down[0], part.up[0]))
    if down.ndim == 3 and up.ndim == 3 and up.shape[2] != 1:
        raise ValueError(
            f"it is in the format CPE ('{part.up[0]}' has shape {list(up.shape)}, one matrix for each concept), which "
            f"is refused: an attention gate decides between them, token by token; {REMEDY}"
        )
    return down, up


def _scale(
    tensors: Mapping[str, Tensor],
    name: str,
    part: Parts,
    rank: int,
    alpha: float | None,
    scales: Scales | None,
    rule: str,
) -> tuple[float, str]:
    """The layer's scale, and the rule that gave it."""
    if alpha is not None:
        return alpha / rank, f"alpha {alpha}, as asked for"
    if part.alpha:
        return _stored_alpha(tensors, part.alpha[0]) / rank, "the file's alpha"
    said = None if scales is None else scales(name.split(".", 1)[-1], rank)
    if said is not None:
        return said, rule
    return 1.0, "scale 1, that is alpha = rank, as in the stock loaders, because the file stores none"


def _stored_alpha(tensors: Mapping[str, Tensor], key: str) -> float:
    stored = tensors[key]
    numbers = stored.flatten()[:4].tolist()
    if stored.numel() != 1 or isinstance(numbers[0], complex) or not math.isfinite(numbers[0]):
        raise ValueError(f"'{key}' is {numbers}; expected one finite number")
    return float(numbers[0])


def _source_format(namings: set[str], layers: Iterable[str]) -> str:
    if "peft folder" in namings:
        return "peft"
    if "diffusers, old" in namings:
        return "diffusers, old"
    names = list(layers)
    if any(name.startswith(STEMS) for name in names):
        return "kohya"
    if all(name.startswith(HOST) for name in names) or "kohya" in namings:
        return "generic"
    return "diffusers"
