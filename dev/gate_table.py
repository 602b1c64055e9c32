"""How well the gate tells an erased concept from everything else, measured in a real ComfyUI.

For each of the demo's ten erasure LoRAs, the concept's name, its synonyms and the concept in scenes should be detected;
the nine other classes, their synonyms, the scenes and the empty prompt should not. All ten adapters are on the model at
once, decide during sampling, and decide each image of a batch separately. Run by `python3 dev gate`.

The set `preset` is trained first, by the node with its defaults.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dev.gate_diagram import draw
from dev.narrow_host import load_narrow_model, narrow_lora
from dev.pack import pack_module, start_host

CHECKPOINT, CFG, STEPS = "unguide-demo.safetensors", 4.0, 30
AUTOMATIC = "automatic"
STATISTICS = ("text", "influence", "alignment", "paper")
SETS = ("selective", "preset", "paper")
FIELDS = {"selective": "shipped"}
"""The names of sets in the JSON file, where they differ."""
PRODUCT = "the gate"
KINDS = ("name", "synonym", "in a scene", "other class", "other synonym", "scene", "empty")
WITH_THE_CONCEPT = KINDS[:3]
# other scenes than those that the adapters are calibrated in
SCENES_WITH_OBJECTS = ("forest", "snow")


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


class Demo:
    """The demo model at its narrow width (`dev.narrow_host`) with ten erasure LoRAs.

    Args:
        kind: of `SETS`.
        seed: of the training of `preset`.
    """

    def __init__(self, kind: str, seed: int = 0):
        import nodes
        from demo.captions import CLASSES

        self.nodes: Any = nodes
        if kind == "preset":
            self.model, self.clip, self.loras = trained(seed)
            return
        load = pack_module("unguide_comfy.lora.load").load_erasure_lora
        _, self.clip, _ = self.nodes.CheckpointLoaderSimple().load_checkpoint(CHECKPOINT)
        self.model = load_narrow_model()
        empty, path = self.encode(""), f"unguide-demo/{kind}/{{}}.safetensors"
        self.loras = {
            concept: replace(narrow_lora(load(path.format(concept), 1.0, self.clip), self.model), neutral=empty)
            for concept in CLASSES
        }

    def encode(self, prompt: str) -> Any:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))

    def sample(self, model: Any, prompt: str, batch: int, seed: int, steps: int = STEPS) -> Any:
        """Return the latents after the first `steps` of the schedule, [batch, 4, 8, 8]."""
        import torch

        latent = {"samples": torch.zeros(batch, 4, 8, 8)}
        (out,) = self.nodes.common_ksampler(
            model,
            seed,
            STEPS,
            CFG,
            "euler",
            "normal",
            self.encode(prompt),
            self.encode(""),
            latent,
            last_step=steps,
        )
        return out["samples"]


def trained(seed: int) -> tuple[Any, Any, dict[str, Any]]:
    """Return the model, its CLIP and the erasure LoRAs that the node trains on it, by concept."""
    from demo.captions import CLASSES, REFERENCES, SYNONYMS
    from dev.training_table import InTheGraph

    way, loras = InTheGraph(seed), {}
    for number, concept in enumerate(CLASSES, start=1):
        sys.stderr.write(f"\rtraining {number} of {len(CLASSES)} ")
        loras[concept] = way.lora(concept, REFERENCES[concept], SYNONYMS[concept])
    return way.model, way.clip, loras


def prompts() -> dict[str, dict[str, str]]:
    """Return every prompt, with its kind as seen from each concept."""
    from demo.captions import CLASSES, PLACES, SCENES, SYNONYMS, article

    def seen(owner: str, own: str, other: str) -> dict[str, str]:
        return {concept: own if concept == owner else other for concept in CLASSES}

    kinds: dict[str, dict[str, str]] = {}
    for name in CLASSES:
        kinds[f"a photo of the {name}"] = seen(name, "name", "other class")
        for synonym in SYNONYMS[name]:
            kinds[f"a photo of the {synonym}"] = seen(name, "synonym", "other synonym")
        for scene in SCENES_WITH_OBJECTS:
            kinds[f"{article(name)} {name} {PLACES[scene]}"] = {name: "in a scene"}
    for scene in SCENES[:6]:
        kinds[f"a photo of the {scene}"] = seen("", "", "scene")
    return {**kinds, "": seen("", "", "empty")}


def decisions(demo: Demo, images: int, seed: int, settings: Any) -> Iterator[Score]:
    """Yield the scores of every image under every concept's gate: those of the decision, and of its statistics."""
    asked = prompts()
    runs: list[Sequence[Any]] = []
    attach = pack_module("unguide_comfy.gate.attach")
    model = attach.guided(
        demo.model, list(demo.loras.values()), settings, observer=lambda verdicts, cost: runs.append(verdicts)
    )
    started = time.perf_counter()
    for number, (prompt, kinds) in enumerate(asked.items(), start=1):
        demo.sample(model, prompt, images, seed, settings.probe_steps + 2)
        for concept, verdict in zip(demo.loras, runs.pop(), strict=True):
            for image, decision in enumerate(verdict.decisions if concept in kinds else ()):
                about = Score(concept, prompt, kinds[concept], PRODUCT, decision.score, decision.detected, image=image)
                yield replace(about, stage=decision.stage)
                for one in decision.statistics:
                    yield replace(
                        about, statistic=one.name, score=one.score, detected=one.detected, value=one.prompt[0]
                    )
        left = (time.perf_counter() - started) * (len(asked) / number - 1)
        sys.stderr.write(f"\rprompt {number} of {len(asked)}, {left:.0f} s left ")
    sys.stderr.write("\n")


def area_under_curve(positive: list[float], negative: list[float]) -> float:
    """Return the chance that an image with the concept scores above one without it."""
    import torch

    high, low = torch.tensor(positive), torch.tensor(negative).sort().values
    below = torch.searchsorted(low, high, right=False) + torch.searchsorted(low, high, right=True)
    return float(below.double().mean() / 2 / len(low))


def table(scores: list[Score]) -> str:
    """Return each statistic's detections and false positives over all concepts, in Markdown."""
    lines = [
        "| decided by | AUC | detected by name or synonym | detected in scenes | false positives |",
        "|---|---|---|---|---|",
    ]
    for statistic in _known(scores):
        rows = [score for score in scores if score.statistic == statistic]
        words = [score.detected for score in rows if score.kind in ("name", "synonym")]
        placed = [score.detected for score in rows if score.kind == "in a scene"]
        within = [score.score for score in rows if score.kind in WITH_THE_CONCEPT]
        without = [score for score in rows if score.kind not in WITH_THE_CONCEPT]
        auc = f"{area_under_curve(within, [score.score for score in without]):.4f}"
        cells = [_share(words), _share(placed), _share([score.detected for score in without])]
        lines.append(f"| {statistic} | {'-' if statistic == PRODUCT else auc} | {' | '.join(cells)} |")
    return "\n".join(lines)


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


def table_by_stage(scores: list[Score]) -> str:
    """Return which stage decided how many images of each kind, in Markdown."""
    lines = [
        "| prompts | text: absent | text: detected | trajectory: absent | trajectory: detected |",
        "|---" * 5 + "|",
    ]
    for kind in KINDS:
        rows = [score for score in scores if score.statistic == PRODUCT and score.kind == kind]
        cells = [
            f"{100 * _mean([(score.stage, score.detected) == (stage, detected) for score in rows]):.1f} %"
            for stage in ("text", "trajectory")
            for detected in (False, True)
        ]
        lines.append(f"| {kind} ({len(rows)}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Sequence[bool]) -> float:
    return round(sum(values) / max(1, len(values)), 5)


def table_by_kind(scores: list[Score]) -> str:
    """Return in how many images of each kind each statistic detects the concept, in Markdown."""
    names = _known(scores)
    lines = ["| prompts | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for kind in KINDS:
        of_kind = {n: [s.detected for s in scores if s.kind == kind and s.statistic == n] for n in names}
        lines.append(f"| {kind} | " + " | ".join(_share(of_kind[name]) for name in names) + " |")
    return "\n".join(lines)


def _known(scores: list[Score]) -> list[str]:
    """The statistics that were taken of every image."""
    count = {name: sum(score.statistic == name for score in scores) for name in (PRODUCT, *STATISTICS)}
    return [name for name in (PRODUCT, *STATISTICS) if count[name] == count[PRODUCT]]


def _share(detected: list[bool]) -> str:
    return f"{sum(detected)} of {len(detected)} ({100 * sum(detected) / max(1, len(detected)):.1f} %)"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 dev gate")
    parser.add_argument("--set", nargs="+", default=["selective"], choices=SETS)
    parser.add_argument("--training-seed", type=int, default=0, help="of the set 'preset'")
    parser.add_argument("--statistic", default=AUTOMATIC, choices=(AUTOMATIC, *STATISTICS[1:]), help="what decides")
    parser.add_argument("--resist-adversarial", action="store_true", help="influence or alignment decides")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--images", type=int, default=20, help="noise seeds for each prompt (default: %(default)s)")
    parser.add_argument("--probe-steps", type=int, default=3, help=f"of {STEPS} (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the figures and every score")
    parser.add_argument("--diagram", type=Path, help="where to draw the cascade with the first set's figures (PNG)")
    options = parser.parse_args()
    start_host()
    import torch

    torch.set_flush_denormal(True)
    settings = pack_module("unguide_comfy.probe.settings").Settings(
        statistic=options.statistic,
        resist_adversarial=options.resist_adversarial,
        on_detection="continue",
        probe_steps=options.probe_steps,
        probe_schedule_steps=STEPS,
    )
    report: dict[str, Any] = {}
    with torch.inference_mode():
        for kind in options.set:
            demo = Demo(kind, options.training_seed)
            scores = with_the_papers_rule(list(decisions(demo, options.images, options.seed, settings)))
            parts = (table(scores), table_by_kind(scores), table_by_stage(scores))
            sys.stdout.write("\n\n".join((f"Erasure LoRAs: {kind}", *parts, json.dumps(figures(scores)))) + "\n\n")
            report[FIELDS.get(kind, kind)] = {**figures(scores), "scores": [vars(score) for score in scores]}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    if options.diagram:
        draw(next(iter(report.values()))["scores"], options.diagram)


if __name__ == "__main__":
    main()
