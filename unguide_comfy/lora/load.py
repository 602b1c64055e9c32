"""What travels on ERASURE_LORA wires, and how it is loaded, from the host's `loras` folders or the pack's own files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths

from ...unguide_core.adapter import Adapter
from ...unguide_core.formats import ENERGY, load_adapter
from ...unguide_core.training.prompts import word_of
from .match import base_weights, match

log = logging.getLogger(__name__)

Conditioning = list[list[Any]]
"""The host's CONDITIONING: pairs of text states [1, tokens, width] and a dictionary."""


@dataclass(frozen=True)
class ErasureLora:
    """One erasure LoRA, ready to be matched with a model.

    Args:
        name: the file's name in the host's `loras` folders, or what the pack calls it.
        adapter: its low-rank layers and metadata (its card).
        strength: factor on the adapter where it erases. The gate probes at strength 1, as calibrated.
        concept_prompt: the erased concept's own prompt, "" where unknown.
        concept, neutral: that prompt and the neutral (empty) one, encoded; None without a text encoder.
    """

    name: str
    adapter: Adapter
    strength: float = 1.0
    concept_prompt: str = ""
    concept: Conditioning | None = None
    neutral: Conditioning | None = None

    @property
    def key(self) -> str:
        """Identifies what the gate probes; a decision or baseline with another key is not used."""
        return self.adapter.fingerprint

    @property
    def word(self) -> str:
        """The concept, as short as can be: "cat" for "a photo of the cat"; "" where unknown."""
        card = self.adapter.card
        if card.concept and self.concept_prompt in ("", card.concept_prompt):
            return card.concept
        return word_of(self.concept_prompt)


def load_erasure_lora(
    lora_name: str,
    strength: float,
    clip: Any = None,
    concept: str = "",
    alpha: float | None = None,
    model: Any = None,
    partial: bool = False,
    energy: float = ENERGY,
    path: Path | None = None,
) -> ErasureLora:
    """Return an erasure LoRA from the host's `loras` folders, its prompts encoded where `clip` is given.

    Args:
        concept: the concept's prompt; "" takes the one in the adapter's metadata.
        alpha: overrides the file's alpha (scale = alpha / rank); None takes the file's.
        model: the base model (a `ModelPatcher`), which files with full weights are compared with.
        partial: leave out layers that the model lacks or that a low-rank adapter cannot hold.
        energy: the share of each layer's change that is kept from full weights.
        path: the file, where it is the pack's own and `lora_name` only names it.
    Raises: AdapterError if the file is not an erasure LoRA.
    """
    path = path or folder_paths.get_full_path_or_raise("loras", lora_name)
    base = None if model is None else base_weights(model)
    adapter = load_adapter(path, alpha=alpha, base=base, energy=energy, partial=partial)
    prompt = concept.strip() or adapter.card.concept_prompt
    lora = ErasureLora(lora_name, adapter, strength, prompt)
    if clip is None:
        return lora
    encode = encoder(clip)
    own = encode(prompt) if prompt else None
    return ErasureLora(lora_name, adapter, strength, prompt, own, encode(adapter.card.neutral))


def loading_report(lora: ErasureLora, model: Any = None) -> str:
    """Return how the file was read, as JSON; with a model (a `ModelPatcher`) also how its layers fit.

    Raises: AdapterError if they do not.
    """
    adapter = lora.adapter
    report: dict[str, Any] = {
        "erasure_lora": lora.name,
        "format": adapter.card.source_format,
        "concept": lora.concept_prompt,
        "layers": len(adapter.layers),
        "ranks": sorted({layer.rank for layer in adapter.layers.values()}),
        "scales": sorted({layer.scale for layer in adapter.layers.values()}),
        "notes": list(adapter.notes),
    }
    if model is not None:
        found = match(adapter, model.model, lora.name)
        report["model"] = {
            "architecture": type(model.model).__name__,
            "matched": found.matched,
            "lacking_in_the_model": {"count": len(found.lacking), "layers": list(found.lacking)},
            "lacking_in_the_file": {"count": len(found.untouched), "layers": list(found.untouched)},
        }
    for note in adapter.notes:
        log.info("UnGuide: %s: %s", lora.name, note)
    return json.dumps(report, indent=2)


def encoder(clip: Any) -> Callable[[str], Conditioning]:
    """Return a function that encodes a prompt. Raises: ValueError without a text encoder."""
    if clip is None:
        raise ValueError("no CLIP is connected, and no encoded prompts; connect the checkpoint's CLIP, or the prompts")
    return lambda prompt: clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def encode_prompts(
    clip: Any, prompts: Sequence[str], watch: Callable[[int, int], None] | None = None
) -> dict[str, Conditioning]:
    """Return every prompt's CONDITIONING.

    Args:
        watch: called after each with how many are encoded of how many.
    Raises: ValueError without a text encoder.
    """
    encode, encoded = encoder(clip), {}
    for done, prompt in enumerate(prompts, start=1):
        encoded[prompt] = encode(prompt)
        if watch is not None:
            watch(done, len(prompts))
    return encoded
