"""How well each statistic tells an erased concept from everything else, measured with the pack in a real ComfyUI.

For each of the demo's ten erasure LoRAs: the concept's name, its synonyms and the concept in scenes shall be found; the
nine other classes, their synonyms, the scenes and the empty prompt shall not. Run by `python3 dev gate`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dev.pack import pack_module, start_host

CHECKPOINT = "unguide-demo.safetensors"
STATISTICS = ("alignment", "influence", "paper")
KINDS = ("name", "synonym", "in a scene", "other class", "other synonym", "scene", "empty")
SHALL_BE_FOUND = KINDS[:3]


@dataclass(frozen=True)
class Score:
    """One statistic's score of one prompt under one concept's gate."""

    concept: str
    prompt: str
    kind: str
    statistic: str
    score: float
    threshold: float
    detected: bool


def prompts(concept: str) -> Iterator[tuple[str, str]]:
    """Pairs of a prompt and its kind, as seen from one concept."""
    from demo.captions import CLASSES, PLACES, SCENES, SYNONYMS

    for name in CLASSES:
        yield f"a photo of the {name}", "name" if name == concept else "other class"
        for synonym in SYNONYMS[name]:
            yield f"a photo of the {synonym}", "synonym" if name == concept else "other synonym"
    for scene in SCENES:
        yield f"a photo of the {scene}", "scene"
    for place in (PLACES["forest"], PLACES["snow"]):
        yield f"a {concept} {place}", "in a scene"
    yield "", "empty"


def measure(kind: str, cfg: float, settings: dict[str, Any]) -> Iterator[Score]:
    """Every statistic of every prompt under every concept's gate, in the host."""
    import comfy.samplers
    import torch

    import nodes
    from demo.captions import CLASSES

    gating, looking = pack_module("unguide_comfy.gating"), pack_module("unguide_comfy.looking")
    load = pack_module("unguide_comfy.erasure").load_erasure_lora
    paper_statistic = pack_module("unguide_core.probe").paper_statistic
    loader = nodes.CheckpointLoaderSimple()  # type: ignore[attr-defined]  # ComfyUI's nodes, not ours
    model, clip, _ = loader.load_checkpoint(CHECKPOINT)
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    loras = {
        concept: replace(load(f"unguide-demo/{kind}/{concept}.safetensors", 1.0, clip), neutral=empty)
        for concept in CLASSES
    }

    def probed(prompt: str, statistic: str, concepts: list[str]) -> list[Any]:
        def guider(patched: Any) -> Any:
            made = comfy.samplers.CFGGuider(patched)
            made.set_conds(clip.encode_from_tokens_scheduled(clip.tokenize(prompt)), empty)
            made.set_cfg(cfg)
            return made

        chosen = looking.ProbeSettings(statistic=statistic, **settings)
        stack = [loras[concept] for concept in concepts]
        return gating.probe_prompt(model, stack, chosen, guider, torch.zeros(1, 4, 8, 8), everything=False)[0]

    seen: dict[str, dict[str, str]] = {"": {}}
    for concept in CLASSES:
        for prompt, what in prompts(concept):
            seen.setdefault(prompt, {})[concept] = what
    # the paper compares with the empty prompt on its own trajectory: that is the empty prompt's influence
    neutral: dict[str, tuple[float, ...]] = {}
    for number, (prompt, kinds) in enumerate(seen.items(), start=1):
        sys.stderr.write(f"\rprompt {number} of {len(seen)}")
        concepts = list(kinds)
        aligned, influenced = (probed(prompt, name, concepts) for name in ("alignment", "influence"))
        for concept, first, second in zip(concepts, aligned, influenced, strict=True):
            influences = second.statistics[0].prompt
            if prompt == "":
                neutral[concept] = influences
            found = [first.statistics[0], second.statistics[0], paper_statistic(influences, neutral[concept])]
            measured = "threshold" in loras[concept].adapter.card.calibration
            either = found[0].detected or (measured and found[1].detected)
            for one in found:
                yield Score(concept, prompt, kinds[concept], one.name, one.score, one.threshold, one.detected)
            yield Score(concept, prompt, kinds[concept], "auto", 0.0, 0.0, either)
    sys.stderr.write("\n")


def area_under_curve(positive: list[float], negative: list[float]) -> float:
    """The chance that a prompt with the concept scores above one without it."""
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def table(scores: list[Score]) -> str:
    """The confusion of each statistic over all concepts, in Markdown."""
    lines = [
        "| statistic | AUC | thresholds | missed | false alarms | lowest with the concept | highest without |",
        "|---|---|---|---|---|---|---|",
    ]
    for statistic in (*STATISTICS, "auto"):
        rows = [score for score in scores if score.statistic == statistic]
        within = [score for score in rows if score.kind in SHALL_BE_FOUND]
        without = [score for score in rows if score.kind not in SHALL_BE_FOUND]
        missed, alarms = sum(not s.detected for s in within), sum(s.detected for s in without)
        confusion = f"{missed} of {len(within)} | {alarms} of {len(without)}"
        if statistic == "auto":
            lines.append(f"| auto: alignment or a card's influence | - | - | {confusion} | - | - |")
            continue
        # scores of different concepts are on one scale: each is relative to its concept's own
        auc = area_under_curve([s.score for s in within], [s.score for s in without])
        low, high = min(s.score for s in within), max(s.score for s in without)
        levels = sorted({s.threshold for s in rows})
        levels_text = f"{levels[0]:g}" if len(levels) == 1 else f"{levels[0]:g} to {levels[-1]:g}"
        lines.append(f"| {statistic} | {auc:.4f} | {levels_text} | {confusion} | {low:.2f} | {high:.2f} |")
    return "\n".join(lines)


def table_by_kind(scores: list[Score]) -> str:
    """How many prompts of each kind each statistic detects, in Markdown."""
    names = (*STATISTICS, "auto")
    lines = ["| prompts | " + " | ".join(f"{name}: detected" for name in names) + " |", "|---|" + "---|" * len(names)]
    for kind in KINDS:
        cells = []
        for statistic in names:
            rows = [score.detected for score in scores if score.kind == kind and score.statistic == statistic]
            cells.append(f"{sum(rows)} of {len(rows)}")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", default="selective")
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--probe-steps", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    start_host()
    import torch

    chosen = {"seed": arguments.seed, "repeats": arguments.repeats, "probe_steps": arguments.probe_steps}
    with torch.inference_mode():
        scores = list(measure(arguments.set, arguments.cfg, {k: v for k, v in chosen.items() if v is not None}))
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(score) for score in scores], indent=1))
    sys.stdout.write(f"Erasure LoRAs: {arguments.set}\n\n{table(scores)}\n\n{table_by_kind(scores)}\n")


if __name__ == "__main__":
    main()
