"""What a run did, as JSON. See plotting.py for the picture."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d

from .outcomes import Outcome, RunReport

MAP_SIDE = 16
"""A map in the report has at most so many rows and columns."""


def report_json(report: RunReport) -> str:
    """The report as JSON: one entry per erasure LoRA; evaluations per latent against plain sampling; seconds."""
    total = sum(report.evaluations.values())
    content = {
        "erasure": [_outcome(outcome) for outcome in report.outcomes],
        "unet_evaluations": report.evaluations,
        "unet_evaluations_total": total,
        "unet_evaluations_plain": report.plain,
        "unet_evaluations_ratio": round(total / report.plain, 4) if report.plain else None,
        "seconds": round(report.seconds, 3),
    }
    return json.dumps(content, indent=2, allow_nan=False)


def _outcome(outcome: Outcome) -> dict[str, Any]:
    found, decision = outcome.found, outcome.decision
    maps = found.maps if found is not None and found.maps is not None else ()
    samples = [
        {"detected": one.detected, "score": one.score, "confidence": one.confidence, "weight": weight}
        for one, weight in zip(outcome.decisions, _per_decision(outcome), strict=True)
    ]
    for sample, one in zip(samples, maps, strict=False):
        sample["map"] = _rows(one)
    return {
        "erasure_lora": outcome.lora,
        "concept": outcome.concept,
        "mode": outcome.mode,
        "why": "" if decision is None else decision.reason,
        "weight": min(outcome.weights),
        "displacement": outcome.displacement,
        "step": None if outcome.step is None else outcome.step + 1,
        "sigma": None if found is None else round(found.sigma, 5),
        "decision": None if decision is None else json.loads(decision.to_json()),
        "samples": samples,
    }


def _per_decision(outcome: Outcome) -> list[float]:
    weights = list(outcome.weights)
    return weights if len(weights) == len(outcome.decisions) else weights[:1] * len(outcome.decisions)


def _rows(found: torch.Tensor) -> list[list[float]]:
    """A map as rows of numbers, averaged down to the report's size."""
    height, width = (min(side, MAP_SIDE) for side in found.shape)
    small = adaptive_avg_pool2d(found[None].float(), (height, width))[0]
    return [[round(value, 3) for value in row] for row in small.tolist()]
