"""One concept, from the start or its checkpoint to its file."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from unguide_core.adapter import Adapter, Card, LowRank
from unguide_core.formats import save_adapter
from unguide_core.prompts import calibration_prompts
from unguide_core.training import FP16_LOSS_SCALE, Training, TrainingError, is_out_of_memory

from . import checkpoint
from .calibration import Asked, calibrate
from .config import Concept, Config
from .model import Base, DiffusersPredictor, add_adapter, load_base

log = logging.getLogger("unguide_train")

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
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
    base.to(accelerator.device, PRECISIONS[config.precision] if accelerator.device.type != "cpu" else torch.float32)
    layers = add_adapter(base.unet, recipe, config.layers, config.pattern)
    own, others = calibration_prompts(config.words_of(concept), (concept.concept, *concept.synonyms))
    texts = dict.fromkeys((*prompts.names, *own, *others))
    encoded, side = base.encode(tuple(texts), accelerator.device), (config.size or base.size) // 8
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
    unfinished = Unfinished(checkpoint.path_of(path), base.hash)
    unfinished.go_on(training)
    resumed_at = training.iteration
    bar = tqdm(total=recipe.iterations, initial=resumed_at, desc=concept.concept, disable=quiet)
    try:
        with bar:
            for progress in training.run():
                bar.update()
                bar.set_postfix(loss=f"{progress.loss:.4f}", held_out=progress.held_out)
                numbers = {"loss": progress.loss, "erased": progress.erasure, "kept": progress.preservation}
                if progress.held_out is not None:
                    numbers["held out"] = progress.held_out
                accelerator.log(numbers, step=progress.iteration)
                unfinished.save(training)
    except TrainingError:  # going on from where it began to go wrong would go wrong again
        unfinished.remove()
        raise
    accelerator.end_training()
    adapter = Adapter(_finished(layers), card_of(config, concept, base, training))
    if config.calibrate:
        named = (prompts.erased[0].target, own, others, prompts.neutral)
        adapter = calibrated(training, adapter, base.hash, named)
    save_adapter(adapter, path)
    unfinished.remove()
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


def calibrated(training: Training, adapter: Adapter, base_hash: str, prompts: Asked) -> Adapter:
    """The adapter with a calibration in its card, or as it is, said in the log, where it cannot be calibrated."""
    seed, rows, device = training.recipe.seed, training.sampler.rows, training.device
    try:
        found = calibrate(
            training.predict, adapter, base_hash, prompts, training.shape, seed=seed, device=device, rows=rows
        )
    except (ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        log.warning("%s is trained, but not calibrated: %s", adapter.card.concept, error)
        return adapter
    return replace(adapter, card=replace(adapter.card, calibration=found.to_card()))


class Unfinished:
    """The checkpoint of one training.

    Args:
        path: of its file.
        base_hash: of the base model that it holds for.
    """

    def __init__(self, path: Path, base_hash: str):
        self.path, self.base_hash, self.saved_at = path, base_hash, 0

    def go_on(self, training: Training) -> None:
        """Continues from the file, if there is one. Raises: ValueError, with its path, if it is of another training."""
        if not self.path.exists():
            return
        try:
            state = checkpoint.load(self.path)
            if state["base"] != self.base_hash:
                raise ValueError("the checkpoint is of another base model; remove it to begin anew")
            training.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"cannot go on from '{self.path}': {error}") from error
        self.saved_at = training.iteration
        log.info("goes on from iteration %d of '%s'", training.iteration, self.path)

    def save(self, training: Training) -> None:
        """Writes the file where it is time to and training could go on from here; a full disk is no reason to stop."""
        if not training.resumable or training.iteration - self.saved_at < min(EVERY, training.recipe.refresh):
            return
        self.saved_at = training.iteration
        try:
            checkpoint.save(training.state_dict() | {"base": self.base_hash}, self.path)
        except OSError as error:
            log.warning("no checkpoint: '%s' cannot be written (%s); training goes on without", self.path, error)

    def remove(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)


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
