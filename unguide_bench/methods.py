"""The methods that are compared, and the settings that they share.

It knows neither servers nor graphs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import BenchError
from .scores import BASE

NEGATIVE, LORA, ALWAYS = "negative", "lora", "always"
GATES = {"during": "during sampling", "before": "before sampling", "as-the-paper": "as the paper"}
"""The methods with a gate, and the node's word for when it decides."""
DEFAULT = (BASE, NEGATIVE, LORA, *GATES)
_FORM = re.compile(r"^([a-z-]+)(?::(-?\d+(?:\.\d+)?))?$")


@dataclass(frozen=True)
class Method:
    """One way to generate a prompt.

    Args:
        way: "base"; "negative", the concept as negative prompt; "lora", the erasure LoRA on everything; "always",
            UnGuide without a gate; or one of `GATES`.
        value: of "lora" its strength, of "always" the base model's weight.
    """

    way: str
    value: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Method:
        """Return a method by its name on the command line: base, negative, lora:0.5, always:-1, or one of `GATES`.

        Raises: BenchError for any other name.
        """
        found = _FORM.match(text.strip().lower())
        way, value = found.groups() if found else ("", None)
        if way in (LORA, ALWAYS):
            return cls(way, float(value) if value else 1.0 if way == LORA else 0.0)
        if way not in (BASE, NEGATIVE, *GATES) or value:
            raise BenchError(f"unknown method {text!r}; choose from {', '.join(DEFAULT)}, lora:STRENGTH, always:WEIGHT")
        return cls(way)

    @property
    def name(self) -> str:
        """As tables show it."""
        return {
            BASE: BASE,
            NEGATIVE: "negative prompt",
            LORA: f"LoRA {self.value:g}",
            ALWAYS: f"UnGuide always, weight {self.value:g}",
        }.get(self.way, f"UnGuide {GATES.get(self.way)}")

    @property
    def is_guided(self) -> bool:
        """Whether the sampler is UnGuide's."""
        return self.way in (ALWAYS, *GATES)


@dataclass(frozen=True)
class Settings:
    """What every image of a run depends on, besides its prompt, seed and method.

    Args:
        checkpoint, lora: files as the server names them, in models/checkpoints and models/loras.
        strength: of the erasure LoRA in UnGuide.
        concept_prompt: the erased concept's own, for the gate; "" takes that of the LoRA's metadata.
        negative: the negative prompt of the method "negative prompt".
        steps, cfg, sampler, scheduler: as KSampler has them.
        size: of the square images, pixels.
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

    def require_prompt_of(self, method: Method) -> None:
        """Raises: BenchError where the method is "negative" and has no text: its images would be the base model's."""
        if method.way == NEGATIVE and not self.negative.strip():
            raise BenchError(f"the method {NEGATIVE!r} has no negative prompt; give the concept, or another text")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, found: Mapping[str, Any]) -> list[str]:
        """Every setting that is another one in a settings file's values, as a phrase."""
        mine = self.to_json()
        names = [field.name for field in fields(self)]
        return [f"{name} {found.get(name)!r} (now {mine[name]!r})" for name in names if found.get(name) != mine[name]]
