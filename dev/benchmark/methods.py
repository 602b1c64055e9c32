"""The ways to erase a concept that are compared, each from a prompt and seeds to pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dev.benchmark.studio import LOOK_AT, STEPS, Drawing, Studio
from unguide_bench.scores import BASE

Method = Callable[[Studio, str, str, Sequence[int]], Drawing]
"""Draws: studio, the erased concept, the prompt, seeds."""

SETS = ("paper", "selective")
STRENGTHS = (0.5, 1.0, 2.0)
MODES = ("official", "probe", "trajectory")
RESTARTED = "UnGuide trajectory, restart (selective)"
STRONGER = "UnGuide trajectory, weight -1 (paper)"
NEGATIVE, REPLACED = "negative prompt", "replaced prompt"
OFFICIAL_REPEATS, OFFICIAL_LOOK_AT = 10, 2
"""As the research code: ten noises, a look after a fifth of the steps."""


def gated(kind: str, mode: str) -> str:
    """The name of UnGuide with a set of erasure LoRAs in a gate mode."""
    return f"UnGuide {mode} ({kind})"


def alone(kind: str, strength: float) -> str:
    """The name of a LoRA without a gate."""
    return f"LoRA {strength:g} ({kind})"


def methods() -> dict[str, Method]:
    """Every method by name."""
    found: dict[str, Method] = {BASE: draw_base, NEGATIVE: draw_negative, REPLACED: draw_replaced}
    for kind in SETS:
        found |= {alone(kind, strength): _alone(kind, strength) for strength in STRENGTHS}
        found |= {gated(kind, mode): _gated(kind, mode) for mode in MODES}
    found[RESTARTED] = _gated("selective", "trajectory", on_detection="restart")
    return found | {STRONGER: _gated("paper", "trajectory", weight_detected=-1.0)}


def draw_base(studio: Studio, concept: str, prompt: str, seeds: Sequence[int]) -> Drawing:
    """The model as it is."""
    return studio.draw(studio.model, studio.encode(prompt), seeds)


def draw_negative(studio: Studio, concept: str, prompt: str, seeds: Sequence[int]) -> Drawing:
    """The concept's name as the negative prompt, always."""
    return studio.draw(studio.model, studio.encode(prompt), seeds, negative=studio.encode(concept))


def draw_replaced(studio: Studio, concept: str, prompt: str, seeds: Sequence[int]) -> Drawing:
    """The gate's decision, and where it finds the concept the reference prompt from the first step on, by the base."""
    import torch

    from demo.erasure import REFERENCES, photo

    lora, positive = studio.lora("selective", concept), studio.encode(prompt)
    look = studio.guided(lora, positive, seeds, gate(studio, "trajectory"), steps=LOOK_AT + 1)
    prompts = {False: positive, True: studio.encode(photo(REFERENCES[concept]))}
    parts = {found: studio.draw(studio.model, prompts[found], seeds) for found in set(look.detected)}
    latents = torch.stack([parts[found].latents[i] for i, found in enumerate(look.detected)])
    rows = 2.0 * STEPS + 1 + 2 * LOOK_AT * sum(look.detected) / len(seeds)
    return replace(look, latents=latents, rows=rows)


def gate(studio: Studio, mode: str, **settings: Any) -> Any:
    """A gate with the settings that all methods share, and others of `ProbeSettings`."""
    official = mode == "official"
    shared = {"probe_steps": OFFICIAL_LOOK_AT if official else LOOK_AT, "schedule_steps": STEPS}
    repeats = {"repeats": OFFICIAL_REPEATS} if official else {}
    return studio.gating.Gate(mode, studio.deciding.ProbeSettings(**{**shared, **repeats, **settings}))


def _alone(kind: str, strength: float) -> Method:
    def draw(studio: Studio, concept: str, prompt: str, seeds: Sequence[int]) -> Drawing:
        return studio.draw(studio.merged(studio.lora(kind, concept, strength)), studio.encode(prompt), seeds)

    return draw


def _gated(kind: str, mode: str, on_detection: str = "continue", **settings: Any) -> Method:
    def draw(studio: Studio, concept: str, prompt: str, seeds: Sequence[int]) -> Drawing:
        chosen = replace(gate(studio, mode, **settings), on_detection=on_detection)
        return studio.guided(studio.lora(kind, concept), studio.encode(prompt), seeds, chosen)

    return draw
