"""The scale that PEFT and diffusers store outside the tensors: `adapter_config.json`, `lora_adapter_metadata`.

scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora; `rank_pattern` and `alpha_pattern` hold exceptions.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..lowrank import LowRank
from .composed import MAGNITUDE
from .named import Scales

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_KEY = "lora_adapter_metadata"
"""diffusers' key in the safetensors metadata: a PEFT configuration whose keys begin with `unet.` or `transformer.`."""

KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the base weights as they are. PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA and MiCA rewrite
them, and their files change weights that the files do not hold."""

_ALPHA = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
"""The key of alpha in each kind of configuration."""
_MARKS = {"LORA": "lora", "LOHA": "hada_", "LOKR": "lokr_"}
_SYNTAX = set("$*+?{}[]|()\\")


def unpacked(metadata: Mapping[str, object]) -> dict[str, object]:
    """Return the PEFT configuration of the diffusion model in diffusers' metadata."""
    for prefix in ("unet.", "transformer."):
        if any(key.startswith(prefix) for key in metadata):
            return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    return dict(metadata)


def scales(config: Mapping[str, object], keys: Iterable[str]) -> Scales:
    """Return the scales that the configuration gives for a file with these keys.

    Raises: ValueError if it is not a LoRA's; the result raises it if a rank differs from the file's.
    """
    kind = str(config.get("peft_type", "LORA"))
    if kind not in _ALPHA:
        raise ValueError(f"its configuration says peft_type {str(kind)[:100]!r}; expected one of {', '.join(_ALPHA)}")
    mark = MAGNITUDE if config.get("use_dora") else _MARKS[kind]
    if not any(mark in key for key in keys):
        raise ValueError(
            f"its configuration is of {'DoRA' if mark == MAGNITUDE else kind}, with no {mark!r} in its tensors' names; "
            "the two files belong to different adapters"
        )
    if config.get("fan_in_fan_out"):
        raise ValueError(
            "its configuration says fan_in_fan_out, for transposed weights, which diffusion models do not have"
        )
    if (start := config.get("init_lora_weights")) not in KEEPS_BASE:
        raise ValueError(
            f"its configuration says init_lora_weights {start!r}, which rewrites the base model's weights, so the file "
            "alone does not give the change; save it again with PEFT's save_pretrained and its option "
            "path_initial_model_for_weight_conversion, which makes an ordinary LoRA of it"
        )
    rank, alpha = _number(config, "r", whole=True), _number(config, _ALPHA[kind])
    ranks, alphas = _pattern(config, "rank_pattern"), _pattern(config, "alpha_pattern")
    stabilised = bool(config.get("use_rslora"))

    def scale(path: str, found: int | None) -> float | None:
        if alpha is None:
            return None
        expected = _matching(ranks, path, rank)
        if found is None:  # a LoKr of two whole matrices, which PEFT scales all the same
            found = int(expected or 1)
        if expected is not None and expected != found:
            raise ValueError(
                f"layer '{path}' has rank {found} but {expected:g} in the configuration; "
                "the two files belong to different adapters"
            )
        own = _matching(alphas, path, alpha)
        assert own is not None
        return own / (math.sqrt(found) if stabilised else found)

    return scale


def config_of(layers: Mapping[str, LowRank], alphas: Mapping[str, float], base_model: str = "") -> dict[str, Any]:
    """Return the configuration that gives layers (by bare path) their scale."""
    ranks = {path: layer.rank for path, layer in layers.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "target_modules": sorted(layers),
        # the patterns are regular expressions that match at the end of a path; ^ anchors them at its start
        "rank_pattern": {f"^{path}": own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {f"^{path}": _plain(own) for path, own in alphas.items() if own != alpha},
    }


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _commonest(values: Mapping[str, Any]) -> Any:
    found = list(values.values())
    return max(found, key=found.count) if len(set(found)) < len(found) else found[0]


def _number(config: Mapping[str, object], key: str, whole: bool = False) -> float | None:
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
        raise ValueError(f"its configuration's {key} is {str(value)[:100]!r}; expected a finite number")
    if whole and (value != int(value) or value < 1):
        raise ValueError(f"its configuration's {key} is {value!r}; expected a whole number from 1 on")
    return float(value)


def _pattern(config: Mapping[str, object], key: str) -> dict[str, float]:
    """Exceptions by path. PEFT allows any regular expression; from strangers' files only literal paths are taken."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"its configuration's {key} is a {type(found).__name__}; expected an object")
    literal = {}
    for name, _ in found.items():
        path = name.replace("\\.", ".").removesuffix("$")
        if set(path) & _SYNTAX or "^" in path[1:]:
            raise ValueError(
                f"its configuration's {key} has the regular expression {name[:100]!r}; expected plain names"
            )
        number = _number(found, name)
        assert number is not None
        literal[path] = number
    return literal


def _matching(pattern: Mapping[str, float], path: str, otherwise: float | None) -> float | None:
    """The first entry whose name is the path (after ^) or its end, as in PEFT."""
    for name, value in pattern.items():
        if path == name.removeprefix("^") or (not name.startswith("^") and path.endswith(f".{name}")):
            return value
    return otherwise
