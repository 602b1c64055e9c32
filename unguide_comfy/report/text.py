"""A run in words: one line that fits a node, a report for people, and the same as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d

from ...unguide_core.probe import Decision
from ...unguide_core.probe.image import THRESHOLD
from ..probe.settings import ALWAYS
from .records import Cost, ImageCheck, Verdict

MAP_SIDE = 16
"""A map in the report has at most so many rows and columns."""

ERASED, UNTOUCHED, UNSURE, WAITING = "erased", "untouched", "unsure", "waiting"
"""What a line says, for its colour."""

NAMED = 24
"""The most characters of a concept in a line."""


@dataclass(frozen=True)
class Line:
    """What became of a run, in one line that fits a node.

    Args:
        kind: "erased", "untouched", "unsure" (look at the report) or "waiting".
        text: the outcome first.
    """

    kind: str
    text: str


def verdict_line(verdicts: Sequence[Verdict], *, sampling: bool = True, finished: bool = False) -> Line:
    """Return the verdicts of a run in one line.

    Args:
        sampling: whether images are generated, and not only a prompt probed.
        finished: whether the run is over, so that a decision that is not there will not come.
    """
    if any(verdict.waiting for verdict in verdicts):
        return Line(UNSURE, "not decided: nothing erased") if finished else Line(WAITING, "waiting for the first steps")
    detected = [verdict for verdict in verdicts if verdict.detected]
    changed = sorted({weight for v in verdicts if not v.detected for weight in v.weights if weight != 1.0})
    caveats = [verdict.caveat for verdict in verdicts if verdict.caveat]
    if detected:
        verb = "erased" if sampling and finished else "erasing" if sampling else "detected"
        outcome = f"{verb}: {', '.join(map(_named, detected))}"
    elif changed and sampling:
        outcome = f"not detected, weight {changed[-1]:g}"
    else:
        outcome = "untouched" if sampling and finished else "not detected"
    if caveats:
        return Line(UNSURE, f"{caveats[0]}: {outcome.replace(': ', ' ')}")
    return Line(ERASED if detected else UNSURE if changed and sampling else UNTOUCHED, outcome)


def _named(verdict: Verdict) -> str:
    """The concept, and in how many images of a batch."""
    word = verdict.word if len(verdict.word) <= NAMED else verdict.word[: NAMED - 3] + "..."
    found = sum(decision.detected for decision in verdict.decisions)
    return word if found == len(verdict.decisions) else f"{word} in {found} of {len(verdict.decisions)}"


# for people


def report_text(verdicts: Sequence[Verdict], cost: Cost) -> str:
    """Return the run for a person: what happened in one sentence, then the figures, rounded, and the keys last."""
    happened = "; ".join(_clause(verdict, cost) for verdict in verdicts) or "nothing was sampled"
    extra = cost.total - cost.plain
    spent = f"{extra:.4g} {'extra ' if cost.plain else ''}model evaluation{'' if extra == 1 else 's'}"
    sections = [f"{happened[0].upper()}{happened[1:]}; {spent}."]
    sections += ["\n".join(_details(verdict)) for verdict in verdicts]
    kinds = ", ".join(f"{kind} {rows:.4g}" for kind, rows in cost.evaluations.items() if rows)
    plain = f"; {cost.plain:.4g} without UnGuide" if cost.plain else ""
    sections.append(f"Model evaluations for each image: {kinds or 'none'}{plain}.\nTime: {cost.seconds:.1f} s.")
    keys = [f"{v.word}: model {v.decision.model_key}, adapter {v.decision.adapter_key}" for v in verdicts if v.decision]
    return "\n\n".join([*sections, *(["Keys\n" + "\n".join(keys)] if keys else [])])


def _clause(verdict: Verdict, cost: Cost) -> str:
    """What happened with one erasure LoRA, in words."""
    word, decision, count = verdict.word, verdict.decision, len(verdict.decisions)
    if decision is None:
        if verdict.decide == ALWAYS:
            return f"erased '{word}' without asking the gate"
        return f"could not decide about '{word}' and erased nothing (set decide to 'before sampling')"
    when = _when(decision, cost)
    found = sum(one.detected for one in verdict.decisions)
    if found:
        where = "" if count == 1 else f" in {found} of {count} images"
        erased = min(verdict.weights) < 1.0
        follows = "" if not cost.plain else "and erased it" if erased else "and left it, at weight 1"
    else:
        untouched = cost.plain and set(verdict.weights) == {1.0}
        where, follows = "", "and left the image as it is" if untouched else ""
    comma = "," if decision.step is None else ""
    verb = "detected" if found else "did not detect"
    return f"{verb} '{word}'{where} {when}" + (f"{comma} {follows}" if follows else "")


def _when(decision: Decision, cost: Cost) -> str:
    if decision.step is not None:
        return f"at step {decision.step + 1} of {cost.steps}"
    if decision.stage == "image":
        return "in the image itself"
    read = "in the prompt, " if decision.stage == "text" else ""
    return f"{read}before the first step"


def _details(verdict: Verdict) -> Iterator[str]:
    """The figures of one erasure LoRA, rounded."""
    yield f"{verdict.word} ({verdict.lora.name}), strength {verdict.lora.strength:g}"
    weights = ", ".join(f"{weight:.3g}" for weight in sorted(set(verdict.weights)))
    decision = verdict.decision
    if decision is not None:
        for statistic in decision.statistics:
            found = "detected" if statistic.detected else "not detected"
            score = f"{statistic.score:.2f}" if abs(statistic.score) < 1e6 else "very large"
            yield f"  {statistic.name} {score}, threshold {statistic.threshold:.2f}: {found}"
        level = "" if decision.sigma is None else f"; probed at noise level {decision.sigma:.3g}"
        yield f"  weight of the base model {weights}{level}"
        yield f"  decided by {decision.reason}"
    else:
        yield f"  weight of the base model {weights}"
    yield from map(_reading, verdict.images)
    if verdict.image_note:
        yield f"  the image was not read: {verdict.image_note}"
    if verdict.caveat:
        remedy = "use Calibrate Erasure LoRA once for this model" if "calibrated" in verdict.caveat else "see above"
        yield f"  {verdict.caveat}: {remedy}"


def _reading(check: ImageCheck) -> str:
    """What one reading of the images saw."""
    read = [(score, shown) for score, shown in zip(check.scores, check.shown, strict=True) if score is not None]
    of = "the start image" if check.start else "the image, generated again" if any(check.again) else "the image"
    level = "" if check.sigma is None else f" at noise level {check.sigma:.3g}"
    shown = sum(shows for _, shows in read)
    count = "" if len(read) == 1 or shown in (0, len(read)) else f" in {shown} of {len(read)}"
    what = f"shows the concept{count}" if shown else "does not show the concept"
    return f"  {of}{level} {what}: score {max(score for score, _ in read):.2f}, threshold {THRESHOLD:.2f}"


# for programs


def report_json(verdicts: Sequence[Verdict], cost: Cost) -> str:
    """Return the run as JSON: one entry per erasure LoRA, model evaluations per latent beside plain sampling's."""
    content = {
        "erasure": [_erasure(verdict) for verdict in verdicts],
        "model_evaluations": cost.evaluations,
        "model_evaluations_total": cost.total,
        "model_evaluations_plain": cost.plain,
        "model_evaluations_ratio": round(cost.total / cost.plain, 4) if cost.plain else None,
        "steps": cost.steps,
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
        "stage": None if decision is None else decision.stage,
        "step": None if decision is None or decision.step is None else decision.step + 1,
        "sigma": None if decision is None or decision.sigma is None else round(decision.sigma, 5),
        "reason": "" if decision is None else decision.reason,
        "decision": None if decision is None else json.loads(decision.to_json()),
        "samples": [_sample(one) for one in verdict.decisions],
        "images": [_image(check) for check in verdict.images],
        "images_note": verdict.image_note,
    }


def _image(check: ImageCheck) -> dict[str, Any]:
    return {
        "of": "the start image" if check.start else "the image",
        "step": None if check.step is None else check.step + 1,
        "sigma": None if check.sigma is None else round(check.sigma, 5),
        "generated_again": list(check.again),
        "shown": list(check.shown),
        "scores": [None if score is None else round(score, 4) for score in check.scores],
        "threshold": THRESHOLD,
    }


def _sample(decision: Decision) -> dict[str, Any]:
    step = None if decision.step is None else decision.step + 1
    content = {"detected": decision.detected, "score": decision.score, "weight": decision.weight, "step": step}
    return content if decision.influence_map is None else {**content, "map": _rows(decision.influence_map)}


def _rows(influence_map: torch.Tensor) -> list[list[float]]:
    """A map as rows of numbers, averaged down to the report's size."""
    height, width = (min(side, MAP_SIDE) for side in influence_map.shape)
    small = adaptive_avg_pool2d(influence_map[None].float(), (height, width))[0]
    return [[round(value, 3) for value in row] for row in small.tolist()]
