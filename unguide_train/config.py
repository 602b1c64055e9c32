"""What to train, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from unguide_core.training.layers import CUSTOM, LAYERS
from unguide_core.training.prompts import KEPT, PREFIX, SCENES, TrainingPrompts, prompts_for
from unguide_core.training.recipe import PRESETS, Recipe

# absolute: a worker on Ray runs in a folder of its own
AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]
_RECIPE = TypeAdapter(Recipe)


class ConfigError(ValueError):
    """A setting is wrong; the message names it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Concept(_Strict):
    """One concept: its words, what to generate instead, its file."""

    concept: str
    reference: str
    synonyms: tuple[str, ...] = ()
    out: AbsolutePath | None = None


class Config(_Strict):
    """A training of one or many concepts.

    base: a checkpoint file (.safetensors) or a folder that diffusers saved.
    tokenizer: folder of the CLIP tokenizer (vocab.json, merges.txt), for checkpoint files; None takes that of the
        ComfyUI that the file or this program is in. A diffusers folder has its own.
    out: folder for the results of concepts without an `out` of their own: <out>/<concept>.safetensors.
    size: of the images whose latents are trained on, in pixels; None takes 512 for SD 1.x, 1024 for SDXL.
    precision: of the base model; the adapter is always float32.
    rows: maximum batch size.
    recipe: changes to the preset, by the names in `unguide_core.training.recipe.Recipe`.
    calibrate: calibrate the adapter at the end; at most 3,000 model evaluations.
    logs: folder for TensorBoard logs; None writes none.
    """

    base: AbsolutePath
    concepts: tuple[Concept, ...] = Field(min_length=1)
    tokenizer: AbsolutePath | None = None
    out: AbsolutePath = Field(default_factory=Path.cwd)
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
    calibrate: bool = True
    logs: AbsolutePath | None = None

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.layers not in (*LAYERS, CUSTOM):
            raise ValueError(f"layers is {self.layers!r}; expected one of {', '.join((*LAYERS, CUSTOM))}")
        if not self.base.exists():
            raise ValueError(f"the base model {str(self.base)!r} does not exist; give a .safetensors file or a folder")
        paths = [self.path_of(concept) for concept in self.concepts]
        for concept, path in zip(self.concepts, paths, strict=True):
            self.prompts_of(concept)
            if path.suffix != ".safetensors":
                raise ValueError(f"the result {str(path)!r} must end in .safetensors")
            if paths.count(path) > 1:
                raise ValueError(f"two concepts would be written to {str(path)!r}; give each an 'out' of its own")
        return self

    @property
    def full_recipe(self) -> Recipe:
        """The preset with the changes. Raises: ValueError for an unknown name or an invalid value."""
        unknown = sorted(set(self.recipe) - set(Recipe.__dataclass_fields__))
        if unknown:
            known = ", ".join(Recipe.__dataclass_fields__)
            raise ValueError(f"recipe: there is no {unknown[0]!r}; the names are {known}")
        try:
            recipe: Recipe = _RECIPE.validate_python(asdict(PRESETS[self.preset]) | self.recipe)
            alpha = recipe.alpha if "alpha" in self.recipe else PRESETS[self.preset].with_rank(recipe.rank).alpha
            return replace(recipe, alpha=alpha)
        except ValidationError as error:
            raise ValueError(f"recipe: {_said(error)}") from error

    def words_of(self, concept: Concept) -> TrainingPrompts:
        """All prompts to erase and to keep for a concept."""
        return prompts_for(
            concept.concept,
            concept.reference,
            concept.synonyms,
            prefix=self.prefix,
            scenes=self.scenes,
            kept=self.kept,
        )

    def prompts_of(self, concept: Concept) -> TrainingPrompts:
        """Those of them that the recipe's loop uses."""
        return self.full_recipe.trained_prompts(self.words_of(concept))

    def path_of(self, concept: Concept) -> Path:
        """The path of a concept's adapter."""
        return concept.out or self.out / f"{concept.concept.replace(' ', '_')}.safetensors"


def from_values(values: dict[str, Any]) -> Config:
    """Returns the configuration from plain values. Raises: ConfigError with a sentence for each mistake."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_said(error)) from error


def _said(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors())


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the values in a YAML file, with relative paths resolved from its folder. Raises: ConfigError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"the configuration {str(path)!r} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the configuration {str(path)!r} has no settings; expected 'base:', 'concepts:', ...")
    concepts = values.get("concepts")
    for own in (values, *(concepts if isinstance(concepts, list) else ())):
        for name in ("base", "tokenizer", "out", "logs"):
            if isinstance(own, dict) and isinstance(own.get(name), str):
                own[name] = path.parent / own[name]
    if values.get("recipe") is None:
        values["recipe"] = {}
    values.setdefault("out", path.parent)
    return values
