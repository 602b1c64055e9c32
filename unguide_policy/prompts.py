"""Concept and neutral prompts, encoded once beside the policy file, so that a server decides without a text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..unguide_comfy.lora.load import Conditioning

CONCEPT, NEUTRAL = "concept", "neutral"

Key = tuple[str, str, str]
"""The hash of a model's weights, an adapter's name, "concept" or "neutral"."""


def prompts_file(policy: Path) -> Path:
    """Return where a policy's prompts are."""
    return policy.with_suffix(".prompts.safetensors")


def save_prompts(prompts: Mapping[Key, Conditioning], file: Path) -> None:
    """Write encoded prompts. Raises: ValueError for a prompt of several parts."""
    tensors: dict[str, torch.Tensor] = {}
    for key, conditioning in prompts.items():
        if len(conditioning) != 1:
            raise ValueError(f"the {key[2]} prompt of {key[1]!r} has {len(conditioning)} parts; expected a plain text")
        ((text, options),) = conditioning
        parts = {"text": text, **{name: value for name, value in options.items() if isinstance(value, torch.Tensor)}}
        tensors |= {"/".join((*key, name)): value.contiguous().clone() for name, value in parts.items()}
    save_file(tensors, str(file))


def load_prompts(file: Path) -> dict[Key, Conditioning]:
    """Return the encoded prompts of a file. Raises: OSError, or a SafetensorError for another kind of file."""
    prompts: dict[Key, Conditioning] = {}
    for name, tensor in load_file(str(file)).items():
        weights, adapter, kind, part = name.split("/")
        entry = prompts.setdefault((weights, adapter, kind), [[None, {}]])[0]
        if part == "text":
            entry[0] = tensor
        else:
            entry[1][part] = tensor
    return prompts
