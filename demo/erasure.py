"""Trains an erasure LoRA for each of the demo model's ten classes, in two sets, and measures them.

    python -m demo.erasure train --tokenizer ComfyUI/comfy/sd1_tokenizer [--set selective] [--concept cat dog]
    python -m demo.erasure evaluate --tokenizer ComfyUI/comfy/sd1_tokenizer
    python -m demo.erasure calibrate --tokenizer ComfyUI/comfy/sd1_tokenizer

`paper` is the official recipe (arXiv 2508.05755) with a learning rate that this small model needs. `selective` adds
what made adapters leave other prompts alone: a larger learning rate for `down`, a preservation term, the concept's
synonyms, alone and in scenes, as targets. Both train on the narrow UNet and are saved for the wide one, which computes
the same: its channels are five copies of the narrow one's, and so are the rows of `up`. `demo.evaluate` measures them.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from unguide_core.adapter import Adapter, Card, LowRank, initial_low_rank
from unguide_core.formats import load_adapter, save_adapter
from unguide_core.objective import erasure_loss, erasure_target, preservation_loss
from unguide_core.probe import influence
from unguide_core.trajectory import from_sigma_space, official_run, partial_denoise, sd_alphas_cumprod, to_sigma_space

from .captions import CLASSES, PLACES, SCENES, SYNONYMS, article, words_for
from .narrow import (
    GUIDANCE_SCALE,
    LATENT,
    SCHEDULE_STEPS,
    Layers,
    Narrow,
    Table,
    adapted_table,
    joined,
    load_narrow,
    normal_sigmas,
    start_worker,
    timestep_of,
    worker_model,
)
from .seed import COPIES, SEED_PATH, widen_lora
from .unet import CONTEXT_DIM

log = logging.getLogger("demo.erasure")

LORAS = Path(__file__).parent / "loras"
SETS = ("paper", "selective")
PREFIX = "diffusion_model."

REFERENCES: dict[str, str] = {
    "airplane": "street",
    "automobile": "beach",
    "bird": "desert",
    "cat": "forest",
    "deer": "sea",
    "dog": "field",
    "frog": "snow",
    "horse": "night",
    "ship": "ground",
    "truck": "sky",
}
"""The scene whose prediction takes the place of each class."""

PROBE_STEPS = 2
CALIBRATION_REPEATS, OTHERS_REPEATS = 16, 4
CALIBRATION_SCENES = SCENES[0::3]
"""Scenes in which objects are calibrated; the gate is measured in others."""

EMPTY_REPEATS = 9
"""How often more than another prompt to keep the empty one is: it is half of every guided prediction."""


def photo(word: str) -> str:
    """Returns the prompt that everything is trained and measured with."""
    return f"a photo of the {word}"


def placed(word: str, scene: str) -> str:
    """Returns the prompt of an object in a scene."""
    return f"{article(word)} {word} {PLACES[scene]}"


@dataclass(frozen=True)
class Recipe:
    """How an erasure LoRA is trained; kept in its card.

    Args:
        objective: the set's name.
        rate_down, rate_up: Adam's learning rates.
        guidance_scale: of the denoising that the latents come from, by the adapted model.
        negative_guidance: eta of `erasure_target`.
        batch: latents of target prompts in an iteration.
        preserved, preservation_weight: latents of prompts to keep in an iteration, and their loss's weight.
        refresh: iterations after which latents are denoised anew; 1 takes one random step of each, as the official code
            does, and more takes every step.
    """

    objective: str
    rate_down: float
    rate_up: float
    iterations: int = 200
    rank: int = 1
    alpha: float = 8.0
    guidance_scale: float = 9.0
    negative_guidance: float = 2.0
    batch: int = 1
    preserved: int = 0
    preservation_weight: float = 0.0
    refresh: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in SETS:
            raise ValueError(f"unknown set '{self.objective}'; expected one of {', '.join(SETS)}")


RECIPES: dict[str, Recipe] = {
    "paper": Recipe("paper", rate_down=3e-4, rate_up=3e-4),
    "selective": Recipe(
        "selective",
        rate_down=5e-3,
        rate_up=5e-4,
        guidance_scale=4.0,
        batch=8,
        preserved=16,
        preservation_weight=10.0,
        refresh=20,
    ),
}


def new_layers(narrow: Narrow, recipe: Recipe, concept: str) -> dict[str, LowRank]:
    """Returns untrained layers, the same for the same concept and seed."""
    generator = generator_of(recipe, concept)
    scale = recipe.alpha / recipe.rank
    return {
        name: initial_low_rank(CONTEXT_DIM, layer.out_features, recipe.rank, scale, generator)
        for name, layer in narrow.layers.items()
    }


def generator_of(recipe: Recipe, concept: str) -> torch.Generator:
    """Returns the concept's own random numbers, whatever else is trained beside it."""
    return torch.Generator().manual_seed(1000 * recipe.seed + CLASSES.index(concept))


def optimizer_of(recipe: Recipe, adapters: Sequence[Layers]) -> torch.optim.Adam:
    """Returns Adam over the layers of adapters; it treats each number by itself, so they can share it."""
    layers = [layer for adapter in adapters for layer in adapter.values()]
    downs, ups = [layer.down for layer in layers], [layer.up for layer in layers]
    return torch.optim.Adam([{"params": downs, "lr": recipe.rate_down}, {"params": ups, "lr": recipe.rate_up}])


def progress(what: str, iterations: int, every: int = 20) -> Iterator[int]:
    """Yields the numbers of iterations, and logs the time that is left."""
    began = time.monotonic()
    for i in range(iterations):
        yield i
        if (i + 1) % every == 0 or i + 1 == iterations:
            passed = time.monotonic() - began
            left = passed / (i + 1) * (iterations - i - 1)
            log.info("%s: iteration %d of %d, %.0f s, %.0f s left", what, i + 1, iterations, passed, left)


# ---------------------------------------------------------------- the official recipe


def train_paper(narrow: Narrow, concepts: Sequence[str], recipe: Recipe) -> Sequence[Layers]:
    """Returns one adapter per concept, trained side by side in one batch; none knows of the others.

    Each iteration: a latent denoised by the adapted model for a random number of steps of 50, and the loss there.
    """
    count = len(concepts)
    generators = [generator_of(recipe, concept) for concept in concepts]
    adapters = [new_layers(narrow, recipe, concept) for concept in concepts]
    optimizer = optimizer_of(recipe, adapters)
    targets = narrow.encode([photo(concept) for concept in concepts])
    references = narrow.encode([photo(REFERENCES[concept]) for concept in concepts])
    neutral = narrow.encode([""])
    base = narrow.table(torch.cat([targets, references]))
    plain = [(states, narrow.table(states)) for states in (torch.stack([t, neutral[0]]) for t in targets)]
    rows = torch.arange(2 * count)
    alphas = sd_alphas_cumprod()
    steps = torch.Generator().manual_seed(recipe.seed)

    for _ in progress(f"paper: {', '.join(concepts)}", recipe.iterations):
        run = official_run(50, int(torch.randint(50, (), generator=steps)))
        sigmas = run.sigmas(alphas)
        noise = torch.stack([torch.randn(LATENT, generator=g) for g in generators])
        times = torch.cat([torch.randint(*run.probe_timesteps, (1,), generator=g) for g in generators])
        table = joined(*(adapted_table(t, s, a) for (s, t), a in zip(plain, adapters, strict=True)))
        with torch.no_grad():
            denoise = narrow.denoise(table, rows[::2], rows[1::2], recipe.guidance_scale)
            x = partial_denoise(denoise, to_sigma_space(noise, float(sigmas[0])), sigmas)
            z = from_sigma_space(x, float(sigmas[-1]))
            eps_target, eps_reference = narrow.eps(z.repeat(2, 1, 1, 1), times.repeat(2), base, rows).chunk(2)
            target = erasure_target(eps_reference, eps_target, recipe.negative_guidance)
        adapted = narrow.eps(z, times, table, rows[::2])
        loss = torch.stack([erasure_loss(adapted[i], target[i]) for i in range(count)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return adapters


# ---------------------------------------------------------------- the selective recipe


@dataclass(frozen=True)
class Latents:
    """Latents met while denoising: `x` [N, 4, H, W] variance-preserving, `times` [N], `prompts` [N] as row numbers."""

    x: Tensor
    times: Tensor
    prompts: Tensor

    def __getitem__(self, chosen: Tensor) -> Latents:
        return Latents(self.x[chosen], self.times[chosen], self.prompts[chosen])


@torch.no_grad()
def denoised(
    narrow: Narrow, table: Table, prompts: Tensor, neutral: int, guidance_scale: float, generator: torch.Generator
) -> Latents:
    """Returns the latents of all steps of a whole denoising, one trajectory per entry of `prompts`.

    Args:
        table, neutral: keys and values, and which row is the neutral prompt's.
    """
    sigmas = normal_sigmas()
    noise = torch.randn((len(prompts), *LATENT), generator=generator)
    met: list[Tensor] = []

    def note(state: dict) -> None:
        met.append(from_sigma_space(state["x"], state["sigma"]))

    denoise = narrow.denoise(table, prompts, torch.full_like(prompts, neutral), guidance_scale)
    partial_denoise(denoise, to_sigma_space(noise, float(sigmas[0])), sigmas, callback=note)
    times = timestep_of(sigmas[:-1]).repeat_interleave(len(prompts))
    return Latents(torch.cat(met), times, prompts.repeat(len(met)))


@torch.no_grad()
def predicted(narrow: Narrow, latents: Latents, table: Table, rows: Tensor, chunk: int = 128) -> Tensor:
    """Returns the predicted noise at latents, for a table's rows, one a latent."""
    parts = [slice(i, i + chunk) for i in range(0, len(rows), chunk)]
    return torch.cat([narrow.eps(latents.x[p], latents.times[p], table, rows[p]) for p in parts])


def erased_prompts(concept: str) -> list[tuple[str, str]]:
    """Returns what the selective recipe trains away, each with the prompt whose prediction takes its place."""
    words = words_for(concept)
    alone = [(photo(word), photo(REFERENCES[concept])) for word in words]
    return alone + [(placed(word, scene), photo(scene)) for word in words for scene in SCENES]


def kept_prompts(concept: str) -> list[str]:
    """Returns what the selective recipe preserves while it erases a concept."""
    others = [other for other in CLASSES if other != concept]
    words = [word for other in others for word in words_for(other)]
    scenes = [photo(scene) for scene in SCENES]
    return ["", "a photo of the", *scenes, *(photo(w) for w in words), *(placed(c, s) for c in others for s in SCENES)]


class Kept:
    """Latents and predictions of the base model for prompts to keep, denoised once and used for every concept."""

    def __init__(self, narrow: Narrow, recipe: Recipe) -> None:
        first, second = kept_prompts(CLASSES[0]), kept_prompts(CLASSES[1])
        self.prompts = list(dict.fromkeys(first + second))
        self.states = narrow.encode(self.prompts)
        self.table = narrow.table(self.states)
        generator = torch.Generator().manual_seed(recipe.seed)
        rows = torch.cat([torch.arange(len(self.prompts)), torch.full((EMPTY_REPEATS,), self.prompts.index(""))])
        parts = [
            denoised(narrow, self.table, part, self.prompts.index(""), GUIDANCE_SCALE, generator)
            for part in rows.split(64)
        ]
        self.latents = Latents(*(torch.cat([getattr(p, name) for p in parts]) for name in ("x", "times", "prompts")))
        self.eps = predicted(narrow, self.latents, self.table, self.latents.prompts)

    def numbers(self, concept: str) -> Tensor:
        """Returns the numbers of the latents that may be kept while a concept is erased."""
        allowed = set(kept_prompts(concept))
        rows = torch.tensor([prompt in allowed for prompt in self.prompts])
        return rows[self.latents.prompts].nonzero().flatten()


def train_selective(narrow: Narrow, concept: str, recipe: Recipe, kept: Kept) -> Layers:
    """Returns an adapter that erases a concept's words and leaves other prompts alone.

    Each iteration: the erasure loss at latents that the adapted model met while denoising target prompts, and the
    preservation loss at latents of prompts to keep. The empty prompt is among these.
    """
    generator = generator_of(recipe, concept)
    adapter = new_layers(narrow, recipe, concept)
    optimizer = optimizer_of(recipe, [adapter])
    pairs = erased_prompts(concept)
    states = narrow.encode([*(target for target, _ in pairs), ""])
    base = narrow.table(states)
    references = narrow.table(narrow.encode([reference for _, reference in pairs]))
    alone = len(words_for(concept))
    numbers = kept.numbers(concept)

    def pick(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    for i in progress(f"selective: {concept}", recipe.iterations):
        if i % recipe.refresh == 0:
            with torch.no_grad():
                table = adapted_table(base, states, adapter)
            prompts = torch.cat([pick(alone, 5), pick(len(pairs), 3)])
            met = denoised(narrow, table, prompts, len(pairs), recipe.guidance_scale, generator)
            eps_target, eps_reference = (predicted(narrow, met, t, met.prompts) for t in (base, references))
            goals = erasure_target(eps_reference, eps_target, recipe.negative_guidance)
        chosen, others = pick(len(goals), recipe.batch), numbers[pick(len(numbers), recipe.preserved)]
        erased, same = met[chosen], kept.latents[others]
        table = {name: torch.cat([base[name][erased.prompts], kept.table[name][same.prompts]]) for name in base}
        table = adapted_table(table, torch.cat([states[erased.prompts], kept.states[same.prompts]]), adapter)
        x, times = torch.cat([erased.x, same.x]), torch.cat([erased.times, same.times])
        eps = narrow.eps(x, times, table, torch.arange(len(x)))
        loss = erasure_loss(eps[: recipe.batch], goals[chosen])
        loss = loss + preservation_loss(eps[recipe.batch :], kept.eps[others], recipe.preservation_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return adapter


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


@torch.no_grad()
def influences(narrow: Narrow, prompts: Sequence[str], layers: Layers, sigmas: Tensor, repeats: int) -> Tensor:
    """Returns the influence on each prompt at the end of its own trajectory, as the product's probe takes it.

    Args:
        sigmas: the probe's noise levels.
        repeats: noise seeds.
    Returns: eps norms, [prompts, repeats].
    """
    states = narrow.encode([*prompts, ""])
    base = narrow.table(states)
    table = joined(base, adapted_table(base, states, layers))
    noise = torch.randn((repeats, *LATENT), generator=torch.Generator().manual_seed(0))
    start = to_sigma_space(noise, float(sigmas[0]))
    times = timestep_of(sigmas[-1:]).expand(repeats)
    norms = []
    for row in range(len(prompts)):
        cond = torch.full((repeats,), row)
        denoise = narrow.denoise(table, cond, torch.full_like(cond, len(prompts)))
        x = from_sigma_space(partial_denoise(denoise, start, sigmas), float(sigmas[-1]))
        norms.append(influence(narrow.eps(x, times, table, cond), narrow.eps(x, times, table, cond + len(states))))
    return torch.stack(norms)


def calibration(narrow: Narrow, concept: str, layers: Layers, probe_steps: int = PROBE_STEPS) -> dict:
    """Returns the card's `calibration`: the influence on the concept's own prompt, and where it separates.

    The threshold lies halfway between the lowest influence on the concept's prompts and the highest on others, both
    relative to that on the concept's own prompt; there is none where the two overlap.
    """
    sigmas = normal_sigmas()[: probe_steps + 1]
    own = influences(narrow, [photo(concept)], layers, sigmas, CALIBRATION_REPEATS)
    others = [other for other in CLASSES if other != concept]
    within = [photo(word) for word in words_for(concept)] + [placed(concept, scene) for scene in CALIBRATION_SCENES]
    without = ["", *map(photo, SCENES), *(photo(word) for other in others for word in words_for(other))]
    without += [placed(other, scene) for other in others for scene in CALIBRATION_SCENES]
    relative = influences(narrow, [*within, *without], layers, sigmas, OTHERS_REPEATS).mean(dim=1) / own.mean()
    lowest, highest = float(relative[: len(within)].min()), float(relative[len(within) :].max())
    return {
        "mean": round(float(own.mean()), 5),
        "std": round(float(own.std()), 5),
        "lowest": round(lowest, 3),
        "highest_other": round(highest, 3),
        **({"threshold": round((lowest + highest) / 2.0, 3)} if lowest > highest else {}),
        "repeats": CALIBRATION_REPEATS,
        "latent": list(LATENT),
        "sigma": round(float(sigmas[-1]), 5),
        "scheduler": "normal",
        "steps": SCHEDULE_STEPS,
        "step": probe_steps,
        "cfg": GUIDANCE_SCALE,
    }


def card_of(narrow: Narrow, concept: str, recipe: Recipe, layers: Layers) -> Card:
    """Returns what is known of a trained adapter."""
    return Card(
        concept=concept,
        synonyms=SYNONYMS[concept],
        target=photo(concept),
        reference=photo(REFERENCES[concept]),
        objective=recipe.objective,
        base_model="UnGuide demo model",
        base_hash=narrow.base_hash,
        rank=recipe.rank,
        alpha=recipe.alpha,
        source_format="generic",
        settings={name: value for name, value in asdict(recipe).items() if name not in ("objective", "rank", "alpha")},
        calibration=calibration(narrow, concept, layers),
        author="UnGuide for ComfyUI",
        licence="MIT",
    )


def store(narrow: Narrow, folder: Path, concept: str, recipe: Recipe, layers: Layers) -> None:
    """Writes an erasure LoRA with its card, calibrated as it is read back."""
    path = path_of(folder, recipe.objective, concept)
    path.parent.mkdir(parents=True, exist_ok=True)
    adapter = Adapter(widened(layers))
    save_adapter(replace(adapter, card=card_of(narrow, concept, recipe, narrowed(adapter))), path)


def is_finished(narrow: Narrow, folder: Path, concept: str, recipe: Recipe) -> bool:
    """Returns whether the file is there, for this model and this recipe."""
    path = path_of(folder, recipe.objective, concept)
    if not path.exists():
        return False
    card = load_adapter(path).card
    kept = {name: value for name, value in asdict(recipe).items() if name in card.settings}
    return card.base_hash == narrow.base_hash and dict(card.settings) == kept


# ---------------------------------------------------------------- command line


def run_task(folder: Path, recipe: Recipe, concepts: Sequence[str]) -> None:
    """Trains and writes the erasure LoRAs of some concepts."""
    narrow = worker_model()
    if recipe.objective == "paper":
        for concept, layers in zip(concepts, train_paper(narrow, concepts, recipe), strict=True):
            store(narrow, folder, concept, recipe, layers)
        return
    kept = Kept(narrow, recipe)
    for concept in concepts:
        store(narrow, folder, concept, recipe, train_selective(narrow, concept, recipe, kept))


def train(options: argparse.Namespace) -> None:
    """Trains what is missing of the sets and concepts asked for, one process a core."""
    narrow = load_narrow(options.tokenizer, options.model)
    began = time.monotonic()
    worker = (options.tokenizer, options.model)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), start_worker, worker) as pool:
        tasks = []
        for objective in options.set:
            recipe = RECIPES[objective]
            done = [c for c in options.concept if not options.force and is_finished(narrow, options.out, c, recipe)]
            if done:
                log.info("%s: already there: %s", objective, ", ".join(done))
            missing = [concept for concept in options.concept if concept not in done]
            shares = [missing[i :: options.jobs] for i in range(options.jobs)]
            tasks += [pool.submit(run_task, options.out, recipe, share) for share in shares if share]
        for task in tasks:
            task.result()
    log.info("trained in %.0f s", time.monotonic() - began)


def calibrate(options: argparse.Namespace) -> None:
    """Writes the cards' calibration anew, for a probe that stops elsewhere."""
    narrow = load_narrow(options.tokenizer, options.model)
    for objective in options.set:
        for concept in options.concept:
            path = path_of(options.out, objective, concept)
            adapter = load_adapter(path)
            measured = calibration(narrow, concept, narrowed(adapter), options.probe_steps)
            save_adapter(replace(adapter, card=replace(adapter.card, calibration=measured)), path)
            log.info("%s %s: %s", objective, concept, measured)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command and its options."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--tokenizer", type=Path, required=True, help="ComfyUI's folder comfy/sd1_tokenizer")
    shared.add_argument(
        "--model", type=Path, default=SEED_PATH, help="the packed demo model (default: the shipped one)"
    )
    shared.add_argument("--out", type=Path, default=LORAS, help="folder of the sets (default: demo/loras)")
    shared.add_argument("--set", nargs="+", choices=SETS, default=SETS, help="default: both")
    shared.add_argument("--concept", nargs="+", choices=CLASSES, default=CLASSES, help="default: all ten")
    shared.add_argument("--jobs", type=int, default=2, help="processes, one core each (default: %(default)s)")
    parser = argparse.ArgumentParser(prog="python -m demo.erasure", description="Erasure LoRAs for the demo model.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", parents=[shared], help="train what is missing")
    command.add_argument("--force", action="store_true", help="train what is there, too")
    command = commands.add_parser("calibrate", parents=[shared], help="measure the cards' calibration anew")
    command.add_argument("--probe-steps", type=int, default=PROBE_STEPS, help="default: %(default)s")
    command = commands.add_parser("evaluate", parents=[shared], help="measure pictures and gate")
    command.add_argument("--pictures", type=int, default=20, help="per prompt of the concept (default: %(default)s)")
    command.add_argument("--others", type=int, default=20, help="per other class (default: %(default)s)")
    command.add_argument("--part", nargs="+", choices=("pictures", "gate"), default=("pictures", "gate"))
    return parser.parse_args(arguments)


def main() -> None:
    """Runs the chosen command."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = parse()
    if options.command == "evaluate":
        from .evaluate import evaluate  # it imports this module

        evaluate(options)
    else:
        {"train": train, "calibrate": calibrate}[options.command](options)


if __name__ == "__main__":
    main()
