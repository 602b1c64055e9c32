"""Trains an erasure LoRA for each of the demo model's ten classes, in two sets.

    python -m demo.erasure --tokenizer ComfyUI/comfy/sd1_tokenizer [--set selective] [--concept cat dog]

`paper` is the official recipe (arXiv 2508.05755) with a learning rate that this small model needs. `selective` adds
what made adapters leave other prompts alone: a larger learning rate for `down`, a preservation term, the concept's
synonyms, alone and in scenes, as targets. Both train on the narrow UNet and are saved for the wide one, which computes
the same: its channels are five copies of the narrow one's, and so are the rows of `up`. `python3 dev benchmark`
measures them.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from unguide_core.adapter import Adapter, Card, LowRank
from unguide_core.formats import load_adapter, save_adapter
from unguide_core.training.prompts import Pair, TrainingPrompts
from unguide_core.training.recipe import PRESETS, Recipe
from unguide_core.training.trainer import Training, fresh_layers

from .captions import CLASSES, REFERENCES, SCENES, SYNONYMS, photo, placed, words_for
from .narrow import (
    LATENT,
    Layers,
    Narrow,
    adapted_table,
    load_narrow,
    start_worker,
    worker_model,
)
from .seed import COPIES, LICENCE, SEED_PATH, widen_lora
from .unet import CONTEXT_DIM

log = logging.getLogger("demo.erasure")

LORAS = Path(__file__).parent / "loras"
SETS = ("paper", "selective")
PREFIX = "diffusion_model."

EMPTY_REPEATS = 9
"""How often more than another prompt to keep the empty one is: it is half of every guided prediction."""


RECIPES: dict[str, Recipe] = {
    "paper": replace(PRESETS["paper"], rate_down=3e-4, rate_up=3e-4),
    "selective": replace(
        PRESETS["selective"],
        iterations=200,
        schedule_steps=20,
        batch=8,
        preserved=16,
        trajectories=8,
        refresh=20,
        kept_trajectories=160,
        check=0,
    ),
}
"""How the shipped sets were trained: of the official preset only the learning rate is another, for this model is small;
the selective one spends more than its preset."""


# ---------------------------------------------------------------- training


class Learner:
    """The narrow model with an adapter in training, as `unguide_core.training` wants it.

    Args:
        layers: trainable, by module path.
        prompts: all that will be asked for.
    """

    def __init__(self, narrow: Narrow, layers: Layers, prompts: TrainingPrompts) -> None:
        self.narrow, self.layers = narrow, layers
        self.rows = {name: row for row, name in enumerate(prompts.names)}
        self.states = narrow.encode(prompts.names)
        self.table = narrow.table(self.states)
        self.adapting = False

    def __call__(self, z: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns the predicted noise of each row."""
        names = list(dict.fromkeys(prompts))
        used = torch.tensor([self.rows[name] for name in names])
        table = {name: values[used] for name, values in self.table.items()}
        if self.adapting:
            table = adapted_table(table, self.states[used], self.layers)
        return self.narrow.eps(z, timesteps, table, torch.tensor([names.index(name) for name in prompts]))

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Within the block the adapter acts."""
        before, self.adapting = self.adapting, True
        try:
            yield
        finally:
            self.adapting = before


def prompts_of(concept: str) -> TrainingPrompts:
    """Returns what is erased and kept of a concept: its words, alone and in scenes; all else that the model knows."""
    words = words_for(concept)
    alone = [Pair(photo(word), photo(REFERENCES[concept])) for word in words]
    inside = [Pair(placed(word, scene), photo(scene)) for word in words for scene in SCENES]
    others = [other for other in CLASSES if other != concept]
    names = [photo(word) for other in others for word in words_for(other)]
    scenes = [photo(scene) for scene in SCENES]
    kept = [*[""] * EMPTY_REPEATS, "a photo of the", *scenes, *names, *(placed(c, s) for c in others for s in SCENES)]
    mixed = [kept[i] for i in torch.randperm(len(kept), generator=torch.Generator().manual_seed(0)).tolist()]
    return TrainingPrompts((*alone, *inside), tuple(mixed))


def train_one(narrow: Narrow, concept: str, recipe: Recipe, prompts: TrainingPrompts | None = None) -> Training:
    """Returns the finished training of a concept's adapter; `layers` holds it.

    Args:
        prompts: what is erased and kept; None takes `prompts_of` the concept.
    """
    recipe = replace(recipe, seed=1000 * recipe.seed + CLASSES.index(concept))
    prompts = prompts or prompts_of(concept)
    layers = fresh_layers({name: (CONTEXT_DIM, layer.out_features) for name, layer in narrow.layers.items()}, recipe)
    training = Training(Learner(narrow, layers, prompts), layers, prompts, recipe, LATENT)
    began = time.monotonic()
    for at in training.run():
        if at.iteration % 20 == 0 or at.iteration == at.iterations:
            what = f"held out {at.held_out:.3f}" if at.held_out is not None else f"loss {at.loss:.4f}"
            seconds = time.monotonic() - began
            log.info(
                "%s: %d of %d, %s, %d evaluations, %.0f s",
                concept,
                at.iteration,
                at.iterations,
                what,
                at.evaluations,
                seconds,
            )
    return training


# ---------------------------------------------------------------- files


def path_of(folder: Path, objective: str, concept: str) -> Path:
    """Returns where an erasure LoRA is kept."""
    return folder / objective / f"{concept}.safetensors"


def widened(layers: Layers) -> dict[str, LowRank]:
    """Returns the same adapter for the wide UNet as ComfyUI names its layers, in half precision.

    The wide UNet's channels are copies of the narrow one's, so each row of `up` is repeated; `down` reads the text.
    """
    return {
        PREFIX + name: LowRank(layer.down.detach().half(), widen_lora(layer.up.detach().half()), layer.scale)
        for name, layer in layers.items()
    }


def narrowed(adapter: Adapter) -> dict[str, LowRank]:
    """Returns a saved adapter's layers for the narrow UNet: the inverse of `widened`."""
    return {
        name.removeprefix(PREFIX): LowRank(layer.down.float(), layer.up[::COPIES].float(), layer.scale)
        for name, layer in adapter.layers.items()
    }


def card_of(narrow: Narrow, concept: str, objective: str, recipe: Recipe) -> Card:
    """Returns what is known of a trained adapter."""
    return Card(
        concept=concept,
        synonyms=SYNONYMS[concept],
        target=photo(concept),
        reference=photo(REFERENCES[concept]),
        objective=objective,
        base_model="UnGuide demo model",
        base_hash=narrow.base_hash,
        rank=recipe.rank,
        alpha=recipe.alpha,
        source_format="generic",
        settings=recipe.to_settings(),
        author="UnGuide for ComfyUI",
        licence=LICENCE,
    )


def store(narrow: Narrow, folder: Path, concept: str, objective: str, layers: Layers) -> None:
    """Writes an erasure LoRA with its card. `python3 dev calibrate` adds the calibration, in the host."""
    path = path_of(folder, objective, concept)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(Adapter(widened(layers), card_of(narrow, concept, objective, RECIPES[objective])), path)


def is_finished(narrow: Narrow, folder: Path, concept: str, objective: str) -> bool:
    """Returns whether the file is there, for this model and this recipe."""
    path = path_of(folder, objective, concept)
    if not path.exists():
        return False
    card = load_adapter(path).card
    settings = {name: value for name, value in RECIPES[objective].to_settings().items() if name in card.settings}
    return card.base_hash == narrow.base_hash and dict(card.settings) == settings


# ---------------------------------------------------------------- command line


def run_task(folder: Path, objective: str, concept: str) -> None:
    """Trains and writes the erasure LoRA of a concept."""
    narrow = worker_model()
    store(narrow, folder, concept, objective, train_one(narrow, concept, RECIPES[objective]).layers)


def train(options: argparse.Namespace) -> None:
    """Trains what is missing of the sets and concepts asked for, one process a core."""
    narrow = load_narrow(options.tokenizer, options.model)
    began = time.monotonic()
    worker = (options.tokenizer, options.model)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), start_worker, worker) as pool:
        tasks = []
        for objective in options.set:
            done = [c for c in options.concept if not options.force and is_finished(narrow, options.out, c, objective)]
            if done:
                log.info("%s: already there: %s", objective, ", ".join(done))
            missing = [concept for concept in options.concept if concept not in done]
            tasks += [pool.submit(run_task, options.out, objective, concept) for concept in missing]
        for task in tasks:
            task.result()
    log.info("trained in %.0f s", time.monotonic() - began)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="python -m demo.erasure", description="Train what is missing of the sets.")
    parser.add_argument("--tokenizer", type=Path, required=True, help="ComfyUI's folder comfy/sd1_tokenizer")
    parser.add_argument(
        "--model", type=Path, default=SEED_PATH, help="the packed demo model (default: the shipped one)"
    )
    parser.add_argument("--out", type=Path, default=LORAS, help="folder of the sets (default: demo/loras)")
    parser.add_argument("--set", nargs="+", choices=SETS, default=SETS, help="default: both")
    parser.add_argument("--concept", nargs="+", choices=CLASSES, default=CLASSES, help="default: all ten")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one core each (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="train what is there, too")
    return parser.parse_args(arguments)


def main() -> None:
    """Trains."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    train(parse())


if __name__ == "__main__":
    main()
