"""The adapter's metadata, its *card*: what it erases and how it was made. Needs only the standard library.

from unguide_core.adapter.card import read_card
concept = read_card("cat.safetensors").concept
"""

import json
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

HEADER_LIMIT = 16 << 20
"""The largest safetensors header that is read, in bytes; the largest known adapters have less than 1 MiB."""

TEXT_LIMIT = 4000
"""The most characters of a prompt in a card."""

CARD_VERSION = 1
_PREFIX = "unguide."


@dataclass(frozen=True)
class Card:
    """What an adapter erases and how it was made.

    Stored as safetensors metadata, each field under the key `unguide.<field>`: text as it is, everything else as JSON.
    Default values are not stored, except the version.

    version: of this list of fields.
    concept: what is erased, a word or two ("cat").
    synonyms: other words for it.
    target: the prompt that was erased ("a photo of the cat"); see `concept_prompt`.
    reference: the prompt whose prediction took its place.
    neutral: the prompt that the probe compares with; usually the empty one.
    objective: what it was trained towards ("paper", "selective", ...).
    base_model, base_hash: the model it was trained on: a name, and the sha256 of its diffusion weights.
    rank, alpha: of the layers, if all agree; scale = alpha / rank.
    source_format: the format of the original file ("official", "kohya", "spm", ...: see docs/formats.md).
    settings: of the training, any JSON object.
    calibration: see `unguide_core.probe.calibration`; empty if the adapter is not calibrated.
    author, licence: text.
    extra: all other metadata, which is kept unchanged.
    """

    version: int = CARD_VERSION
    concept: str = ""
    synonyms: tuple[str, ...] = ()
    target: str = ""
    reference: str = ""
    neutral: str = ""
    objective: str = ""
    base_model: str = ""
    base_hash: str = ""
    rank: int | None = None
    alpha: float | None = None
    source_format: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    author: str = ""
    licence: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _TEXT_FIELDS:
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"the card's {name} is {getattr(self, name)!r}; expected text")
        if not isinstance(self.synonyms, tuple) or not all(isinstance(word, str) for word in self.synonyms):
            raise ValueError(f"the card's synonyms are {self.synonyms!r}; expected a tuple of texts")
        for text in (self.concept, self.target, self.reference, self.neutral, *self.synonyms):
            if len(text) > TEXT_LIMIT:  # these are encoded, which takes time and memory in proportion
                raise ValueError(
                    f"the card has a prompt of {len(text)} characters; expected {TEXT_LIMIT} at most: the file is "
                    "damaged, or not an erasure LoRA"
                )
        if not _is_number(self.version) or self.version != int(self.version):
            raise ValueError(f"the card's version is {self.version!r}; expected a whole number")
        if self.rank is not None and (not _is_number(self.rank) or self.rank != int(self.rank) or self.rank < 1):
            raise ValueError(f"the card's rank is {self.rank!r}; expected a whole number from 1 on")
        if self.alpha is not None and not _is_number(self.alpha):
            raise ValueError(f"the card's alpha is {self.alpha!r}; expected a finite number")
        for name in ("settings", "calibration"):
            _require_json_object(name, getattr(self, name))

    @property
    def concept_prompt(self) -> str:
        """The concept's own prompt, for the probe; empty if the card names no concept."""
        return self.target or self.concept

    def to_metadata(self) -> dict[str, str]:
        """Return the card as safetensors metadata."""
        metadata = {**self.extra, f"{_PREFIX}version": str(self.version)}
        for name, default in _STORED_FIELDS.items():
            value = getattr(self, name)
            if value != default:
                metadata[_PREFIX + name] = value if name in _TEXT_FIELDS else json.dumps(value, sort_keys=True)
        return metadata

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "Card":
        """Return the card that is stored in safetensors metadata; everything else in there becomes `extra`.

        Raises: ValueError if a field's value is invalid.
        """
        values: dict[str, Any] = {}
        extra: dict[str, str] = {}
        for key, text in metadata.items():
            name = key.removeprefix(_PREFIX)
            if not key.startswith(_PREFIX) or name not in {"version", *_STORED_FIELDS}:
                extra[key] = text
            elif name in _TEXT_FIELDS:
                values[name] = text
            else:
                try:
                    values[name] = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"the card's key '{key}' is '{text[:100]}'; expected JSON") from error
        if isinstance(values.get("synonyms"), list):
            values["synonyms"] = tuple(values["synonyms"])
        return cls(**values, extra=extra)


_TEXT_FIELDS = tuple(f.name for f in fields(Card) if f.type is str)
_STORED_FIELDS: dict[str, Any] = {
    f.name: {} if f.name in ("settings", "calibration") else f.default
    for f in fields(Card)
    if f.name not in ("version", "extra")
}


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # false for a NaN; an int may be larger than any float


def _require_json_object(name: str, value: object) -> None:
    try:
        if not isinstance(value, Mapping):
            raise TypeError("not a mapping")
        json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"the card's {name} are {value!r}; expected a JSON object of finite numbers and text"
        ) from error


def read_card(path: str | os.PathLike[str]) -> Card:
    """Return the card of a safetensors file, without reading its tensors.

    Raises: ValueError if it is not a safetensors file, or the card is invalid; OSError if it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(9)
        if len(start) < 9 or start[8:] != b"{":
            raise ValueError(f"'{path.name}' is not a safetensors file; expected one with the card in its metadata")
        (length,) = struct.unpack("<Q", start[:8])
        if length > HEADER_LIMIT:
            raise ValueError(f"'{path.name}' has a header of {length} bytes; expected {HEADER_LIMIT} at most")
        try:
            header = json.loads(start[8:] + file.read(length - 1))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the header of '{path.name}' is damaged ({error}); download or save it again") from error
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"the metadata of '{path.name}' are not all texts; the file is damaged, save it again")
    return Card.from_metadata({key: value for key, value in metadata.items() if key != "format"})
