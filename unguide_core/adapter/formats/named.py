"""Low-rank layers in the namings of kohya, SPM, sliders, PEFT, diffusers and ComfyUI.

A key is a layer's name and a factor's, `<name>.lora_down.weight`. The factor's name gives the format, and so the rule
for the scale. Does not know files or models.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..lowrank import LowRank
from ..names import HOST, STEMS, TRANSFORMER, UNET, of_path
from . import composed
from .refused import REMEDY

RANK_LIMIT = 8192
"""Twice the largest rank that ComfyUI itself offers."""

_FACTORS = (
    ("kohya", re.compile(r"(?P<name>.+)\.lora_(?P<side>down|up)\.weight")),
    ("peft", re.compile(r"(?P<name>.+)\.lora_(?P<side>A|B)(\.(?!weight$)[^.]+)?(\.weight)?")),
    ("diffusers, old", re.compile(r"(?P<name>.+?)[._]lora(_linear_layer)?\.(?P<side>down|up)\.weight")),
    ("alpha", re.compile(r"(?P<name>.+)\.(?P<side>alpha)")),
    ("lycoris", composed.ROLE_PATTERN),
)
_SIDES = {"A": "down", "B": "up", f"{composed.MAGNITUDE}.weight": composed.MAGNITUDE}
_TEXT_ENCODER = ("lora_te", "text_encoder", "text_model.", "text_encoders.", "te.", "clip_l.", "clip_g.", "t5xxl.")
_EMBEDDING = "bundle_emb."

BaseWeights = Callable[[str], Tensor | None]
"""Returns a parameter of the base model by its name as in names.py with `.weight` or `.bias`; None without one."""

Scales = Callable[[str, int | None], float | None]
"""Returns the scale that a configuration gives a layer (its path without a prefix, its rank); None if it gives none."""


Roles = dict[str, list[str]]
"""One layer's keys in the file by what they hold: "down", "up", "alpha", or an end of `composed.ROLE`."""


@dataclass(frozen=True)
class Named:
    """What was read: the format's name, the layers by name, and notes for the user."""

    source_format: str
    layers: dict[str, LowRank]
    notes: list[str]


def factor(key: str) -> tuple[str, str, str] | None:
    """Return a key's naming, its layer's name as written, and what it holds (see `Roles`), or None."""
    for naming, pattern in _FACTORS:
        match = pattern.fullmatch(key)
        if match:
            return naming, match["name"], _SIDES.get(match["side"], match["side"])
    return None


def is_elsewhere(key: str) -> bool:
    """Return whether a key belongs to a text encoder or to an embedding that comes with the adapter."""
    return key.startswith(_EMBEDDING) or canonical(key) == ""


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


@dataclass(frozen=True)
class Reading:
    """How a file is to be read, see `load_adapter`.

    alpha: overrides every layer's.
    scales, rule: of the file's configuration, and where that is, in words; None without one.
    base: the base model's parameters, for layers whose change depends on them.
    partial: whether layers that the base model lacks are left out.
    """

    alpha: float | None = None
    scales: Scales | None = None
    rule: str = ""
    base: BaseWeights | None = None
    partial: bool = False


def read_named(tensors: Mapping[str, Tensor], reading: Reading) -> Named:
    """Return the low-rank layers in a file's tensors.

    Raises: ValueError for keys of other things than low-rank layers, and for incomplete or damaged layers.
    """
    namings, parts, elsewhere = _collected(tensors)
    if not parts:
        raise ValueError(
            f"it changes only the text encoder ({len(elsewhere)} layers, such as '{elsewhere[0]}'), and UnGuide blends "
            "predictions of the diffusion model; use a LoRA that changes the diffusion model"
        )
    layers: dict[str, LowRank] = {}
    rules: dict[str, int] = {}
    kinds: dict[str, int] = {}
    lacking: list[str] = []
    for name, roles in parts.items():
        kind = _complete(name, roles)
        held = {role: _copy(tensors, key) for role, (key, *_) in roles.items()}
        scale, said = _scale(tensors, name, roles, composed.rank_of(kind, held), reading)
        depending = composed.needs_weight(kind, held)
        weight = None if depending is None else _weight(name, depending, reading)
        if depending is not None and weight is None:
            lacking.append(name)
            continue
        layers[name] = _layer(name, kind, held, scale, weight)
        rules[said] = rules.get(said, 0) + 1
        kinds[depending or kind] = kinds.get(depending or kind, 0) + 1
    notes = [scale_note(rules), *_notes(layers, kinds, lacking, elsewhere)]
    return Named(_source_format(namings, layers), layers, notes)


def _notes(
    layers: Mapping[str, LowRank], kinds: Mapping[str, int], lacking: list[str], elsewhere: list[str]
) -> list[str]:
    """What became of layers that are not plain LoRA, and what was left out."""
    notes = []
    for kind, count in kinds.items():
        if kind != "LoRA":
            highest = max(layer.rank for layer in layers.values())
            notes.append(
                f"{count} {kind} layers became low-rank ones that change the weights alike, rank {highest} at most"
            )
    if lacking:
        notes.append(f"{len(lacking)} layers without a counterpart in the model were left out, such as '{lacking[0]}'")
    embeddings = [name for name in elsewhere if name.startswith(_EMBEDDING)]
    text = [name for name in elsewhere if not name.startswith(_EMBEDDING)]
    if text:
        notes.append(
            f"{len(text)} text-encoder layers were left out (such as '{text[0]}'): UnGuide blends predictions of the "
            "diffusion model"
        )
    if embeddings:
        notes.append(
            f"{len(embeddings)} embeddings that come with it were left out (such as '{embeddings[0]}'): they stand for "
            "words of a prompt"
        )
    return notes


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


def _collected(tensors: Mapping[str, Tensor]) -> tuple[set[str], dict[str, Roles], list[str]]:
    """The namings used, each diffusion layer's keys by what they hold, and what belongs elsewhere."""
    namings: set[str] = set()
    parts: dict[str, Roles] = {}
    elsewhere: dict[str, None] = {}
    strange: dict[str, None] = {}
    for key in tensors:
        found = factor(key)
        if is_elsewhere(key):
            elsewhere[found[1] if found and not key.startswith(_EMBEDDING) else key] = None
            continue
        if found is None:
            raise ValueError(f"it holds '{key}', which does not belong to a low-rank layer; {REMEDY}")
        naming, written, role = found
        name = canonical(written)
        if name is None:
            strange[written] = None
            continue
        namings.add(naming if not written.startswith("base_model.") else "peft folder")
        parts.setdefault(name, {}).setdefault(role, []).append(key)
    if strange:
        raise ValueError(f"it has {len(strange)} layers of unknown naming, such as '{next(iter(strange))}'; {REMEDY}")
    return namings, parts, list(elsewhere)


def _complete(name: str, roles: Roles) -> str:
    """The layer's kind. Raises: ValueError if it lacks a part, or has one twice."""
    kind = composed.kind_of(roles)
    first = next(iter(roles.values()))[0]
    for role in composed.NEEDED[kind]:
        if role not in roles:
            end = {"down": "lora_down.weight", "up": "lora_up.weight"}.get(role, role)
            raise ValueError(f"'{first}' has no partner '{name}.{end}'; the file is incomplete, download it again")
    for keys in roles.values():
        if len(keys) > 1:
            raise ValueError(f"'{keys[0]}' and '{keys[1]}' are both for one layer; keep one adapter in the file")
    if kind == "OFT" and composed.DORA in roles:
        raise ValueError(f"layer '{name}' is OFT with a {composed.DORA}, which no known tool writes; {REMEDY}")
    return kind


def _copy(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """A copy of one part: tensors of a safetensors file are views of it."""
    if key.endswith((".alpha", f".{composed.MAGNITUDE}", f".{composed.MAGNITUDE}.weight", ".rescale")):
        return tensors[key].detach().clone()
    return matrices(tensors, (key,))[0]


def _weight(name: str, kind: str, reading: Reading) -> Tensor | None:
    """The model's weight that a layer changes; None if the model lacks it and that is allowed."""
    if reading.base is None:
        raise ValueError(
            f"layer '{name}' is {kind}, whose change depends on the model's own weight; connect the model that the "
            "file was made for to Load Erasure LoRA (on the command line: --base)"
        )
    weight = reading.base(f"{name}.weight")
    if weight is None and not reading.partial:
        raise ValueError(
            f"layer '{name}' has no counterpart in the connected model: the file was made for another architecture; "
            "connect the model that it was made for, or allow partial matches to leave such layers out"
        )
    return weight


def _layer(name: str, kind: str, held: Mapping[str, Tensor], scale: float, weight: Tensor | None) -> LowRank:
    """The layer, validated. A LoRA's factors keep their bits and precision."""
    if kind == "LoRA" and weight is None and composed.MID not in held:
        return low_rank(name, *_paired(name, held["down"], held["up"]), scale)
    for role, part in held.items():
        if not part.is_floating_point() or not bool(part.float().isfinite().all()):
            raise ValueError(f"layer '{name}': {role} holds values that are not finite numbers; the file is damaged")
    try:
        layer = composed.low_rank_of(kind, held, scale, weight)
    except ValueError as error:
        raise ValueError(f"layer '{name}': {error}") from error
    return low_rank(name, layer.down, layer.up, layer.scale)


def _paired(name: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The factors with as many dimensions each: some tools store one of a convolution's as a matrix."""
    if down.ndim == 3 and up.ndim == 3 and up.shape[2] != 1:
        raise ValueError(
            f"it is in the format CPE (layer '{name}' has up of shape {list(up.shape)}, one matrix for each concept), "
            f"which is refused: an attention gate decides between them, token by token; {REMEDY}"
        )
    if up.ndim == 2 and down.ndim > 2:
        up = up.reshape(*up.shape, *[1] * (down.ndim - 2))
    elif down.ndim == 2 and up.ndim > 2 and up[0, 0].numel() == 1:
        up = up.flatten(1)
    return down, up


def _scale(
    tensors: Mapping[str, Tensor], name: str, roles: Roles, rank: int | None, reading: Reading
) -> tuple[float, str]:
    """The layer's scale, and the rule that gave it."""
    if reading.alpha is not None and rank is None:
        raise ValueError(f"layer '{name}' has no alpha, and alpha {reading.alpha} was asked for; set it to 0")
    if reading.alpha is not None and rank is not None:
        return reading.alpha / rank, f"alpha {reading.alpha}, as asked for"
    if "alpha" in roles:
        stored = _stored_alpha(tensors, roles["alpha"][0])
        return (1.0, "1 for layers without a rank") if rank is None else (stored / rank, "the file's alpha")
    said = None if reading.scales is None else reading.scales(name.split(".", 1)[-1], rank)
    if said is not None:
        return said, reading.rule
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
    if all(name.startswith(HOST) for name in names) or namings & {"kohya", "lycoris"}:
        return "generic"
    return "diffusers"
