"""Erasure LoRAs into files, where the host's own Save LoRA puts them: in its output folder, each with a new number."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import folder_paths

from ...unguide_core.adapter import Adapter
from ...unguide_core.formats import FORMATS, NameTakenError, save_adapter
from .load import ErasureLora


def save_erasure_loras(loras: Sequence[ErasureLora], filename_prefix: str, format: str) -> list[str]:
    """Write each erasure LoRA to a file of its own and return the files' names in the host's output folder.

    Args:
        filename_prefix: may hold folders and the host's placeholders (%year%, ...), as in the host's saving nodes.
        format: one of `FORMATS`.
    Raises: AdapterError if one cannot be written in that format; then none is. No file is ever replaced.
    """
    written: dict[str, Path] = {}
    try:
        for lora in loras:
            folder, filename, counter, subfolder, _ = folder_paths.get_save_image_path(
                filename_prefix, folder_paths.get_output_directory()
            )
            name = _saved(as_used(lora), Path(folder), filename, counter, format)
            written[str(Path(subfolder, name))] = Path(folder, name)
    except Exception:
        for path in written.values():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    return list(written)


def as_used(lora: ErasureLora) -> Adapter:
    """Return the adapter as it erases: its strength in the scale, the loader's concept in its metadata.

    A calibration holds only for the strength that was trained, and is dropped with another.
    """
    adapter = lora.adapter
    card = adapter.card
    if lora.concept_prompt and lora.concept_prompt != card.concept_prompt:
        card = replace(card, concept=card.concept or lora.concept_prompt, target=lora.concept_prompt)
    if lora.strength == 1.0:
        return replace(adapter, card=card)
    layers = {name: replace(layer, scale=layer.scale * lora.strength) for name, layer in adapter.layers.items()}
    alpha = None if card.alpha is None else card.alpha * lora.strength
    return replace(adapter, layers=layers, card=replace(card, calibration={}, alpha=alpha))


def _saved(adapter: Adapter, folder: Path, filename: str, counter: int, format: str) -> str:
    while True:
        name = f"{filename}_{counter:05}_{FORMATS[format].suffix}"
        try:
            save_adapter(adapter, folder / name, format, replace=False)
            return name
        except NameTakenError:
            counter += 1
