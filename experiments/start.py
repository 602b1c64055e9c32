"""Closed form as a start for training: how many model evaluations it saves. Run by `python3 dev instant --start`.

The preset trains the demo's narrow model from scratch and from closed-form layers, on the same latents and prompts. The
held-out loss is relative to an adapter that changes nothing; images are judged as by `python3 dev training`.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from demo.captions import REFERENCES, SYNONYMS
from demo.erasure import Learner
from demo.narrow import LATENT
from experiments.narrow import plain_narrow_model, with_prefix
from experiments.runner import keep, publish, results, workers
from experiments.studio import asked_in_scenes, studio
from experiments.training import COLUMNS, FIRST_SEED, alone, erasure_lora
from unguide_bench.scores import percent
from unguide_bench.tables import markdown
from unguide_core.adapter import Adapter, LowRank
from unguide_core.closed_form import ClosedForm
from unguide_core.text_edit import Kept, TextLayers, edit_text
from unguide_core.training.prompts import prompts_for
from unguide_core.training.recipe import PRESETS
from unguide_core.training.trainer import Training, fresh_layers
from unguide_core.vocabulary import Edit, kept_prompts

CONCEPTS = ("cat", "airplane", "horse")
CHECK = 20
STARTS = {"from scratch": None, "closed form, eta 0": 0.0, "closed form, eta 1": 1.0}
SCENE_KEPT = "scene kept"
SHOWN = (*COLUMNS, SCENE_KEPT)
STOPS = (20, 60, 100)
"""Iterations after which images are judged; the preset's are the last."""


def measured_starts(concept: str, images: int) -> list[dict[str, Any]]:
    """Return the held-out losses by evaluations, and what images show, for each way to start."""
    rows = []
    for name, eta in STARTS.items():
        training = started(concept, eta)
        row: dict[str, Any] = {"concept": concept, "start": name, "held_out": [], "images": {}}
        if eta is not None:
            row["images"]["0"] = shown(concept, training.layers, images)
        for progress in training.run():
            if progress.iteration % CHECK == 0:
                row["held_out"].append((progress.iteration, progress.evaluations, training.held_out[-1]))
            if progress.iteration in STOPS:
                row["images"][str(progress.iteration)] = shown(concept, training.layers, images)
        rows.append(row)
    return rows


@torch.inference_mode()
def shown(concept: str, layers: Any, images: int) -> dict[str, float]:
    """Return what images by an adapter alone show, in percent."""
    at, scenes, seeds = studio(), asked_in_scenes(concept), range(FIRST_SEED, FIRST_SEED + images)
    lora = erasure_lora(at, concept, Adapter(with_prefix(layers)))
    batch = at.batch([one.prompt for one in scenes], seeds)
    base = at.generate(at.model, **batch).latents
    made = at.generate(at.merged(lora), **batch)
    judged, _ = at.judge("", concept, scenes, seeds, made, (base, at.images(base)))
    kept = percent([one.scene_kept for one in judged if one.scene_kept is not None])
    return {**alone(at, concept, lora, images), SCENE_KEPT: kept}


def started(concept: str, eta: float | None) -> Any:
    """Return the preset's training of a concept, from closed-form layers unless `eta` is None."""
    narrow = plain_narrow_model()
    prompts = prompts_for(concept, REFERENCES[concept], SYNONYMS[concept])
    recipe = replace(PRESETS["selective"], check=CHECK, patience=100)
    features = {name: (layer.in_features, layer.out_features) for name, layer in narrow.layers.items()}
    layers = fresh_layers(features, recipe) if eta is None else closed_layers(concept, recipe, eta)
    return Training(Learner(narrow, layers, prompts), layers, prompts, recipe, LATENT, fresh=eta is None)


def closed_layers(concept: str, recipe: Any, eta: float) -> Any:
    """Return closed-form layers of at most the recipe's rank, with its scale, `down` as large as a fresh one's."""
    narrow = plain_narrow_model()

    def encode(prompt: str) -> tuple[Any, None]:
        return narrow.encode([prompt])[0], None

    edit = Edit(concept, REFERENCES[concept], SYNONYMS[concept])
    kept = Kept.of(kept_prompts(edit.words), encode)
    weights = TextLayers({name: layer.weight for name, layer in narrow.layers.items()}, {})
    found = edit_text([edit], kept, weights, encode, ClosedForm(rank=recipe.rank, eta=eta)).layers
    scale = recipe.alpha / recipe.rank
    made = {}
    for name, layer in found.items():
        size = (layer.down.shape[1] / recipe.rank) ** 0.5
        down, up = (layer.down * size).clone(), (layer.up / (size * scale)).clone()
        made[name] = LowRank(down.requires_grad_(), up.requires_grad_(), scale)
    return made


def table(rows: list[dict[str, Any]]) -> str:
    """Return held-out losses by concept, and images, means over concepts, in Markdown."""
    lines = []
    for name in dict.fromkeys(row["start"] for row in rows):
        mine = [row for row in rows if row["start"] == name]
        if first := [row["images"]["0"] for row in mine if "0" in row["images"]]:
            lines.append((name, "0", "0", "", _means(first)))
        for i, (iteration, evaluations, _) in enumerate(mine[0]["held_out"]):
            losses = " / ".join(f"{row['held_out'][i][2]:.2f}" for row in mine)
            images = [row["images"].get(str(iteration)) for row in mine]
            lines.append((name, str(iteration), str(evaluations), losses, _means(images)))
    return markdown(("start", "iterations", "evaluations", "held-out loss", " / ".join(SHOWN)), lines)


def _means(images: list[Any]) -> str:
    if None in images:
        return ""
    return " / ".join(f"{fmean(one[name] for one in images):.0f}" for name in SHOWN)


def run(options: Namespace) -> None:
    """Measure closed form as a start for training, and print its table."""
    with workers(options.jobs) as pool:
        tasks = {concept: pool.submit(measured_starts, concept, options.seeds) for concept in CONCEPTS}
        rows: list[dict[str, Any]] = []
        for _, found in results("concepts", tasks):
            rows = sorted([*rows, *found], key=lambda row: CONCEPTS.index(row["concept"]))
            keep(options.json, rows)
    said = f"Concepts: {', '.join(CONCEPTS)}; {options.seeds} images per prompt."
    publish(f"{said}\n\n{table(rows)}", options.markdown, "start")
