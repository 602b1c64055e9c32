"""What to train, and the training itself, on a model as the host has it loaded.

The loop is `unguide_core.training.trainer`'s. What becomes of the trained adapter is in `finish`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.samplers
import torch

from ...unguide_core.adapter import Card
from ...unguide_core.training.prompts import TrainingPrompts
from ...unguide_core.training.recipe import Recipe
from ...unguide_core.training.rollout import sampled_timesteps
from ...unguide_core.training.trainer import FP16_LOSS_SCALE, Progress, Training
from ..blend.wrapper import bare
from ..lora.load import Conditioning
from ..model.key import base_hash
from ..model.task import run_on_model
from ..report.progress import say
from .host_state import differentiable, discrete_sigmas, marked_as_training
from .predictor import HostPredictor, trainable_layers
from .show import TrainingReport

log = logging.getLogger(__name__)

DISCARD, KEEP = "discard", "keep"
ON_CANCEL = (DISCARD, KEEP)
PREVIEW_STEPS = 10
PREVIEW_CFG = 4.0


@dataclass(frozen=True)
class Job:
    """What to train.

    Args:
        recipe: how.
        prompts: what is erased and kept, by name.
        conditionings: of every name in `prompts`.
        card: what is known about the adapter before; the rest is filled in.
        layers, pattern: as for `chosen_layers`.
        on_cancel: "discard" ends the run where it is cancelled; "keep" continues with the adapter trained so far.
        rows: batch size of a forward, at most.
        preview_every: iterations between previews of the concept's prompt by the adapted model; 0 for none.
    """

    recipe: Recipe
    prompts: TrainingPrompts
    conditionings: Mapping[str, Conditioning]
    card: Card
    layers: str = "object"
    pattern: str = ""
    on_cancel: str = DISCARD
    rows: int = 16
    preview_every: int = 0

    def __post_init__(self) -> None:
        if self.on_cancel not in ON_CANCEL:
            raise ValueError(f"on_cancel is {self.on_cancel!r}; expected one of {', '.join(ON_CANCEL)}")
        for name, conditioning in self.conditionings.items():
            if len(conditioning) != 1:
                raise ValueError(
                    f"the conditioning {name!r} has {len(conditioning)} parts; training needs plain prompts: "
                    "connect an encoded text, not a combination of several"
                )


@dataclass(frozen=True)
class Trained:
    """A training that has ended, and what is known about its adapter."""

    training: Training
    card: Card


TrainingObserver = Callable[[TrainingReport], None]


def train(
    model: Any,
    job: Job,
    latent: torch.Tensor,
    observer: TrainingObserver | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train an adapter on a `ModelPatcher`; whatever patches are on it count as the base.

    Args:
        latent: whose shape is trained at, [B, C, H, W].
        observer: called after every iteration.
        watch: called while latents to train at are generated, with how many there are of how many.
    Raises: ValueError for a model that does not predict eps or v with a discrete schedule, or layers that it does not
        have; TrainingError if training diverges; the host's own exception where it is cancelled.
    """
    with torch.inference_mode(False), torch.enable_grad():
        base = bare(model)
        if getattr(base, "is_dynamic", lambda: False)():
            base = base.clone(disable_dynamic=True)  # weights that come and go cannot be differentiated through
        guider = comfy.samplers.CFGGuider(base)
        keys = {name: f"prompt {i}" for i, name in enumerate(job.conditionings)}
        guider.inner_set_conds({keys[name]: _differentiable(c) for name, c in job.conditionings.items()})
        one = latent[:1].detach().to("cpu", torch.float32).clone()

        def run(guider: Any, extra_args: dict[str, Any], shape: torch.Size) -> Trained:
            conds = {name: _one_row(guider.conds[key][0]["model_conds"]) for name, key in keys.items()}
            options = extra_args["model_options"].get("transformer_options", {})
            return _train(base, guider.inner_model, job, conds, options, shape, observer, watch)

        return run_on_model(guider, one, job.recipe.seed, run, trains=True)


def _differentiable(conditioning: Conditioning) -> Conditioning:
    """A conditioning whose tensors are not inference tensors."""
    [(text, options)] = conditioning
    clear = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    return [[text.clone(), clear]]


def _one_row(conds: Mapping[str, Any]) -> dict[str, Any]:
    """A processed prompt for one latent."""
    return {name: cond.process_cond(batch_size=1, area=None) for name, cond in conds.items()}


def _train(
    patcher: Any,
    model: Any,
    job: Job,
    conds: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
    shape: torch.Size,
    observer: TrainingObserver | None,
    watch: Callable[[int, int], None] | None,
) -> Trained:
    """The training with the model loaded."""
    device = patcher.load_device
    sigmas = discrete_sigmas(model).to(device)
    layers = trainable_layers(model, job.recipe, job.layers, job.pattern, device)
    predictor = HostPredictor(model, conds, layers, sigmas, options)
    half = model.get_dtype_inference() == torch.float16
    training = Training(
        predictor,
        layers,
        job.prompts,
        job.recipe,
        shape,
        device=device,
        rows=job.rows,
        relieve=predictor.relieve,
        loss_scale=FP16_LOSS_SCALE if half else 1.0,
        sigmas=sigmas.cpu(),
        watch=watch,
    )
    with differentiable(model), marked_as_training():
        _run(training, predictor, job, observer)
    more = {"layers": job.layers} | ({"pattern": job.pattern} if job.pattern else {})
    card = replace(
        job.card,
        base_model=job.card.base_model or type(model.model_config).__name__,
        base_hash=base_hash(patcher),
        source_format="generic",
        settings={**job.card.settings, **more},
    )
    return Trained(training, card)


def _run(training: Training, predictor: HostPredictor, job: Job, observer: TrainingObserver | None) -> None:
    first: float | None = None  # when the first iteration was done: rollouts that are needed once come before it
    try:
        for progress in training.run():
            now, done = time.perf_counter(), progress.iteration
            left = None if first is None else (now - first) / (done - 1) * (progress.iterations - done)
            first = now if first is None else first
            if observer is not None:
                note = predictor.note or training.denoiser.note
                observer(TrainingReport(progress, left, _preview(training, progress, job), note))
    except comfy.model_management.InterruptProcessingException:
        said = _cancelled(training.iteration, job)
        say(said)
        log.info("UnGuide: %s", said)
        if job.on_cancel == DISCARD or training.iteration == 0:
            raise


def _cancelled(iteration: int, job: Job) -> str:
    """What becomes of a training that the user cancels."""
    if iteration == 0:
        return "Cancelled before the first iteration: there is nothing to keep"
    at = f"Cancelled at iteration {iteration} of {job.recipe.iterations}"
    if job.on_cancel == DISCARD:
        return f"{at}: nothing is kept (on_cancel is 'discard')"
    return f"{at}: the LoRA as trained so far is kept"


def _preview(training: Training, progress: Progress, job: Job) -> torch.Tensor | None:
    """A latent of the concept's prompt by the adapted model, where it is time for one."""
    every = job.preview_every
    if not every or (progress.iteration % every and progress.iteration != progress.iterations):
        return None
    denoiser = training.denoiser
    spent = denoiser.evaluations
    generator = torch.Generator().manual_seed(job.recipe.seed)
    noise = torch.randn((1, *training.shape), generator=generator).to(training.device)
    with torch.no_grad(), training.predict.adapted():
        target = job.prompts.erased[0].target
        latent = denoiser.rollout(noise, sampled_timesteps(PREVIEW_STEPS), 0.0, [target], PREVIEW_CFG).latent
    denoiser.evaluations = spent
    return latent
