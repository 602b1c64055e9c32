"""How well the gate tells an erased concept from everything else, measured in a real ComfyUI.

For each of the demo's ten erasure LoRAs, the concept's name, its synonyms and the concept in scenes should be detected;
the nine other classes, their synonyms, the scenes and the empty prompt should not. All ten adapters are on the model at
once, decide during sampling, and decide each image of a batch separately. Run by `python3 dev gate`.

The set `preset` is trained first, by the node with its defaults, or read from a folder of such adapters.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from demo.captions import CLASSES, PLACES, REFERENCES, SCENES, SYNONYMS, fill
from experiments.diagram import draw
from experiments.runner import keep, publish
from experiments.studio import LATENT, PRESET, Studio, studio
from experiments.training import InTheGraph, erasure_lora
from unguide_bench.tables import markdown
from unguide_core.formats import load_adapter

AUTOMATIC = "automatic"
STEPS = 30
STATISTICS = ("text", "influence", "alignment", "paper")
FIELDS = {"selective": "shipped"}
"""The names of sets in the JSON file, where they differ."""
PRODUCT = "the gate"
KINDS = ("name", "synonym", "in a scene", "other class", "other synonym", "other in a scene", "scene", "empty")
WITH_THE_CONCEPT = KINDS[:3]
SCENES_WITH_OBJECTS = ("night", "snow")
TEMPLATE = "photo of the {}"
"""Training and calibration name a word in other templates."""


@dataclass(frozen=True)
class Score:
    """One statistic of one image under one concept's gate; `PRODUCT` is what the gate decides.

    Args:
        score: relative to what the value is compared with.
        value: the raw value.
        stage: which stage of the gate decided; "" for a single statistic.
        image: the number of the prompt's image.
    """

    concept: str
    prompt: str
    kind: str
    statistic: str
    score: float
    detected: bool
    value: float = 0.0
    stage: str = ""
    image: int = 0


def with_the_papers_rule(scores: list[Score]) -> list[Score]:
    """Return the scores and the paper's statistic: each influence relative to the empty prompt's mean over images.

    Only where influence was measured for every prompt: by a gate that no text stage precedes.
    """
    influences = [score for score in scores if score.statistic == "influence"]
    if any(score.stage == "text" for score in scores):
        return scores
    every = list(scores)
    for concept in {score.concept for score in influences}:
        own = [score for score in influences if score.concept == concept]
        empty = [score.value for score in own if score.kind == "empty"]
        neutral = sum(empty) / len(empty)
        for score in own:
            ratio = score.value / neutral
            every.append(replace(score, statistic="paper", score=ratio, detected=ratio > 1.0))
    return every


def loras_of(at: Studio, kind: str, trained: Path | None = None) -> dict[str, Any]:
    """Return a set's erasure LoRAs by concept; those of `preset` are in a folder, or trained."""
    if kind == PRESET and trained:
        return {c: erasure_lora(at, c, load_adapter(trained / f"{c}.safetensors")) for c in CLASSES}
    if kind == PRESET:
        way = InTheGraph(at, seed=0)
        return {c: way.lora(c, REFERENCES[c], SYNONYMS[c]) for c in tqdm(CLASSES, "training")}
    return {concept: replace(at.lora(kind, concept), neutral=at.encode("")) for concept in CLASSES}


def prompts() -> dict[str, dict[str, str]]:
    """Return every prompt, with its kind as seen from each concept. None was part of a training or a calibration."""

    def seen(owner: str, own: str, other: str) -> dict[str, str]:
        return {concept: own if concept == owner else other for concept in CLASSES}

    kinds: dict[str, dict[str, str]] = {}
    for name in CLASSES:
        kinds[fill(TEMPLATE, name)] = seen(name, "name", "other class")
        for synonym in SYNONYMS[name]:
            kinds[fill(TEMPLATE, synonym)] = seen(name, "synonym", "other synonym")
        for scene in SCENES_WITH_OBJECTS:
            kinds[f"{fill(TEMPLATE, name)} {PLACES[scene]}"] = seen(name, "in a scene", "other in a scene")
    for scene in SCENES[:6]:
        kinds[fill(TEMPLATE, scene)] = seen("", "", "scene")
    return {**kinds, "": seen("", "", "empty")}


def decisions(at: Studio, loras: Mapping[str, Any], images: int, seed: int, settings: Any) -> Iterator[Score]:
    """Yield the scores of every image under every concept's gate: those of the decision, and of its statistics."""
    import comfy.sample

    model, runs = at.gate(loras.values(), settings)
    noise = comfy.sample.prepare_noise(torch.zeros(images, *LATENT), seed)
    for prompt, kinds in tqdm(prompts().items(), "prompts"):
        at.generate(
            model, at.encode(prompt), [seed] * images, noise=noise, steps=STEPS, last_step=settings.probe_steps + 2
        )
        verdicts, _ = runs.pop()
        for concept, verdict in zip(loras, verdicts, strict=True):
            for image, decision in enumerate(verdict.decisions if concept in kinds else ()):
                about = Score(concept, prompt, kinds[concept], PRODUCT, decision.score, decision.detected, image=image)
                yield replace(about, stage=decision.stage)
                for one in decision.statistics:
                    yield replace(
                        about, statistic=one.name, score=one.score, detected=one.detected, value=one.prompt[0]
                    )


def area_under_curve(positive: list[float], negative: list[float]) -> float:
    """Return the chance that an image with the concept scores above one without it."""
    high, low = torch.tensor(positive), torch.tensor(negative).sort().values
    below = torch.searchsorted(low, high, right=False) + torch.searchsorted(low, high, right=True)
    return float(below.double().mean() / 2 / len(low))


def table(scores: list[Score]) -> str:
    """Return each statistic's detections and false positives over all concepts, in Markdown."""
    lines = []
    for statistic in _known(scores):
        rows = [score for score in scores if score.statistic == statistic]
        words = [score.detected for score in rows if score.kind in ("name", "synonym")]
        inside = [score.detected for score in rows if score.kind == "in a scene"]
        within = [score.score for score in rows if score.kind in WITH_THE_CONCEPT]
        without = [score for score in rows if score.kind not in WITH_THE_CONCEPT]
        auc = f"{area_under_curve(within, [score.score for score in without]):.4f}"
        shares = [_share(words), _share(inside), _share([score.detected for score in without])]
        lines.append([statistic, "-" if statistic == PRODUCT else auc, *shares])
    heads = ("decided by", "AUC", "detected by name or synonym", "detected in scenes", "false positives")
    return markdown(heads, lines)


def figures(scores: list[Score]) -> dict[str, float]:
    """Return what the gate did, in shares.

    unrelated_without_evaluation: decisions on unrelated images by a stage without model evaluations.
    mean_cost_unrelated: model evaluations of an unrelated image with one adapter on the model, relative to plain
        sampling's, by the stage that decides: a probe is one of 2 * STEPS.
    recall_words, recall_scenes: detected by name or synonym, and in scenes.
    false_positives: by one adapter.
    joint_false_positives: images in which any of the ten detects a concept that is not there.
    """
    rows = [score for score in scores if score.statistic == PRODUCT]
    without = [score for score in rows if score.kind not in WITH_THE_CONCEPT]
    images: dict[tuple[str, int], bool] = {}
    for score in without:
        key = score.prompt, score.image
        images[key] = images.get(key, False) or score.detected
    free = _mean([score.stage == "text" for score in without])
    return {
        "unrelated_without_evaluation": free,
        "mean_cost_unrelated": 1.0 + (1.0 - free) / (2 * STEPS),
        "recall_words": _mean([score.detected for score in rows if score.kind in ("name", "synonym")]),
        "recall_scenes": _mean([score.detected for score in rows if score.kind == "in a scene"]),
        "false_positives": _mean([score.detected for score in without]),
        "joint_false_positives": _mean(list(images.values())),
    }


FIGURES = {
    "recall_words": "detected by name or synonym",
    "recall_scenes": "detected in scenes",
    "false_positives": "false positives",
    "joint_false_positives": "of any of the ten",
    "unrelated_without_evaluation": "decided without an evaluation",
    "mean_cost_unrelated": "mean cost",
}
"""What the fields of `figures` are called in the table; the last four are of unrelated images."""


def summary(sets: Mapping[str, list[Score]]) -> str:
    """Return `figures` of several sets of erasure LoRAs, in Markdown."""
    lines = []
    for kind, scores in sets.items():
        found = figures(scores)
        *shares, cost = (found[name] for name in FIGURES)
        lines.append([kind, *(f"{100 * share:.2f} %" for share in shares), f"{cost:.4f}x"])
    return markdown(("erasure LoRAs", *FIGURES.values()), lines)


def report_of(sets: Mapping[str, list[Score]], statistic: str) -> str:
    """Return the tables of several sets: of the cascade, or of one statistic of the trajectory stage."""
    parts = []
    if statistic == AUTOMATIC:
        parts.append(summary(sets))
    for kind, scores in sets.items():
        parts.append(f"Erasure LoRAs: {kind}")
        parts += [table_by_stage(scores)] if statistic == AUTOMATIC else [table(scores), table_by_kind(scores)]
    return "\n\n".join(parts)


def table_by_stage(scores: list[Score]) -> str:
    """Return which stage decided how many images of each kind, in Markdown."""
    lines = []
    for kind in KINDS:
        rows = [score for score in scores if score.statistic == PRODUCT and score.kind == kind]
        cells = [
            f"{100 * _mean([(score.stage, score.detected) == (stage, detected) for score in rows]):.1f} %"
            for stage in ("text", "trajectory")
            for detected in (False, True)
        ]
        lines.append([f"{kind} ({len(rows)})", *cells])
    heads = ("prompts", "text: absent", "text: detected", "trajectory: absent", "trajectory: detected")
    return markdown(heads, lines)


def _mean(values: Sequence[bool]) -> float:
    return round(sum(values) / max(1, len(values)), 5)


def table_by_kind(scores: list[Score]) -> str:
    """Return in how many images of each kind each statistic detects the concept, in Markdown."""
    names, lines = _known(scores), []
    for kind in KINDS:
        of_kind = {n: [s.detected for s in scores if s.kind == kind and s.statistic == n] for n in names}
        lines.append([kind, *(_share(of_kind[name]) for name in names)])
    return markdown(("prompts", *names), lines)


def _known(scores: list[Score]) -> list[str]:
    """The statistics that were taken of every image."""
    count = {name: sum(score.statistic == name for score in scores) for name in (PRODUCT, *STATISTICS)}
    return [name for name in (PRODUCT, *STATISTICS) if count[name] == count[PRODUCT]]


def _share(detected: list[bool]) -> str:
    return f"{sum(detected)} of {len(detected)} ({100 * sum(detected) / max(1, len(detected)):.1f} %)"


@torch.inference_mode()
def run(options: Namespace) -> None:
    """Measure each set, and print its tables and figures."""
    at = studio()
    settings = at.settings(
        statistic=options.statistic,
        resist_adversarial=options.resist_adversarial,
        on_detection="continue",
        probe_steps=options.probe_steps,
        probe_schedule_steps=STEPS,
    )
    sets: dict[str, list[Score]] = {}
    for kind in options.set:
        loras = loras_of(at, kind, options.trained)
        name = FIELDS.get(kind, kind)
        sets[name] = with_the_papers_rule(list(decisions(at, loras, options.images, options.seed, settings)))
        content = {name: {**figures(scores), "scores": [vars(s) for s in scores]} for name, scores in sets.items()}
        keep(options.json, content)
    marker = "gate" if options.statistic == AUTOMATIC else "statistics"
    publish(report_of(sets, options.statistic), options.markdown, marker)
    if options.diagram:
        draw([vars(score) for score in next(iter(sets.values()))], options.diagram)
