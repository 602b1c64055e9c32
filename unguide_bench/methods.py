"""The ways to draw a prompt that are compared, and the settings that they share.

It knows neither servers nor graphs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import BenchError
from .scores import BASE

NEGATIVE, LORA, FIXED = "negative", "lora", "fixed"
GATES = ("trajectory", "probe", "official")
DEFAULT = (BASE, NEGATIVE, LORA, *GATES)
_FORM = re.compile(r"^([a-z]+)(?::(-?\d+(?:\.\d+)?))?$")


@dataclass(frozen=True)
class Method:
    """One way to draw a prompt.

    Args:
        way: "base"; "negative", the concept as negative prompt; "lora", the erasure LoRA on everything; "fixed",
            UnGuide without a gate; or a gate mode.
        value: of "lora" its strength, of "fixed" the base model's weight.
    """

    way: str
    value: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Method:
        """A method as the command line names it: base, negative, lora:0.5, fixed:-1, trajectory, probe, official.

        Raises: BenchError for any other.
        """
        found = _FORM.match(text.strip().lower())
        way, value = found.groups() if found else ("", None)
        if way in (LORA, FIXED):
            return cls(way, float(value) if value else 1.0 if way == LORA else 0.0)
        if way not in (BASE, NEGATIVE, *GATES) or value:
            raise BenchError(
                f"there is no method {text!r}; choose from {', '.join(DEFAULT)}, lora:STRENGTH, fixed:WEIGHT"
            )
        return cls(way)

    @property
    def name(self) -> str:
        """As tables show it."""
        return {
            BASE: BASE,
            NEGATIVE: "negative prompt",
            LORA: f"LoRA {self.value:g}",
            FIXED: f"UnGuide weight {self.value:g}",
        }.get(self.way, f"UnGuide {self.way}")

    @property
    def is_guided(self) -> bool:
        """Whether the sampler is UnGuide's."""
        return self.way in (FIXED, *GATES)


@dataclass(frozen=True)
class Settings:
    """What every picture of a run depends on, beside its prompt, seed and method.

    Args:
        checkpoint, lora: files as the server names them, in models/checkpoints and models/loras.
        strength: of the erasure LoRA in UnGuide.
        concept_prompt: the erased concept's own, for the gate; "" takes the LoRA card's.
        negative: the negative prompt of the method "negative prompt".
        steps, cfg, sampler, scheduler: as KSampler has them.
        size: of the square pictures, pixels.
    Raises: BenchError for impossible numbers.
    """

    checkpoint: str
    lora: str
    strength: float = 1.0
    concept_prompt: str = ""
    negative: str = ""
    steps: int = 50
    cfg: float = 7.5
    sampler: str = "ddim"
    scheduler: str = "normal"
    size: int = 512

    def __post_init__(self) -> None:
        if self.size < 16 or self.size % 8:
            raise BenchError(f"the size is {self.size} pixels; expected a multiple of 8, 16 or more")
        if self.steps < 1:
            raise BenchError(f"there are {self.steps} steps; expected one at least")
        if not 0 <= self.cfg <= 100:
            raise BenchError(f"cfg is {self.cfg:g}; expected 0 to 100")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, found: Mapping[str, Any]) -> list[str]:
        """Every setting that is another one in a settings file's values, as a phrase."""
        mine = self.to_json()
        names = [field.name for field in fields(self)]
        return [f"{name} {found.get(name)!r} (now {mine[name]!r})" for name in names if found.get(name) != mine[name]]
