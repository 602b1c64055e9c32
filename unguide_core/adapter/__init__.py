"""Erasure adapters: low-rank layers, the metadata that says what they erase, and the files that hold them.

Names are loaded when they are first asked for, so that a card can be read without torch.

    lowrank.py      low-rank layers and adapters made of them; hashes that identify adapters and models
    card.py         the adapter's metadata, its *card*
    names.py        how programs name layers, and how to rename them
    containers.py   safetensors files and torch zips
    formats/        file formats
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .card import CARD_VERSION, Card
    from .lowrank import Adapter, LowRank, initial_low_rank

__all__ = ["CARD_VERSION", "Adapter", "Card", "LowRank", "initial_low_rank"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".card" if name in ("CARD_VERSION", "Card") else ".lowrank", __name__), name)
