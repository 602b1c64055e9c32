"""Trains one concept, from the start or a checkpoint, and writes its file."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from unguide_core.adapter import Card
from unguide_core.formats import save_adapter
from unguide_core.probe.calibration import CalibrationPrompts
from unguide_core.training.finish import finish
from unguide_core.training.prompts import TrainingPrompts, calibration_prompts, text_calibration_prompts
from unguide_core.training.rollout import Denoiser
from unguide_core.training.trainer import FP16_LOSS_SCALE, Training, TrainingError

from . import checkpoint
from .calibration import calibrate
from .config import Concept, Config
from .model import Base, DiffusersPredictor, add_adapter, load_base, remove_adapter

log = logging.getLogger("unguide_train")

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EVERY = 25
"""The least number of iterations between checkpoints."""


@dataclass(frozen=True)
class Summary:
    """The result of training one concept."""

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
    """Trains one concept and writes its file; resumes from a checkpoint if there is one next to it.

    Args:
        base: the base model, if another than the configuration's; it has no adapter, before and afterwards.
    Raises: ModelError, TrainingError, AdapterError; no incomplete file is left behind.
    """
    path, recipe = config.path_of(concept), config.full_recipe
    path.parent.mkdir(parents=True, exist_ok=True)
    mixed = {"fp32": "no"}.get(config.precision, config.precision)
    accelerator = Accelerator(
        mixed_precision=mixed,
        log_with="tensorboard" if config.logs else None,
        project_dir=str(config.logs) if config.logs else None,
    )
    if config.logs:
        accelerator.init_trackers(path.stem, {k: v for k, v in recipe.to_settings().items() if v is not None})
    dtype = PRECISIONS[config.precision] if accelerator.device.type != "cpu" else torch.float32
    base = base or loaded_base(config.base, config.tokenizer, dtype)
    base.to(accelerator.device, dtype)
    try:
        return _train(config, concept, base, accelerator, quiet)
    finally:
        remove_adapter(base.unet)


@lru_cache(maxsize=1)
def loaded_base(path: Path, tokenizer: Path | None, dtype: torch.dtype) -> Base:
    """Returns the base model, which a process loads once for all its concepts."""
    return load_base(path, tokenizer, dtype)


def _train(config: Config, concept: Concept, base: Base, accelerator: Accelerator, quiet: bool) -> Summary:
    """Trains on the base model, which has the adapter afterwards."""
    began, path, recipe = time.perf_counter(), config.path_of(concept), config.full_recipe
    prompts = config.prompts_of(concept)
    layers = add_adapter(base.unet, recipe, config.layers, config.pattern)
    words = config.words_of(concept), (concept.concept, *concept.synonyms)
    asked = [
        CalibrationPrompts(prompts.erased[0].target, *of(*words))
        for of in ((calibration_prompts, text_calibration_prompts) if config.calibrate else ())
    ]
    texts = dict.fromkeys((*prompts.names, *(text for each in asked for text in (*each.concept, *each.others))))
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
    unfinished.resume(training)
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
    except TrainingError:  # it would fail again from this checkpoint
        unfinished.remove()
        raise
    accelerator.end_training()
    measure = None
    if asked:
        measure = partial(
            calibrate,
            denoiser=Denoiser(training.predict, prompts.neutral, training.denoiser.rows),
            base_hash=base.hash,
            prompts=asked[0],
            text_prompts=asked[1],
            shape=training.shape,
            seed=recipe.seed,
            device=training.device,
        )
    adapter = finish(training, card_of(config, concept, base, prompts), measure, log=log.warning)
    save_adapter(adapter, path)
    unfinished.remove()
    return Summary(
        concept.concept,
        str(path),
        training.iteration,
        resumed_at,
        training.losses[-1],
        training.held_out[-1] if training.held_out else None,
        training.denoiser.evaluations,
        time.perf_counter() - began,
        os.getpid(),
    )


class Unfinished:
    """The checkpoint of one training on one base model."""

    def __init__(self, path: Path, base_hash: str):
        self.path, self.base_hash, self.saved_at = path, base_hash, 0

    def resume(self, training: Training) -> None:
        """Resumes from the file, if there is one. Raises: ValueError with its path if it is from another training."""
        if not self.path.exists():
            return
        try:
            state = checkpoint.load(self.path)
            if state["base"] != self.base_hash:
                raise ValueError("the checkpoint is from another base model; remove it to start again")
            training.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"cannot resume from '{self.path}': {error}") from error
        self.saved_at = training.iteration
        log.info("resuming from iteration %d of '%s'", training.iteration, self.path)

    def save(self, training: Training) -> None:
        """Writes the file if it is due and training could resume from here; a full disk does not stop the training."""
        if not training.resumable or training.iteration - self.saved_at < min(EVERY, training.recipe.refresh):
            return
        self.saved_at = training.iteration
        try:
            checkpoint.save(training.state_dict() | {"base": self.base_hash}, self.path)
        except OSError as error:
            log.warning("no checkpoint: '%s' cannot be written (%s); training continues without one", self.path, error)

    def remove(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)


def card_of(config: Config, concept: Concept, base: Base, prompts: TrainingPrompts) -> Card:
    """The adapter's metadata, except what `finish` adds."""
    pair = prompts.erased[0]
    return Card(
        concept=concept.concept,
        synonyms=concept.synonyms,
        target=pair.target,
        reference=pair.reference,
        objective=config.preset,
        base_model=base.name,
        base_hash=base.hash,
        source_format="kohya",
        settings={"layers": config.layers} | ({"pattern": config.pattern} if config.pattern else {}),
    )
