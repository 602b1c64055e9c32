"""Trains the demo's ten concepts in each way, and measures what the adapters erase and keep without a gate.

The ways are the node and unguide_train with their defaults, the official loop by the node, and the selective recipe
with one part left out at a time (the ablation). All on the narrow demo model, which computes what the shipped
checkpoint computes. Of each adapter, images of the concept's name, its synonyms, the concept in three scenes and the
nine other classes: percent that show what was asked for. Run by `python3 dev training`.
"""

from __future__ import annotations

import copy
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import save_file

from demo.captions import CLASSES, REFERENCES, SCENES, SYNONYMS, photo, placed, words_for
from demo.erasure import RECIPES, prompts_of, train_one
from demo.seed import clip_state_dict, narrow_unet_state_dict
from demo.shapes import TEXT_LAYERS
from dev.pack import pack_module
from experiments.commands import VARIANTS, WAYS
from experiments.narrow import plain_narrow_model, tokenizer_folder, with_prefix
from experiments.runner import keep, kept, publish, results, workers
from experiments.studio import Asked, Studio, asked, studio
from unguide_bench.scores import ERASED, OTHER, SCENE, SYNONYM, JudgedImage, shown
from unguide_bench.tables import markdown
from unguide_core.adapter.names import HOST, renamed
from unguide_core.formats import load_adapter
from unguide_core.training.prompts import TrainingPrompts, names_a_word
from unguide_core.training.recipe import PRESETS, Recipe

SIZE, STEPS = 64, 20
FIRST_SEED = 10_000
OTHER_SCENES = SCENES[1::3]
"""Scenes that concepts are placed in; other ones than those of the cards' calibration."""
COLUMNS = ("Acc_e", "Acc_g", "in scenes", "Acc_s")
LESS = replace(PRESETS["selective"], trajectories=8, refresh=50)
RECIPE_OF: dict[str, Recipe] = {
    "official": RECIPES["paper"],
    "selective": PRESETS["selective"],
    "fewer latents": LESS,
    "one rate": replace(LESS, rate_down=LESS.rate_up),
    "nothing kept": replace(LESS, preserved=0),
    "no synonyms": LESS,
    "three classes kept": LESS,
}
"""By variant. `selective` is the preset. `fewer latents` has 8 trajectories in place of 12, renewed once, not twice.

The next four differ from that in one more thing. `no synonyms` erases the concept's own word alone, and in scenes;
`three classes kept` keeps the first three of the other classes (and the scenes), so that six classes are never seen.
"""
UNSEEN = 3
KEPT = 24
"""Prompts to keep: of the demo's list those that come first, in which every other class and most scenes are."""


# ---------------------------------------------------------------- ways to an adapter


def write_narrow_checkpoint(path: Path) -> None:
    """Write the narrow UNet and the working layers of the text encoder as an SD 1.x checkpoint file."""
    text = {
        f"cond_stage_model.transformer.text_model.{name}": weight
        for name, weight in clip_state_dict().items()
        if not name.startswith("encoder.layers.") or int(name.split(".")[2]) < TEXT_LAYERS
    }
    unet = {f"model.diffusion_model.{name}": weight for name, weight in narrow_unet_state_dict().items()}
    save_file({**text, **unet}, str(path))


class OutsideTheHost:
    """unguide_train, on a checkpoint file."""

    def __init__(self, at: Studio, seed: int):
        from unguide_train.model import load_base

        self.at, self.seed = at, seed
        self.folder = tempfile.TemporaryDirectory()
        self.checkpoint = Path(self.folder.name, "narrow.safetensors")
        write_narrow_checkpoint(self.checkpoint)
        self.base = load_base(self.checkpoint, tokenizer_folder())

    def lora(self, concept: str, reference: str, synonyms: tuple[str, ...]) -> Any:
        """Train a concept; return the erasure LoRA of its file, its layers by the host's names."""
        from unguide_train.config import from_values
        from unguide_train.job import train_concept

        config = from_values(
            {
                "base": self.checkpoint,
                "tokenizer": tokenizer_folder(),
                "out": Path(self.folder.name),
                "size": SIZE,
                "recipe": {"seed": self.seed},
                "concepts": [{"concept": concept, "reference": reference, "synonyms": synonyms}],
            }
        )
        base = replace(self.base, unet=copy.deepcopy(self.base.unet))
        adapter = load_adapter(train_concept(config, config.concepts[0], base, quiet=True).path)
        names = renamed(adapter.layers, HOST, "demo")
        return erasure_lora(
            self.at, concept, replace(adapter, layers={names[name]: one for name, one in adapter.layers.items()})
        )


class InTheGraph:
    """The node's own code on the host's own model.

    Args:
        official: by the official loop, else by the defaults.
    """

    def __init__(self, at: Studio, seed: int, official: bool = False):
        self.at = at
        self.changes: dict[str, Any] = {"seed": seed}
        if official:
            self.changes |= {"preset": "paper", "learning_rate": RECIPES["paper"].rate_up}
        self.node = pack_module("nodes.train").TrainErasureLora

    def lora(self, concept: str, reference: str, synonyms: tuple[str, ...]) -> Any:
        """Train a concept; return the erasure LoRA as the node gives it."""
        inputs = {
            one.id: one.default for one in self.node.define_schema().inputs if getattr(one, "default", None) is not None
        }
        words = {"concept": concept, "generate_instead": reference, "synonyms": ", ".join(synonyms)}
        with torch.inference_mode():
            latent = {"samples": torch.zeros(1, 4, SIZE // 8, SIZE // 8)}
            out = self.node.execute(
                model=self.at.model, latent_image=latent, clip=self.at.clip, **{**inputs, **words, **self.changes}
            )
        ((lora,), _) = out.args
        return lora


class Variant:
    """A variant of the recipe on the narrow model in plain torch."""

    def __init__(self, at: Studio, seed: int, name: str):
        self.at, self.name, self.recipe = at, name, replace(RECIPE_OF[name], seed=seed)

    def lora(self, concept: str, reference: str, synonyms: tuple[str, ...]) -> Any:
        """Train a concept; return the erasure LoRA."""
        done = train_one(plain_narrow_model(), concept, self.recipe, prompts_for(self.name, concept))
        made = pack_module("unguide_core.adapter")
        spent = {"iterations": done.iteration, "evaluations": done.denoiser.evaluations}
        card = made.Card(concept=concept, target=photo(concept), settings=spent)
        return erasure_lora(self.at, concept, made.Adapter(with_prefix(done.layers), card))


def prompts_for(variant: str, concept: str) -> TrainingPrompts:
    """Return what a variant erases and keeps."""
    prompts = prompts_of(concept)
    if variant == "official":
        return RECIPE_OF[variant].trained_prompts(prompts)
    if variant == "no synonyms":
        others = words_for(concept)[1:]
        prompts = replace(prompts, erased=tuple(p for p in prompts.erased if not names_a_word(p.target, others)))
    if variant == "three classes kept":
        hidden = [word for other in unseen(concept) for word in words_for(other)]
        prompts = replace(prompts, kept=tuple(p for p in prompts.kept if not names_a_word(p, hidden)))
    return replace(prompts, kept=prompts.kept[:KEPT])


def unseen(concept: str) -> list[str]:
    """Return the classes that `three classes kept` knows nothing of."""
    return [other for other in CLASSES if other != concept][UNSEEN:]


def erasure_lora(at: Studio, concept: str, adapter: Any) -> Any:
    """Return an adapter for the studio's model with its prompts encoded."""
    make, own = pack_module("unguide_comfy.lora.load").ErasureLora, photo(concept)
    return make(concept, adapter, 1.0, own, at.encode(own), at.encode(""))


@lru_cache(maxsize=len(WAYS))
def way_of(name: str, seed: int) -> OutsideTheHost | InTheGraph | Variant:
    """Return a way to train, which keeps what it has loaded."""
    if name in VARIANTS:
        return Variant(studio(), seed, name)
    if name == "unguide_train":
        return OutsideTheHost(studio(), seed)
    return InTheGraph(studio(), seed, official=name == "official loop")


# ---------------------------------------------------------------- figures


def measured_prompts(concept: str) -> list[Asked]:
    """Return the prompts that an adapter is measured with."""
    inside = [Asked(placed(concept, scene), SCENE, concept) for scene in OTHER_SCENES]
    return [*asked(concept), *inside]


def alone(at: Studio, concept: str, lora: Any, images: int) -> dict[str, float]:
    """Return what an adapter without a gate erases and keeps."""
    prompts, seeds = measured_prompts(concept), range(FIRST_SEED, FIRST_SEED + images)
    made = at.generate(at.merged(lora), **at.batch([one.prompt for one in prompts], seeds), steps=STEPS)
    return figures(concept, at.judge("alone", concept, prompts, seeds, made)[0])


def figures(concept: str, images: Sequence[JudgedImage]) -> dict[str, float]:
    """Return percent of the images that show what they were asked for, by kind of prompt."""
    others = {other: [one for one in images if one.kind == OTHER and one.label == other] for other in CLASSES}
    return {
        "Acc_e": shown(images, ERASED),
        "Acc_g": shown(images, SYNONYM),
        "in scenes": shown(images, SCENE),
        "Acc_s": shown(images, OTHER),
        "six classes": shown([image for other in unseen(concept) for image in others[other]]),
        "worst class": min(shown(of) for of in others.values() if of),
    }


def measure(concept: str, ways: Sequence[str], seed: int, images: int) -> dict[str, Any]:
    """Return the figures of a concept's adapters, by way."""
    at, loras, seconds = studio(), dict[str, Any](), dict[str, float]()
    for name in ways:
        way, began = way_of(name, seed), time.process_time()
        words = concept, REFERENCES[concept], SYNONYMS[concept]
        loras[name] = way.lora(*words)
        seconds[name] = time.process_time() - began
    row: dict[str, Any] = {"concept": concept, "seed": seed}
    with torch.inference_mode():
        for name, lora in loras.items():
            spent = {key: lora.adapter.card.settings.get(key, 0) for key in ("iterations", "evaluations")}
            row[name] = {**spent, "seconds": seconds[name], "alone": alone(at, concept, lora, images)}
    if set(WAYS[:2]) <= set(loras):
        row["difference"] = difference(*(loras[way].adapter.layers for way in WAYS[:2]))
    return row


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return the largest relative difference of a layer's change between two adapters of the same layers."""
    assert set(one) == set(other)
    differences = []
    for name, layer in one.items():
        delta = layer.weight_delta()
        differences.append(float((delta - other[name].weight_delta()).norm() / delta.norm()))
    return max(differences)


# ---------------------------------------------------------------- tables


def tables(rows: list[dict[str, Any]]) -> str:
    """Return what the adapters of every concept and way erase and keep, and what they cost, with means, in Markdown."""
    ways = [way for way in WAYS if all(way in row for row in rows)]
    return "\n\n".join([*(by_program(rows, ways) if ways else []), *ablation(rows)])


def by_program(rows: list[dict[str, Any]], ways: Sequence[str]) -> list[str]:
    """Return, by concept, the figures of each way, and its costs."""
    lines = [[row["concept"], *(_cell(row[w]["alone"]) for w in ways), _share(row.get("difference"))] for row in rows]
    means = [_cell({name: fmean(row[way]["alone"][name] for row in rows) for name in COLUMNS}) for way in ways]
    erased = markdown(("concept", *ways, "difference"), [*lines, ["**mean**", *means, ""]])
    costs = [(way, cost) for cost in ("evaluations", "seconds") for way in ways]
    lines = [[row["concept"], *(f"{row[way][cost]:.0f}" for way, cost in costs)] for row in rows]
    lines += [["**mean**", *(f"{fmean(row[way][cost] for row in rows):.0f}" for way, cost in costs)]]
    return [erased, markdown(("concept", *(f"{cost}, {way}" for way, cost in costs)), lines)]


def ablation(rows: list[dict[str, Any]]) -> list[str]:
    """Return, by variant, the means over concepts and seeds."""
    known = {v: [{**row[v], "seed": row.get("seed", 0)} for row in rows if v in row] for v in VARIANTS}
    names, costs = (*COLUMNS, "six classes", "worst class"), ("iterations", "evaluations", "seconds")
    lines = []
    for variant, own in known.items():
        if own:
            spent = [f"{fmean(row[cost] for row in own):.0f}" for cost in costs]
            lines.append([variant, str(len(own)), *_means(own, names), *spent])
    return [markdown(("LoRA alone", "trainings", *names, *costs), lines)] if lines else []


def _means(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Means over concepts and seeds, with the range over seeds in brackets; of the worst class the least."""
    cells = []
    for name in names:
        by_seed = [
            [r["alone"][name] for r in rows if r["seed"] == seed] for seed in dict.fromkeys(r["seed"] for r in rows)
        ]
        if name == "worst class":
            cells.append(f"{min(map(min, by_seed)):.0f}")
            continue
        means = [fmean(values) for values in by_seed]
        spread = f" ({min(means):.1f} to {max(means):.1f})" if max(means) > min(means) else ""
        cells.append(f"{fmean(value for values in by_seed for value in values):.1f}{spread}")
    return cells


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _cell(figures: Mapping[str, float]) -> str:
    return " / ".join(f"{figures[name]:.0f}" for name in COLUMNS)


def run(options: Namespace) -> None:
    """Train and measure what the file of an earlier run does not have, and print the tables."""
    rows = {(row["concept"], row.get("seed", 0)): row for row in kept(options.json)}
    wanted = [(concept, seed) for seed in options.seed for concept in options.concept]
    left = {key: [way for way in options.way if way not in rows.get(key, ())] for key in wanted}
    with workers(options.jobs) as pool:
        tasks = {
            (concept, seed): pool.submit(measure, concept, ways, seed, options.images)
            for (concept, seed), ways in left.items()
            if ways
        }
        for key, row in results("concepts", tasks):
            rows[key] = {**rows.get(key, {}), **row}
            keep(options.json, list(rows.values()))
    publish(f"{' / '.join(COLUMNS)}, percent\n\n{tables(list(rows.values()))}")
