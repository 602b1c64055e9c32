"""What travels on ERASURE_LORA wires, and how it is loaded. Files come from the host's `loras` folders only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import folder_paths

from ..unguide_core.adapter import Adapter
from ..unguide_core.formats import load_adapter

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


def load_erasure_lora(
    lora_name: str, strength: float, clip: Any = None, concept: str = "", alpha: float | None = None
) -> ErasureLora:
    """The erasure LoRA `lora_name` of the host's `loras` folders; with `clip`, its prompts are encoded.

    Args:
        concept: the concept's prompt; "" takes the card's.
        alpha: overrides the file's alpha (scale = alpha / rank); None takes the file's.
    Raises: AdapterError if the file is no erasure LoRA.
    """
    path = folder_paths.get_full_path_or_raise("loras", lora_name)
    adapter = load_adapter(path, alpha=alpha)
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
