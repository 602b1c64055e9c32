"""Other programs' metadata: kohya's `ss_*`, Stability's `modelspec.*`, SPM's and LECO's prompts."""

from collections.abc import Mapping
from dataclasses import replace

from ..card import Card
from ..lowrank import Adapter, LowRank
from ..names import HOST, dotted

_BY_TEXT_WIDTH = {
    768: ("stable-diffusion-v1", "sd_v1"),
    1024: ("stable-diffusion-v2", "sd_v2"),
    2048: ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}
_BY_PART = {
    "double_blocks": ("flux-1-dev", "flux1"),
    "single_blocks": ("flux-1-dev", "flux1"),
    "single_transformer_blocks": ("flux-1-dev", "flux1"),
    "joint_blocks": ("stable-diffusion-3-medium", "sd3"),
}
ALWAYS_OURS = ("ss_network_module", "ss_network_dim", "ss_network_alpha")


def for_others(adapter: Adapter) -> dict[str, str]:
    """Return the adapter's metadata in the keys of other programs, as far as it is known."""
    card = adapter.card
    architecture, version = base_of(adapter.layers)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic" if card.rank is None else str(card.rank),
        "ss_network_alpha": "Dynamic" if card.alpha is None else f"{card.alpha:g}",
        "ss_base_model_version": version,
        "ss_sd_model_name": card.base_model,
        "ss_output_name": card.concept and f"erase {card.concept}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture and f"{architecture}/lora",
        "modelspec.implementation": architecture and "https://github.com/Stability-AI/generative-models",
        "modelspec.title": card.concept and f"erase {card.concept}",
        "modelspec.description": card.concept_prompt and f"Erases the concept '{card.concept_prompt}'.",
        "modelspec.author": card.author,
        "modelspec.license": card.licence,
        "modelspec.tags": "concept erasure",
    }
    return {key: value for key, value in metadata.items() if value}


def base_of(layers: Mapping[str, LowRank]) -> tuple[str, str]:
    """Return modelspec's and kohya's names of the base architecture, detected from names and widths, or empty ones."""
    for name, layer in layers.items():
        path = dotted(name)
        part = path.split(".")[1] if path.startswith((HOST, "transformer.")) else ""
        if part in _BY_PART:
            return _BY_PART[part]
        if path.endswith((".attn2.to_k", ".attn2.to_v")) and layer.down.shape[1] in _BY_TEXT_WIDTH:
            return _BY_TEXT_WIDTH[layer.down.shape[1]]
    return "", ""


def without_ours(adapter: Adapter) -> Adapter:
    """Return the adapter without those entries of its card's `extra` that `for_others` writes anyway."""
    ours = for_others(adapter)
    extra = {key: value for key, value in adapter.card.extra.items() if ours.get(key) != value}
    return replace(adapter, card=replace(adapter.card, extra=extra))


def with_prompts(card: Card, source_format: str) -> tuple[Card, str]:
    """Return the card with SPM's or LECO's concept, and the format's name: SPM also stores rank and alpha."""
    prompts = card.extra.get("prompts", "").strip()
    if source_format != "kohya" or not prompts:
        return card, source_format
    named = card if card.concept else replace(card, concept=prompts)
    return named, "spm" if {"rank", "alpha"} <= set(card.extra) else source_format
