"""The stages of the gate's cascade, cheapest evidence first, in one list.

Each is a function of its evidence: the same prompt, adapter and latents give the same decision, whatever ran before. A
stage decides a sample or leaves it open (None), and later stages decide what is open. When a stage is asked, and what
follows from a decision, is the gate's part (gate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ...unguide_core.probe import Decision
from ..lora.load import ErasureLora
from ..probe.conds import Context
from ..probe.decide import decide
from ..probe.predictions import Predictions
from ..probe.settings import Settings
from ..probe.text import text_decision, text_statistics
from .steps import probing_step

Loras = Sequence[tuple[int, ErasureLora]]
"""Erasure LoRAs with their numbers in the run."""

Found = list[tuple[Decision | None, ...]]
"""Each erasure LoRA's decisions: one per sample, or one for all; None where a stage leaves that open."""


@dataclass(frozen=True)
class Evidence:
    """What a stage may read.

    Args:
        context: the sampling run: prompts, adapters, model.
        settings: of the gate.
        samples: the size of the batch, to decide sample by sample; None to decide the prompt.
        predictions: at the latent of the step, or of a rollout; None before there is a latent.
        step: the sampling step, from 0; None before the first.
    """

    context: Context
    settings: Settings
    samples: int | None = None
    predictions: Predictions | None = None
    step: int | None = None


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: for the report.
        step: step(sigmas, schedule, settings) is the sampling step at which it is asked: of a run through the noise
            levels `sigmas`, by the probe's own `schedule`. None before the first step, without a latent.
        decide: from the evidence to decisions.
    """

    name: str
    step: Callable[[torch.Tensor, torch.Tensor, Settings], int] | None
    decide: Callable[[Evidence, Loras], Found]


def by_text(evidence: Evidence, loras: Loras) -> Found:
    """Decide by what the adapters do to the prompt's text states. Takes no evaluation."""
    context, settings = evidence.context, evidence.settings
    return [
        tuple(
            text_decision(context, lora, settings, statistics)
            for statistics in text_statistics(context, index, lora, settings, evidence.samples)
        )
        for index, lora in loras
    ]


def by_trajectory(evidence: Evidence, loras: Loras) -> Found:
    """Decide by what the adapters do to the prediction at a latent, and report the text stage's figures with it."""
    assert evidence.predictions is not None
    context, settings, by_sample = evidence.context, evidence.settings, evidence.samples is not None
    found = decide(evidence.predictions, loras, settings, step=evidence.step, by_sample=by_sample)
    return [
        tuple(
            replace(decision, statistics=(*decision.statistics, *text))
            for decision, text in zip(
                decisions, text_statistics(context, index, lora, settings, evidence.samples), strict=True
            )
        )
        for (index, lora), decisions in zip(loras, found, strict=True)
    ]


def _probing(sigmas: torch.Tensor, schedule: torch.Tensor, settings: Settings) -> int:
    return probing_step(sigmas, schedule, settings.probe_steps)


TEXT, TRAJECTORY = Stage("text", None, by_text), Stage("trajectory", _probing, by_trajectory)

STAGES = (TEXT, TRAJECTORY)
"""The cascade."""
