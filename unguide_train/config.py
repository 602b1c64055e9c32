"""What to train, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unguide_core.layers import CUSTOM, LAYERS
from unguide_core.prompts import KEPT, PREFIX, SCENES, prompts_for
from unguide_core.training import OFFICIAL, PRESETS, Prompts, Recipe


class ConfigError(ValueError):
    """A setting is wrong; the message names it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Concept(_Strict):
    """One concept: its words, what takes its place, its file."""

    concept: str
    reference: str
    synonyms: tuple[str, ...] = ()
    out: Path | None = None


class Config(_Strict):
    """A training of one or many concepts.

    base: a checkpoint file (.safetensors) or a folder that diffusers saved.
    tokenizer: folder of the CLIP tokenizer (vocab.json, merges.txt), for checkpoint files; a diffusers folder has one.
    out: folder of the results where a concept names no file of its own: <out>/<concept>.safetensors.
    size: of the pictures whose latents are trained at, in pixels; None: 512 for SD 1.x, 1024 for SDXL.
    precision: that the base computes in; the adapter is float32 always.
    rows: latents computed at once, at most.
    recipe: changes of the preset's values, by the names of `unguide_core.training.Recipe`.
    logs: folder for TensorBoard; None logs nothing.
    """

    base: Path
    concepts: tuple[Concept, ...] = Field(min_length=1)
    tokenizer: Path | None = None
    out: Path = Path()
    preset: Literal["selective", "paper"] = "selective"
    layers: str = "object"
    pattern: str = ""
    size: int | None = Field(None, ge=64, multiple_of=8)
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    rows: int = Field(16, ge=1)
    prefix: str = PREFIX
    scenes: tuple[str, ...] = SCENES
    kept: tuple[str, ...] = KEPT
    recipe: dict[str, Any] = {}
    logs: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.layers not in (*LAYERS, CUSTOM):
            raise ValueError(f"layers is {self.layers!r}; expected one of {', '.join((*LAYERS, CUSTOM))}")
        if not self.base.exists():
            raise ValueError(f"the base model {str(self.base)!r} does not exist; give a .safetensors file or a folder")
        recipe = self.full_recipe
        paths = [self.path_of(concept) for concept in self.concepts]
        for concept, path in zip(self.concepts, paths, strict=True):
            self.prompts_of(concept)
            if path.suffix != ".safetensors":
                raise ValueError(f"the result {str(path)!r} must end in .safetensors")
            if paths.count(path) > 1:
                raise ValueError(f"two concepts would be written to {str(path)!r}; give each an 'out' of its own")
        assert recipe.iterations
        return self

    @property
    def full_recipe(self) -> Recipe:
        """The preset with the changes. Raises: ValueError for an unknown name or a value that means nothing."""
        try:
            return replace(PRESETS[self.preset], **self.recipe)
        except TypeError as error:
            known = ", ".join(Recipe.__dataclass_fields__)
            raise ValueError(f"recipe: {error}; the names are {known}") from error

    def prompts_of(self, concept: Concept) -> Prompts:
        """What is erased and kept for a concept; the official loop looks at the concept's own prompt alone."""
        prompts = prompts_for(
            concept.concept,
            concept.reference,
            concept.synonyms,
            prefix=self.prefix,
            scenes=self.scenes,
            kept=self.kept,
        )
        if self.full_recipe.loop == OFFICIAL:
            return Prompts(prompts.erased[:1], (), prompts.neutral)
        return prompts

    def path_of(self, concept: Concept) -> Path:
        """Where a concept's adapter is written."""
        return concept.out or self.out / f"{concept.concept.replace(' ', '_')}.safetensors"


def from_values(values: dict[str, Any]) -> Config:
    """The configuration of plain values. Raises: ConfigError, in a sentence for each mistake."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        said = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors()]
        raise ConfigError("; ".join(said)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The values in a YAML file; relative paths in it are relative to the file. Raises: ConfigError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"the configuration {str(path)!r} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the configuration {str(path)!r} holds no settings; expected 'base:', 'concepts:', ...")
    for name in ("base", "tokenizer", "out", "logs"):
        if isinstance(values.get(name), str):
            values[name] = path.parent / values[name]
    values.setdefault("out", path.parent)
    return values
