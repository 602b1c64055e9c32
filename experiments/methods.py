"""The ways to erase a concept that are compared, each from a prompt and seeds to images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from demo.captions import REFERENCES, photo
from experiments.studio import CLOSED_FORM, PRESET, PROBE_STEPS, STEPS, Generated, Studio
from unguide_bench.scores import BASE

Method = Callable[[Studio, str, str, Sequence[int]], Generated]
"""Generates: studio, the erased concept, the prompt, seeds."""

SETS = ("paper", "selective")
STRENGTHS = (1.0, 2.0)
DURING, BEFORE, AS_PAPER = DECIDE = ("during sampling", "before sampling", "as the paper")
NEGATIVE, REPLACED = "negative prompt", "replaced prompt"
PAPER_REPEATS, PAPER_PROBE_STEPS = 10, 2
"""As the research code: ten noise seeds, and a probe after a fifth of the steps."""


def gated(kind: str, decide: str = DURING, change: str = "") -> str:
    """Return the name of UnGuide with a set of erasure LoRAs, by when it decides and what else differs."""
    return f"UnGuide {decide}{f', {change}' if change else ''} ({kind})"


def alone(kind: str, strength: float) -> str:
    """Return the name of a LoRA without a gate."""
    return f"LoRA {strength:g} ({kind})"


STRONGER = gated("paper", change="weight -1")
DOUBLED = gated("paper", change="strength 2")


def methods() -> dict[str, Method]:
    """Return every method by name."""
    every: dict[str, Method] = {BASE: generate_base, NEGATIVE: generate_negative, REPLACED: generate_replaced}
    for kind in SETS:
        every |= {alone(kind, strength): _alone(kind, strength) for strength in STRENGTHS}
        every |= {gated(kind, decide): _gated(kind, decide=decide) for decide in reversed(DECIDE)}
    for kind in (PRESET, CLOSED_FORM):
        every |= {alone(kind, 1.0): _alone(kind, 1.0), gated(kind): _gated(kind)}
    every[DOUBLED] = _gated("paper", 2.0)
    return every | {STRONGER: _gated("paper", weight_detected=-1.0)}


def reference_prompt(studio: Studio, method: str, concept: str) -> str:
    """Return the prompt of the scene that takes the concept's place."""
    kind = CLOSED_FORM if f"({CLOSED_FORM})" in method else "selective"  # the trained sets share theirs
    prompt: str = studio.lora(kind, concept).adapter.card.reference
    return prompt


def generate_base(studio: Studio, concept: str, prompt: str, seeds: Sequence[int]) -> Generated:
    """Generate with the model as it is."""
    return studio.generate(studio.model, studio.encode(prompt), seeds)


def generate_negative(studio: Studio, concept: str, prompt: str, seeds: Sequence[int]) -> Generated:
    """Generate with the concept's name as the negative prompt, always."""
    return studio.generate(studio.model, studio.encode(prompt), seeds, negative=studio.encode(concept))


def generate_replaced(studio: Studio, concept: str, prompt: str, seeds: Sequence[int]) -> Generated:
    """Generate with the base model, with the reference prompt from the first step on where the gate detects."""
    lora, positive = studio.lora("selective", concept), studio.encode(prompt)
    probe = studio.guided(lora, positive, seeds, gate(studio), last_step=PROBE_STEPS + 1)
    prompts = {False: positive, True: studio.encode(photo(REFERENCES[concept]))}
    parts = {detected: studio.generate(studio.model, prompts[detected], seeds) for detected in set(probe.detected)}
    latents = torch.stack([parts[detected].latents[i] for i, detected in enumerate(probe.detected)])
    by_text = probe.evaluations <= 2 * (PROBE_STEPS + 1)  # then there is no probe, and no step is lost
    lost = 0.0 if by_text else 1 + 2 * PROBE_STEPS * sum(probe.detected) / len(seeds)
    evaluations = 2.0 * STEPS + lost
    return replace(probe, latents=latents, evaluations=evaluations)


def gate(studio: Studio, decide: str = DURING, **settings: Any) -> Any:
    """Return a gate's settings as all methods share them, and others of `Settings`."""
    as_paper = {"probe_steps": PAPER_PROBE_STEPS, "repeats": PAPER_REPEATS} if decide == AS_PAPER else {}
    return studio.settings(decide=decide, **{**as_paper, **settings})


def _alone(kind: str, strength: float) -> Method:
    def generate(studio: Studio, concept: str, prompt: str, seeds: Sequence[int]) -> Generated:
        return studio.generate(studio.merged(studio.lora(kind, concept, strength)), studio.encode(prompt), seeds)

    return generate


def _gated(kind: str, strength: float = 1.0, **settings: Any) -> Method:
    def generate(studio: Studio, concept: str, prompt: str, seeds: Sequence[int]) -> Generated:
        chosen = gate(studio, **settings)
        return studio.guided(studio.lora(kind, concept, strength), studio.encode(prompt), seeds, chosen)

    return generate
