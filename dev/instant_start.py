"""Closed form as a start for training: how many model evaluations it saves. Run by `python3 dev instant --start`.

The preset trains the demo's narrow model from scratch and from closed-form layers, on the same latents and prompts. The
held-out loss is relative to an adapter that changes nothing; images are judged as by `demo.ablation`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from demo.captions import REFERENCES, SYNONYMS

CONCEPTS = ("cat", "airplane", "horse")
CHECK = 10
STARTS = {"from scratch": None, "closed form, eta 0": 0.0, "closed form, eta 1": 1.0}
STOPS = (10, 100)
"""Iterations after which images are judged; the preset's are the last."""


def measured_starts(concept: str, images: int) -> list[dict[str, Any]]:
    """Return the held-out losses by evaluations, and what images show, for each way to start."""
    from unguide_core.adapter.lowrank import LowRank

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
                layers = {n: LowRank(x.down.detach(), x.up.detach(), x.scale) for n, x in training.layers.items()}
                row["images"][str(progress.iteration)] = shown(concept, layers, images)
        rows.append(row)
    return rows


def shown(concept: str, layers: Any, images: int) -> dict[str, float]:
    """Return what images by an adapter alone show, in percent."""
    from demo.ablation import figures
    from demo.evaluate import accuracies, judge, other_prompts, own_prompts
    from demo.narrow import worker_model

    prompts = own_prompts(concept) | other_prompts(concept)
    return figures(concept, accuracies(worker_model(), judge, prompts, images, layers=layers))


def started(concept: str, eta: float | None) -> Any:
    """Return the preset's training of a concept, from closed-form layers unless `eta` is None."""
    from demo.erasure import Learner
    from demo.narrow import LATENT, worker_model
    from unguide_core.training.prompts import prompts_for
    from unguide_core.training.recipe import PRESETS
    from unguide_core.training.trainer import Training, fresh_layers

    narrow = worker_model()
    prompts = prompts_for(concept, REFERENCES[concept], SYNONYMS[concept])
    recipe = replace(PRESETS["selective"], check=CHECK, patience=100)
    features = {name: (layer.in_features, layer.out_features) for name, layer in narrow.layers.items()}
    layers = fresh_layers(features, recipe) if eta is None else closed_layers(concept, recipe, eta)
    return Training(Learner(narrow, layers, prompts), layers, prompts, recipe, LATENT, fresh=eta is None)


def closed_layers(concept: str, recipe: Any, eta: float) -> Any:
    """Return closed-form layers with the recipe's rank and scale, `down` as large as a fresh one's."""
    from demo.narrow import worker_model
    from unguide_core.adapter.lowrank import LowRank
    from unguide_core.closed_form import ClosedForm
    from unguide_core.text_edit import Kept, TextLayers, edit_text
    from unguide_core.vocabulary import Edit, kept_prompts

    narrow = worker_model()

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
    """Return a table of held-out losses and a table of images, means over concepts, in Markdown."""
    lines = [
        "| start | iterations | evaluations | held-out loss | Acc_e / Acc_g / in scenes / Acc_s |",
        "|---" * 5 + "|",
    ]
    for name in dict.fromkeys(row["start"] for row in rows):
        mine = [row for row in rows if row["start"] == name]
        for i, (iteration, evaluations, _) in enumerate(mine[0]["held_out"]):
            losses = " / ".join(f"{row['held_out'][i][2]:.2f}" for row in mine)
            images = [row["images"].get(str(iteration)) for row in mine]
            lines.append(f"| {name} | {iteration} | {evaluations} | {losses} | {_means(images)} |")
        if first := [row["images"]["0"] for row in mine if "0" in row["images"]]:
            lines.append(f"| {name} | 0 | 0 | | {_means(first)} |")
    return "\n".join(lines)


def _means(images: list[Any]) -> str:
    if None in images:
        return ""
    columns = ("Acc_e", "Acc_g", "in scenes", "Acc_s")
    return " / ".join(f"{sum(one[name] for one in images) / len(images):.0f}" for name in columns)
