"""A run in words: one line per erasure LoRA for a node and the log, and a report as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d

from ..probe.settings import ALWAYS, AS_PAPER
from .records import Cost, Verdict

MAP_SIDE = 16
"""A map in the report has at most so many rows and columns."""


def summary(verdict: Verdict, finished: bool = False) -> str:
    """Return the verdict in one line, the outcome first.

    Args:
        finished: whether the run is over, so that a decision that is not there will not come.
    """
    decision, concept = verdict.decision, verdict.concept
    weights = ", ".join(f"{weight:g}" for weight in sorted(set(verdict.weights)))
    if decision is None:
        if verdict.decide == ALWAYS:
            return f"Always erased: {concept} (weight {weights})"
        if not finished:
            return f"Waiting for the first steps: {concept}"
        return f"WARNING, not decided: {concept}. Nothing was erased; decide before sampling (UnGuide Settings)"
    when = "" if decision.step is None else f" at step {decision.step + 1}"
    outcome = f"Detected{when}: {concept}" if decision.detected else f"Not detected: {concept}"
    figures = f"{decision.statistic} {decision.score:.3g}, threshold {decision.threshold:.3g}, weight {weights}"
    return f"{outcome} ({figures}){warning(verdict)}"


def warning(verdict: Verdict) -> str:
    """Return what the user should know about how the decision was made; empty where all is well."""
    decision = verdict.decision
    if (
        decision is None
        or decision.statistic != "paper"
        or verdict.decide == AS_PAPER
        or "as chosen" in decision.reason
    ):
        return ""
    if verdict.lora.neutral is None:
        return ". WARNING, weak gate: connect a CLIP to Load Erasure LoRA"
    return ". WARNING, weak gate: the file names no concept; name it in Load Erasure LoRA"


def report_json(verdicts: Sequence[Verdict], cost: Cost) -> str:
    """Return the run as JSON: one entry per erasure LoRA, model evaluations per latent beside plain sampling's."""
    content = {
        "erasure": [_erasure(verdict) for verdict in verdicts],
        "model_evaluations": cost.evaluations,
        "model_evaluations_total": cost.total,
        "model_evaluations_plain": cost.plain,
        "model_evaluations_ratio": round(cost.total / cost.plain, 4) if cost.plain else None,
        "seconds": round(cost.seconds, 3),
    }
    return json.dumps(content, indent=2, allow_nan=False)


def _erasure(verdict: Verdict) -> dict[str, Any]:
    decision = verdict.decision
    return {
        "erasure_lora": verdict.lora.name,
        "concept": verdict.lora.concept_prompt,
        "decide": verdict.decide,
        "detected": None if decision is None else decision.detected,
        "weight": min(verdict.weights),
        "strength": verdict.lora.strength,
        "step": None if decision is None or decision.step is None else decision.step + 1,
        "sigma": None if decision is None or decision.sigma is None else round(decision.sigma, 5),
        "reason": "" if decision is None else decision.reason + warning(verdict),
        "decision": None if decision is None else json.loads(decision.to_json()),
        "samples": [_sample(one) for one in verdict.decisions],
    }


def _sample(decision: Any) -> dict[str, Any]:
    step = None if decision.step is None else decision.step + 1
    content = {"detected": decision.detected, "score": decision.score, "weight": decision.weight, "step": step}
    return content if decision.influence_map is None else {**content, "map": _rows(decision.influence_map)}


def _rows(influence_map: torch.Tensor) -> list[list[float]]:
    """A map as rows of numbers, averaged down to the report's size."""
    height, width = (min(side, MAP_SIDE) for side in influence_map.shape)
    small = adaptive_avg_pool2d(influence_map[None].float(), (height, width))[0]
    return [[round(value, 3) for value in row] for row in small.tolist()]
