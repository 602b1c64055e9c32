"""What travels on ERASURE_LORA wires, and how it is loaded. Files come from the host's `loras` folders only."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import folder_paths

from ..unguide_core.adapter import Adapter
from ..unguide_core.formats import ENERGY, load_adapter
from .matching import base_weights, match

log = logging.getLogger(__name__)

Conditioning = list[list[Any]]


@dataclass(frozen=True)
class ErasureLora:
    """One erasure LoRA, ready to be matched with a model.

    Args:
        name: the file's name in the host's `loras` folder.
        adapter: its low-rank layers and its card.
        strength: factor on every layer, as in the host's LoRA loader.
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
        """Identifies the adapter's effect: decisions and baselines of another key are not used."""
        return f"{self.adapter.fingerprint}*{self.strength:g}"

    @property
    def calibration_key(self) -> str:
        """The same whatever format the adapter was saved in: a calibration is kept in its card."""
        return f"{self.adapter.signature}*{self.strength:g}"


def load_erasure_lora(
    lora_name: str,
    strength: float,
    clip: Any = None,
    concept: str = "",
    alpha: float | None = None,
    model: Any = None,
    partial: bool = False,
    energy: float = ENERGY,
) -> ErasureLora:
    """The erasure LoRA `lora_name` of the host's `loras` folders; with `clip`, its prompts are encoded.

    Args:
        concept: the concept's prompt; "" takes the card's.
        alpha: overrides the file's alpha (scale = alpha / rank); None takes the file's.
        model: the base model (a `ModelPatcher`), which files with full weights are compared with.
        partial: go on without the layers that the model lacks, or that a low-rank adapter cannot hold.
        energy: the share of each layer's change that is kept of full weights.
    Raises: AdapterError if the file is no erasure LoRA.
    """
    path = folder_paths.get_full_path_or_raise("loras", lora_name)
    base = None if model is None else base_weights(model)
    adapter = load_adapter(path, alpha=alpha, base=base, energy=energy, partial=partial)
    prompt = concept.strip() or adapter.card.concept_prompt
    encode = _encoder(clip)
    return ErasureLora(
        name=lora_name,
        adapter=adapter,
        strength=strength,
        concept_prompt=prompt,
        concept=encode(prompt) if prompt else None,
        neutral=encode(adapter.card.neutral),
    )


def loading_report(lora: ErasureLora, model: Any = None) -> str:
    """How the file was read, as JSON; with a model (a `ModelPatcher`) also how its layers fit that.

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


def encode_prompts(clip: Any, prompts: Iterable[str]) -> dict[str, Conditioning]:
    """Every prompt's CONDITIONING. Raises: ValueError without a text encoder."""
    if clip is None:
        raise ValueError("no CLIP is connected, and no prompts; connect the checkpoint's CLIP, or encoded prompts")
    encode = _encoder(clip)
    return {prompt: encode(prompt) for prompt in prompts}


def _encoder(clip: Any) -> Any:
    if clip is None:
        return lambda prompt: None
    return lambda prompt: clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
