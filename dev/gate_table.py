"""How well the gate tells an erased concept from everything else, measured in a real ComfyUI.

For each of the demo's ten erasure LoRAs: the concept's name, its synonyms and the concept in scenes shall be found; the
nine other classes, their synonyms, the scenes and the empty prompt shall not. All ten adapters are on the model at
once, in the mode `trajectory`, and decide for every picture of a batch by itself. Run by `python3 dev gate`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dev.narrow_host import load_narrow_model, narrow_lora
from dev.pack import pack_module, start_host

CHECKPOINT, CFG, STEPS = "unguide-demo.safetensors", 4.0, 30
STATISTICS = ("influence", "patch", "alignment", "paper")
PRODUCT = "the gate"
KINDS = ("name", "synonym", "in a scene", "other class", "other synonym", "scene", "empty")
SHALL_BE_FOUND = KINDS[:3]
# other scenes than those that the cards are calibrated in
SCENES_WITH_OBJECTS = ("forest", "snow")


@dataclass(frozen=True)
class Score:
    """One statistic of one picture under one concept's gate; `PRODUCT` is what the gate decides.

    Args:
        score, value: relative to what it is compared with, and before that.
    """

    concept: str
    prompt: str
    kind: str
    statistic: str
    score: float
    detected: bool
    value: float = 0.0


def with_the_papers_rule(scores: list[Score]) -> list[Score]:
    """The paper's statistic beside the others: each influence against the empty prompt's, a mean over its pictures."""
    influences = [score for score in scores if score.statistic == "influence"]
    found = list(scores)
    for concept in {score.concept for score in influences}:
        own = [score for score in influences if score.concept == concept]
        empty = [score.value for score in own if score.kind == "empty"]
        neutral = sum(empty) / len(empty)
        for score in own:
            ratio = score.value / neutral
            found.append(replace(score, statistic="paper", score=ratio, detected=ratio > 1.0))
    return found


class Demo:
    """The demo model at its narrow width (`dev.narrow_host`) with its ten erasure LoRAs."""

    def __init__(self, kind: str):
        import nodes
        from demo.captions import CLASSES

        self.nodes: Any = nodes
        self.gating, self.deciding = pack_module("unguide_comfy.gating"), pack_module("unguide_comfy.deciding")
        load = pack_module("unguide_comfy.erasure").load_erasure_lora
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
        """The latents after the first `steps` of the schedule, [batch, 4, 8, 8]."""
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


def prompts() -> dict[str, dict[str, str]]:
    """Every prompt, with its kind as seen from each concept."""
    from demo.captions import CLASSES, PLACES, SCENES, SYNONYMS, article

    def seen(owner: str, own: str, other: str) -> dict[str, str]:
        return {concept: own if concept == owner else other for concept in CLASSES}

    found: dict[str, dict[str, str]] = {}
    for name in CLASSES:
        found[f"a photo of the {name}"] = seen(name, "name", "other class")
        for synonym in SYNONYMS[name]:
            found[f"a photo of the {synonym}"] = seen(name, "synonym", "other synonym")
        for scene in SCENES_WITH_OBJECTS:
            found[f"{article(name)} {name} {PLACES[scene]}"] = {name: "in a scene"}
    for scene in SCENES[:6]:
        found[f"a photo of the {scene}"] = seen("", "", "scene")
    return {**found, "": seen("", "", "empty")}


def decisions(demo: Demo, pictures: int, seed: int, look_at: int, statistic: str) -> Iterator[Score]:
    """The statistics of every picture under every concept's gate: the deciding one, and those that cost no more."""
    asked = prompts()
    settings = demo.deciding.ProbeSettings(statistic=statistic, probe_steps=look_at, schedule_steps=STEPS)
    gate = demo.gating.Gate(settings=settings)
    reports: list[Any] = []
    model = demo.gating.guided(demo.model, list(demo.loras.values()), gate, observer=reports.append)
    started = time.perf_counter()
    for number, (prompt, kinds) in enumerate(asked.items(), start=1):
        demo.sample(model, prompt, pictures, seed, look_at + 2)
        for concept, outcome in zip(demo.loras, reports.pop().outcomes, strict=True):
            for decision in outcome.decisions if concept in kinds else ():
                yield Score(concept, prompt, kinds[concept], PRODUCT, decision.score, decision.detected)
                for one in decision.statistics:
                    yield Score(concept, prompt, kinds[concept], one.name, one.score, one.detected, one.prompt[0])
        left = (time.perf_counter() - started) * (len(asked) / number - 1)
        sys.stderr.write(f"\rprompt {number} of {len(asked)}, {left:.0f} s left ")
    sys.stderr.write("\n")


def area_under_curve(positive: list[float], negative: list[float]) -> float:
    """The chance that a picture with the concept scores above one without it."""
    import torch

    high, low = torch.tensor(positive), torch.tensor(negative).sort().values
    below = torch.searchsorted(low, high, right=False) + torch.searchsorted(low, high, right=True)
    return float(below.double().mean() / 2 / len(low))


def table(scores: list[Score]) -> str:
    """The confusion of each statistic over all concepts, in Markdown."""
    lines = [
        "| decided by | AUC | found by name or synonym | found in scenes | false alarms |",
        "|---|---|---|---|---|",
    ]
    for statistic in _known(scores):
        rows = [score for score in scores if score.statistic == statistic]
        words = [score.detected for score in rows if score.kind in ("name", "synonym")]
        placed = [score.detected for score in rows if score.kind == "in a scene"]
        within = [score.score for score in rows if score.kind in SHALL_BE_FOUND]
        without = [score for score in rows if score.kind not in SHALL_BE_FOUND]
        auc = f"{area_under_curve(within, [score.score for score in without]):.4f}"
        cells = [_share(words), _share(placed), _share([score.detected for score in without])]
        lines.append(f"| {statistic} | {'-' if statistic == PRODUCT else auc} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_by_kind(scores: list[Score]) -> str:
    """How many pictures of each kind each statistic takes for the concept, in Markdown."""
    names = _known(scores)
    lines = ["| prompts | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for kind in KINDS:
        found = {n: [s.detected for s in scores if s.kind == kind and s.statistic == n] for n in names}
        lines.append(f"| {kind} | " + " | ".join(_share(found[name]) for name in names) + " |")
    return "\n".join(lines)


def _known(scores: list[Score]) -> list[str]:
    known = {score.statistic for score in scores}
    return [name for name in (PRODUCT, *STATISTICS) if name in known]


def _share(found: list[bool]) -> str:
    return f"{sum(found)} of {len(found)} ({100 * sum(found) / max(1, len(found)):.1f} %)"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", default="selective", choices=("selective", "paper"))
    parser.add_argument("--statistic", default="auto", choices=("auto", "either", *STATISTICS), help="what decides")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=20, help="noises for each prompt")
    parser.add_argument("--look-at", type=int, default=3, help=f"step of {STEPS}")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    start_host()
    import torch

    torch.set_flush_denormal(True)
    with torch.inference_mode():
        demo = Demo(arguments.set)
        chosen = (arguments.pictures, arguments.seed, arguments.look_at)
        sys.stdout.write(f"Erasure LoRAs: {arguments.set}\n\n")
        scores = with_the_papers_rule(list(decisions(demo, *chosen, arguments.statistic)))
        sys.stdout.write(f"{table(scores)}\n\n{table_by_kind(scores)}\n")
        if arguments.json:
            arguments.json.write_text(json.dumps([vars(score) for score in scores], indent=1))


if __name__ == "__main__":
    main()
