"""One concept, from the start or its checkpoint to its file."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from tqdm import tqdm

from unguide_core.adapter import Adapter, Card, LowRank
from unguide_core.formats import save_adapter
from unguide_core.training import Training

from . import checkpoint
from .config import Concept, Config
from .model import Base, DiffusersPredictor, add_adapter, load_base

log = logging.getLogger("unguide_train")

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FP16_LOSS_SCALE = 2.0**12
EVERY = 25
"""Iterations between checkpoints, at least."""


@dataclass(frozen=True)
class Summary:
    """What became of one concept."""

    concept: str
    path: str
    iterations: int
    resumed_at: int
    loss: float
    held_out: float | None
    evaluations: int
    seconds: float
    process: int


def train_concept(config: Config, concept: Concept, base: Base | None = None, quiet: bool = False) -> Summary:
    """Trains one concept and writes its file; goes on from a checkpoint where one stands beside it.

    Args:
        base: a base model that is loaded already and carries no adapter; it does afterwards.
    Raises: ModelError, TrainingError, AdapterError, each with a sentence; no half-written file stays.
    """
    began, path, recipe = time.perf_counter(), config.path_of(concept), config.full_recipe
    path.parent.mkdir(parents=True, exist_ok=True)
    mixed = {"fp32": "no"}.get(config.precision, config.precision)
    accelerator = Accelerator(
        mixed_precision=mixed,
        log_with="tensorboard" if config.logs else None,
        project_dir=str(config.logs) if config.logs else None,
    )
    if config.logs:
        accelerator.init_trackers(path.stem, {k: v for k, v in recipe.to_settings().items() if v is not None})
    base = base or load_base(config.base, config.tokenizer)
    prompts = config.prompts_of(concept)
    layers = add_adapter(base.unet, recipe, config.layers, config.pattern)
    base.to(accelerator.device, PRECISIONS[config.precision] if accelerator.device.type != "cpu" else torch.float32)
    for layer in layers.values():
        layer.down.data, layer.up.data = layer.down.data.float(), layer.up.data.float()
    encoded, side = base.encode(prompts.names, accelerator.device), (config.size or base.size) // 8
    predictor = DiffusersPredictor(base.unet, encoded, accelerator.autocast)
    training = Training(
        predictor,
        layers,
        prompts,
        recipe,
        (base.unet.config.in_channels, side, side),
        device=accelerator.device,
        rows=config.rows,
        relieve=predictor.relieve,
        loss_scale=FP16_LOSS_SCALE if config.precision == "fp16" else 1.0,
    )
    unfinished = checkpoint.path_of(path)
    if unfinished.exists():
        training.load_state_dict(checkpoint.load(unfinished))
        log.info("%s: goes on from iteration %d", concept.concept, training.iteration)
    resumed_at, saved_at = training.iteration, training.iteration
    bar = tqdm(total=recipe.iterations, initial=resumed_at, desc=concept.concept, disable=quiet)
    with bar:
        for progress in training.run():
            bar.update()
            bar.set_postfix(loss=f"{progress.loss:.4f}", held_out=progress.held_out)
            numbers = {"loss": progress.loss, "erased": progress.erasure, "kept": progress.preservation}
            if progress.held_out is not None:
                numbers["held out"] = progress.held_out
            accelerator.log(numbers, step=progress.iteration)
            if training.resumable and progress.iteration - saved_at >= min(EVERY, recipe.refresh):
                checkpoint.save(training.state_dict(), unfinished)
                saved_at = progress.iteration
    accelerator.end_training()
    save_adapter(Adapter(_finished(layers), card_of(config, concept, base, training)), path)
    unfinished.unlink(missing_ok=True)
    return Summary(
        concept.concept,
        str(path),
        training.iteration,
        resumed_at,
        training.losses[-1],
        training.held_out[-1] if training.held_out else None,
        training.sampler.evaluations,
        time.perf_counter() - began,
        os.getpid(),
    )


def card_of(config: Config, concept: Concept, base: Base, training: Training) -> Card:
    """What is known of the trained adapter."""
    recipe, pair = config.full_recipe, training.prompts.erased[0]
    settings = {**training.settings, "layers": config.layers}
    return Card(
        concept=concept.concept,
        synonyms=concept.synonyms,
        target=pair.target,
        reference=pair.reference,
        objective=config.preset,
        base_model=base.name,
        base_hash=base.hash,
        rank=recipe.rank,
        alpha=recipe.alpha,
        source_format="kohya",
        settings=settings | ({"pattern": config.pattern} if config.pattern else {}),
    )


def _finished(layers: dict[str, LowRank]) -> dict[str, LowRank]:
    return {
        name: LowRank(layer.down.detach().cpu().clone(), layer.up.detach().cpu().clone(), layer.scale)
        for name, layer in layers.items()
    }
