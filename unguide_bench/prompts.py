"""Prompt files: the official JSON of a concept, and CSV files as I2P's and other erasure papers'.

It does not know how images are generated.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unguide_core.training.prompts import subject_of

from .errors import BenchError
from .scores import ERASED, KINDS, OTHER, SYNONYM

UNSCORED = "unscored"
"""Of prompts that are generated for CLIPScore or FID, and for which no accuracy is measured."""
ATTACK = "attack"
"""Of prompts that were optimised to show the concept although it is erased."""

# columns by what they mean: the usual name, and the one of the I2P data set as it is published
_SEED = ("evaluation_seed", "sd_seed")
_CFG = ("evaluation_guidance", "sd_guidance_scale")
_MACE = {"erased": ERASED, "others": OTHER}
"""The column `type` of MACE's celebrities, and what it means."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        kind: "erased" (asks for the concept by its name), "synonym", "other" (asks for another class), "attack", or
            "unscored".
        label: the class that it asks for; of synonyms the concept; "" where it is none.
        case: its number in the file.
        seed, cfg: its own, None for those of the run.
        beside: a class of another sort that it asks for too, as the object beside a style; "" where it is none.
    """

    text: str
    kind: str
    label: str
    case: int
    seed: int | None = None
    cfg: float | None = None
    beside: str = ""


@dataclass(frozen=True)
class Prompts:
    """A file's prompts.

    Args:
        concept: what is erased, a word or two; "" where the file does not say.
        target: the concept's own prompt, "" where the file names none.
        reference: the prompt that takes its place, likewise.
        classes: every class that a prompt asks for, the concept first.
    """

    concept: str
    items: tuple[Prompt, ...]
    target: str = ""
    reference: str = ""

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(label for label in (self.concept, *(item.label for item in self.items)) if label))

    def first(self, count: int | None) -> Prompts:
        """The first prompts alone; all with None."""
        return replace(self, items=self.items[:count])


def read_prompts(path: Path, concept: str = "", kind: str = ERASED) -> Prompts:
    """A file's prompts, by the ending of its name.

    Args:
        concept: the erased one; "" takes the subject of a JSON file's target.
        kind: of a CSV file's prompts where neither a column `kind` nor `classes` says.
    Raises: BenchError telling what is wrong with the file.
    """
    if path.suffix.lower() not in (".json", ".csv"):
        raise BenchError(f"{path} is neither .json nor .csv; give the official prompt JSON or a CSV with 'prompt'")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"the prompts in {path} cannot be read ({error}); give a UTF-8 text file") from error
    is_json = path.suffix.lower() == ".json"
    prompts = from_json(path, text, concept) if is_json else from_csv(path, text, concept, kind)
    if not prompts.items:
        raise BenchError(f"{path} has no prompt; expected one at least")
    return prompts


def subject(prompt: str) -> str:
    """What a prompt asks for: "cat" of "a photo of the cat"; a prompt of another form is its own subject."""
    return subject_of(prompt).lower()


# ---------------------------------------------------------------- the official JSON


def from_json(path: Path, text: str, concept: str = "") -> Prompts:
    """{"target": ..., "reference": ..., "synonyms": [...], "other": [...]}, each a prompt or a list of prompts.

    The official "other" ends with the empty prompt, which the probe compares with: no image of it is generated.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise BenchError(f"{path} is not JSON ({error}); expected the official prompt file") from error
    if not isinstance(content, dict):
        raise BenchError(f"{path} holds a {type(content).__name__}; expected an object with 'target', 'other', ...")
    targets = _texts(path, content, "target")
    if not targets:
        names = ", ".join(map(repr, content)) or "nothing"
        raise BenchError(f"{path} has no 'target', the erased concept's own prompt; found {names}: add it")
    concept = (concept or subject(targets[0])).strip().lower()
    rows = [(prompt, ERASED, concept) for prompt in targets]
    rows += [(prompt, SYNONYM, concept) for prompt in _texts(path, content, "synonyms")]
    rows += [(prompt, OTHER, subject(prompt)) for prompt in _texts(path, content, "other")]
    items = tuple(Prompt(prompt, kind, label, case) for case, (prompt, kind, label) in enumerate(rows))
    reference = _texts(path, content, "reference")
    return Prompts(concept, items, targets[0], reference[0] if reference else "")


def _texts(path: Path, content: Mapping[str, Any], name: str) -> list[str]:
    """The prompts under a name, without empty ones."""
    value = content.get(name, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BenchError(f"'{name}' in {path} is {json.dumps(value)[:80]}; expected a prompt or a list of prompts")
    return [text.strip() for text in texts if text.strip()]


# ---------------------------------------------------------------- CSV


def from_csv(path: Path, text: str, concept: str, kind: str, column: str = "prompt") -> Prompts:
    """One prompt a row: `prompt`, and as far as there are such columns `evaluation_seed`, `evaluation_guidance`,
    `case_number`, `classes` (the class that it asks for) and `kind` (or MACE's `type`).

    Args:
        column: the name of the prompts' own.
    """
    rows = csv.DictReader(io.StringIO(text, newline=""))
    columns = rows.fieldnames or ()
    if column not in columns:
        found = ", ".join(columns) or "nothing"
        raise BenchError(f"{path} has no column {column!r} in its first line; found {found}: name the texts' column so")
    concept = concept.strip().lower()
    items: list[Prompt] = []
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        prompt = (row[column] or "").strip()
        if not any((value or "").strip() for name, value in row.items() if name is not None):
            continue  # an empty line; I2P has an empty prompt, which is one
        label = (row.get("classes") or "").strip().lower()
        found = _kind(where, row, label, concept, kind)
        items.append(
            Prompt(
                text=prompt,
                kind=found,
                label=label or (concept if found in (ERASED, SYNONYM, ATTACK) else ""),
                case=int(_number(where, row, ("case_number",), len(items))),
                seed=_seed(where, row),
                cfg=_number(where, row, _CFG, None),
            )
        )
    return Prompts(concept, tuple(items))


def _kind(where: str, row: Mapping[str, str], label: str, concept: str, otherwise: str) -> str:
    known = (*KINDS, ATTACK, UNSCORED)
    if (of_mace := (row.get("type") or "").strip()) in _MACE:
        return _MACE[of_mace]
    if stated := (row.get("kind") or "").strip().lower():
        if stated not in known:
            raise BenchError(f"{where}: kind is {stated!r}; expected one of {', '.join(known)}")
        return stated
    if label and concept:
        return ERASED if label == concept else OTHER
    return otherwise


def _seed(where: str, row: Mapping[str, str]) -> int | None:
    value = _number(where, row, _SEED, None)
    if value is not None and (value != int(value) or not 0 <= value < 1 << 64):
        raise BenchError(f"{where}: the seed is {value:g}; expected a whole number from 0 to {(1 << 64) - 1}")
    return None if value is None else int(value)


def _number(where: str, row: Mapping[str, str], names: tuple[str, ...], otherwise: Any) -> Any:
    for name in names:
        if text := (row.get(name) or "").strip():
            try:
                return int(text) if text.isdecimal() else float(text)
            except ValueError:
                raise BenchError(f"{where}: {name} is {text!r}; expected a number") from None
    return otherwise
