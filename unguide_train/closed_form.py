"""Erases concepts in closed form, without training: one adapter for each, or one for all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from unguide_core.adapter import Adapter, Card
from unguide_core.adapter.names import underscored
from unguide_core.closed_form import ClosedForm
from unguide_core.formats import save_adapter
from unguide_core.probe.calibration import Calibration
from unguide_core.probe.text import TextCalibration, calibrated_text, text_map
from unguide_core.text_edit import Edited, Encode, Kept, TextLayers, edit_text
from unguide_core.training.layers import chosen_layers
from unguide_core.training.prompts import listed, names_a_word
from unguide_core.vocabulary import KEPT_PROMPTS, KINDS, Edit, kept_prompts, unseen_prompts

from .config import ConfigError
from .job import Summary
from .model import Base, load_base

OBJECTIVE = "closed form"
POOLED = "add_embedding.linear_1"
"""SDXL's layer that reads the pooled text state, and sizes behind it."""


@dataclass(frozen=True)
class Task:
    """What to erase, and where to write it.

    base, tokenizer: as in `config.Config`.
    edits: the concepts.
    out: the file of a joint adapter, or of the only concept; else the folder of one file for each.
    joint: whether all concepts go into one adapter.
    kept: prompts to keep besides the shipped ones.
    shipped: so many of the shipped ones.
    settings: how the adapters are fitted.
    """

    base: Path
    edits: tuple[Edit, ...]
    out: Path
    tokenizer: Path | None = None
    joint: bool = False
    kept: tuple[str, ...] = ()
    shipped: int = KEPT_PROMPTS
    settings: ClosedForm = field(default_factory=ClosedForm)

    def __post_init__(self) -> None:
        if not self.edits:
            raise ConfigError("there is no concept; give --concept, or a file of concepts with --list")
        if not self.base.exists():
            raise ConfigError(f"the base model {str(self.base)!r} does not exist; give a .safetensors file or a folder")
        single = self.joint or len(self.edits) == 1
        if single != (self.out.suffix == ".safetensors"):
            expected = "a file ending in .safetensors" if single else "a folder, for one file each"
            raise ConfigError(f"--out is {str(self.out)!r}; expected {expected}")
        paths = [path for _, path in self.groups()]
        if double := next((path for path in paths if paths.count(path) > 1), None):
            raise ConfigError(f"two concepts would be written to {str(double)!r}; name each concept once")

    def groups(self) -> list[tuple[tuple[Edit, ...], Path]]:
        """Returns the concepts of each adapter, with its file."""
        if self.joint or len(self.edits) == 1:
            return [(self.edits, self.out)]
        return [((edit,), self.out / f"{edit.concept.replace(' ', '_')}.safetensors") for edit in self.edits]


def read_list(path: Path, kind: str) -> tuple[Edit, ...]:
    """Returns the concepts in a file, one per line: "cat, kitty, feline -> forest".

    The words after the first are synonyms. Without an arrow a person becomes "a person" and a style a plain image; an
    object needs a reference.

    Raises: ConfigError with the line's number.
    """
    edits = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        words, _, reference = line.partition("->")
        if not (names := listed(words)):
            continue
        try:
            edits.append(Edit(names[0], reference.strip() or (KINDS[kind].reference or ""), names[1:], kind))
        except (ValueError, KeyError) as error:
            raise ConfigError(f"line {number} of {str(path)!r}: {error}") from error
    return tuple(edits)


def erase(task: Task, progress: Callable[[str], object]) -> Iterator[Summary]:
    """Writes every adapter of a task and yields its summary.

    Raises: ModelError, ValueError or AdapterError; what was written before stays.
    """
    base = load_base(task.base, task.tokenizer)
    layers = text_layers(base)

    def encode(prompt: str) -> tuple[Tensor, Tensor | None]:
        found = base.encode((prompt,))[prompt]
        return found.states, found.pooled

    prompts = kept_prompts((), task.kept, task.shipped)
    progress(f"encoding {len(prompts)} prompts to keep")
    kept = Kept.of(prompts, encode)
    others = {prompt: encode(prompt)[0] for prompt in unseen_prompts(task.shipped)}
    for edits, path in task.groups():
        began, encode_once = time.perf_counter(), cache(encode)
        words = [word for edit in edits for word in edit.words]
        found = edit_text(edits, kept.without(words, encode), layers, encode_once, task.settings)
        adapter, card = Adapter(found.layers), card_of(edits, base, task.settings)
        without = [states for prompt, states in others.items() if not names_a_word(prompt, words)]
        text = text_calibration(edits, found, layers, encode_once, without)
        calibration = Calibration(base.hash, adapter.signature, text=text)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_adapter(replace(adapter, card=replace(card, calibration=calibration.to_card())), path)
        concept = ", ".join(edit.concept for edit in edits)
        yield Summary(concept, str(path), 0, 0, 0.0, None, 0, time.perf_counter() - began, os.getpid())


def text_calibration(
    edits: Sequence[Edit], found: Edited, layers: TextLayers, encode: Encode, others: Sequence[Tensor]
) -> TextCalibration:
    """Returns the calibration of the text stage: of the first concept's own prompt, and of all that are erased.

    Args:
        others: text states of prompts without the concepts, [tokens, width].
    """
    seen = text_map([found.layers[name] for name in layers.tokens], [float(w.norm()) for w in layers.tokens.values()])
    own, *concept = (encode(pair.target)[0] for edit in edits for pair in edit.pairs)
    return calibrated_text(seen, own, concept, others)


def text_layers(base: Base) -> TextLayers:
    """Returns the weights by which a UNet reads the prompt, by kohya's names."""
    linear = {name: module for name, module in base.unet.named_modules() if isinstance(module, torch.nn.Linear)}

    def weights(names: Sequence[str]) -> dict[str, Tensor]:
        return {underscored(name): linear[name].weight for name in names}

    return TextLayers(weights(chosen_layers(linear, "object")), weights([POOLED] if POOLED in linear else []))


def card_of(edits: Sequence[Edit], base: Base, settings: ClosedForm) -> Card:
    """Returns the metadata of an adapter; of several concepts, the first is its own and the others are synonyms."""
    first = edits[0].pairs[0]
    words = tuple(word for edit in edits for word in edit.words)
    return Card(
        concept=words[0] if words else "",
        synonyms=words[1:],
        target=first.target,
        reference=first.reference,
        objective=OBJECTIVE,
        base_model=base.name,
        base_hash=base.hash,
        source_format="kohya",
        settings={**vars(settings), "pairs": sum(len(edit.pairs) for edit in edits), "evaluations": 0},
    )
