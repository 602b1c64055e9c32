"""Training an erasure LoRA on a model as the host has it loaded: precision, other LoRAs and all.

The loop is `unguide_core.training`'s. Here is the model that it trains with: the host's own `apply_model`, the
adapter added in the forward (`injection.adapted_rows`), the base's weights neither copied nor written. The adapter is
kept in float32.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.samplers
import torch
import torch.utils.checkpoint

from ..unguide_core.adapter import Adapter, Card, LowRank
from ..unguide_core.layers import chosen_layers
from ..unguide_core.training import (
    FP16_LOSS_SCALE,
    Progress,
    Prompts,
    Recipe,
    Training,
    fresh_layers,
    is_out_of_memory,
    sampled_timesteps,
)
from . import calibration
from .erasure import Conditioning, ErasureLora
from .gating import without_gates
from .identity import base_hash
from .injection import adapted_rows

log = logging.getLogger(__name__)

DISCARD, KEEP = "discard", "keep"
ON_CANCEL = (DISCARD, KEEP)
PREFIX = "diffusion_model."
PREVIEW_STEPS = 10
PREVIEW_CFG = 4.0
LEAST_OTHERS = 8
"""With fewer prompts to compare with, a rate of false alarms means nothing."""


@dataclass(frozen=True)
class Job:
    """What to train.

    Args:
        recipe: how.
        prompts: what is erased and kept, by name.
        conditionings: of every name in `prompts`.
        card: what is known of it before, rank, settings and so on are filled in; None if the names in `prompts` are
            the texts themselves, which then are its target and reference.
        layers, pattern: as for `chosen_layers`.
        on_cancel: "discard" ends the run where it is cancelled; "keep" goes on with the adapter trained so far.
        rows: of a forward, at most.
        preview_every: iterations between pictures of the concept's prompt as the adapted model draws it; 0 for none.
    """

    recipe: Recipe
    prompts: Prompts
    conditionings: Mapping[str, Conditioning]
    card: Card | None = None
    layers: str = "object"
    pattern: str = ""
    on_cancel: str = DISCARD
    rows: int = 16
    preview_every: int = 0

    def __post_init__(self) -> None:
        if self.on_cancel not in ON_CANCEL:
            raise ValueError(f"unknown on_cancel {self.on_cancel!r}; expected one of {', '.join(ON_CANCEL)}")
        for name, conditioning in self.conditionings.items():
            if len(conditioning) != 1:
                raise ValueError(
                    f"the conditioning {name!r} has {len(conditioning)} parts; training needs plain prompts: "
                    "connect an encoded text, not a combination of several"
                )


@dataclass(frozen=True)
class Report:
    """Where training stands, for whoever shows it.

    Args:
        progress: the loop's own.
        left: seconds to the last iteration, estimated; None at the first.
        preview: a latent of the concept's prompt, x0 [1, C, ...], where one was drawn.
        note: what has to be said besides, such as that memory ran out and what was done about it.
    """

    progress: Progress
    left: float | None
    preview: torch.Tensor | None = None
    note: str = ""

    @property
    def text(self) -> str:
        """One line for a person."""
        at = self.progress
        held = "" if at.held_out is None else f", held out {at.held_out:.2f} of the untrained"
        kept = f" (erased {at.erasure:.4f}, kept {at.preservation:.4f})" if at.preservation else ""
        left = "" if self.left is None else f"; {self.left:.0f} s left"
        line = f"{at.iteration} of {at.iterations}: loss {at.loss:.4f}{kept}{held}{left}"
        return f"{line}\n{self.note}" if self.note else line


@dataclass(frozen=True)
class Trained:
    """A trained adapter, whose card says what it cost, with its losses by iteration and the looks at held-out ones."""

    adapter: Adapter
    losses: tuple[float, ...]
    held_out: tuple[float, ...]


Observer = Callable[[Report], None]


def train_erasure_lora(model: Any, job: Job, latent: torch.Tensor, observer: Observer | None = None) -> Trained:
    """An adapter trained on a `ModelPatcher`; whatever patches are on it count as the base.

    Args:
        latent: whose shape is trained at, [B, C, H, W].
    Raises: ValueError for a model that is no eps or v one with a discrete schedule, or layers that it does not have;
        TrainingError if training diverges; the host's own exception where it is cancelled.
    """
    with torch.inference_mode(False), torch.enable_grad():
        base, _ = without_gates(model)
        if getattr(base, "is_dynamic", lambda: False)():
            base = base.clone(disable_dynamic=True)  # weights that come and go cannot be differentiated through
        run = TrainingRun(job, base, observer)
        guider = comfy.samplers.CFGGuider(base)
        names = {name: f"prompt {i}" for i, name in enumerate(job.conditionings)}
        guider.inner_set_conds({names[name]: _plain(c) for name, c in job.conditionings.items()})
        run.keys = names
        one = latent[:1].detach().to("cpu", torch.float32).clone()
        guider.sample(torch.zeros_like(one), torch.zeros_like(one), run, torch.ones(2), seed=job.recipe.seed)
        assert run.trained is not None
        return run.trained


def _plain(conditioning: Conditioning) -> Conditioning:
    """A conditioning whose tensors may be differentiated through: out of inference mode."""
    [(text, options)] = conditioning
    clear = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    return [[text.clone(), clear]]


def _one_row(conds: Mapping[str, Any]) -> dict[str, Any]:
    """A processed prompt for one latent."""
    return {name: cond.process_cond(batch_size=1, area=None) for name, cond in conds.items()}


class TrainingRun(comfy.samplers.Sampler):
    """A training run as if it were a sampler: `CFGGuider.sample` loads the model and processes the conditioning.

    After it, `trained` holds the adapter.
    """

    def __init__(self, job: Job, patcher: Any, observer: Observer | None = None):
        self.job, self.patcher, self.observer = job, patcher, observer
        self.keys: dict[str, str] = {}
        self.trained: Trained | None = None

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """The latent that came in: the result is `trained`."""
        model, device = model_wrap.inner_model, self.patcher.load_device
        levels = _discrete_sigmas(model).to(device)
        layers = _fresh(model, self.job, device)
        conds = {name: _one_row(model_wrap.conds[key][0]["model_conds"]) for name, key in self.keys.items()}
        options = extra_args["model_options"].get("transformer_options", {})
        predictor = HostPredictor(model, conds, layers, levels, options)
        half = model.get_dtype_inference() == torch.float16
        training = Training(
            predictor,
            layers,
            self.job.prompts,
            self.job.recipe,
            noise.shape[1:],
            device=device,
            rows=self.job.rows,
            relieve=predictor.relieve,
            loss_scale=FP16_LOSS_SCALE if half else 1.0,
            sigmas=levels.cpu(),
        )
        with differentiable(model), _in_training():
            self._run(training, predictor)
        self.trained = Trained(
            Adapter(_named(layers), self._card(model, predictor, training)),
            tuple(training.losses),
            tuple(training.held_out),
        )
        return noise

    def _run(self, training: Training, predictor: HostPredictor) -> None:
        first: float | None = None  # when the first iteration was done: before it come latents that are drawn once
        try:
            for progress in training.run():
                now, done = time.perf_counter(), progress.iteration
                left = None if first is None else (now - first) / (done - 1) * (progress.iterations - done)
                first = now if first is None else first
                if self.observer is not None:
                    note = predictor.note or training.sampler.note
                    self.observer(Report(progress, left, self._preview(training, progress), note))
        except comfy.model_management.InterruptProcessingException:
            if self.job.on_cancel == DISCARD or training.iteration == 0:
                raise
            log.info("UnGuide: training was cancelled; the adapter of %d iterations is kept", training.iteration)

    def _preview(self, training: Training, progress: Progress) -> torch.Tensor | None:
        every = self.job.preview_every
        if not every or (progress.iteration % every and progress.iteration != progress.iterations):
            return None
        spent, sampler = training.sampler.evaluations, training.sampler
        generator = torch.Generator().manual_seed(self.job.recipe.seed)
        noise = torch.randn((1, *training.shape), generator=generator).to(training.device)
        with torch.no_grad(), training.predict.adapted():
            target = self.job.prompts.erased[0].target
            drawn = sampler.trajectory(noise, sampled_timesteps(PREVIEW_STEPS), 0.0, [target], PREVIEW_CFG)
        sampler.evaluations = spent
        return drawn

    def _card(self, model: Any, predictor: HostPredictor, training: Training) -> Card:
        recipe, pair = self.job.recipe, self.job.prompts.erased[0]
        settings = {**training.settings, "layers": self.job.layers}
        if self.job.pattern:
            settings["pattern"] = self.job.pattern
        card = self.job.card or Card(target=pair.target, reference=pair.reference)
        return replace(
            card,
            base_model=card.base_model or type(model.model_config).__name__,
            base_hash=base_hash(self.patcher),
            rank=recipe.rank,
            alpha=recipe.alpha,
            source_format="generic",
            settings=settings,
        )


class HostPredictor:
    """The host's model with an adapter in training, as `unguide_core.training` wants it.

    Args:
        model: a host `BaseModel`, loaded.
        conds: processed `model_conds` by prompt.
        layers: trainable, by module path.
        sigmas: the noise level of each timestep, [1000], on the model's device.
        options: the transformer options that patches of other packs live in.
    """

    def __init__(
        self,
        model: Any,
        conds: Mapping[str, Mapping[str, Any]],
        layers: Mapping[str, LowRank],
        sigmas: torch.Tensor,
        options: Mapping[str, Any],
    ):
        self.model, self.conds, self.layers, self.sigmas = model, conds, layers, sigmas
        self.options = dict(options)
        self.modules = {path: model.get_submodule(path) for path in layers}
        self.adapting, self.checkpointing = False, False
        self.note = ""

    def __call__(self, z: torch.Tensor, timesteps: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The predicted noise of each row, float32; for a v model what its x0 amounts to."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        sigma = self.sigmas[timesteps.to(self.sigmas.device)]
        level = sigma.view(-1, *[1] * (z.ndim - 1))
        x = z * (1.0 + level**2).sqrt()
        cond = comfy.samplers.cond_cat([self.conds[prompt] for prompt in prompts])
        kind = {"cond_or_uncond": [0], "sigmas": sigma}
        with self._checkpointed() if self.checkpointing and torch.is_grad_enabled() else nullcontext():
            x0 = self.model.apply_model(x, sigma, transformer_options={**self.options, **kind}, **cond)
        return (x - x0.float()) / level

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Within the block the adapter acts, also on what checkpointing computes again."""
        if self.adapting:
            yield
            return
        self.adapting = True
        try:
            with adapted_rows(self.modules, [(slice(None), self.layers)], 0):
                yield
        finally:
            self.adapting = False

    def relieve(self) -> bool:
        """Turns gradient checkpointing on; whether that was still to be done."""
        if self.checkpointing:
            return False
        self.checkpointing = True
        self.note = "Memory ran out: the network's blocks are now computed twice (gradient checkpointing), slower."
        log.warning("UnGuide: %s", self.note)
        comfy.model_management.soft_empty_cache()
        return True

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Within the block the network's blocks keep no intermediate results for the backward pass."""
        blocks = list(_blocks(self.model.diffusion_model))
        for block in blocks:
            block.__dict__["forward"] = _Checkpointed(block.forward)
        try:
            yield
        finally:
            for block in blocks:
                del block.__dict__["forward"]


class _Checkpointed:
    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


def _blocks(network: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The outermost modules that hold others and are no mere containers: residual and transformer blocks."""
    for child in network.children():
        if isinstance(child, torch.nn.ModuleList | torch.nn.Sequential | torch.nn.ModuleDict):
            yield from _blocks(child)
        elif next(child.children(), None) is not None and "forward" not in child.__dict__:
            yield child


@contextmanager
def differentiable(model: torch.nn.Module) -> Iterator[None]:
    """Within the block no weight is an inference tensor, through which nothing can be differentiated.

    The host loads models under inference mode. Ordinary tensors over the same memory take the weights' place, and the
    weights themselves come back afterwards: nothing is copied or written.
    """
    before: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        for module in model.modules():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for store in stores:
                for name, tensor in store.items():
                    if tensor is not None and tensor.is_inference():
                        before.append((store, name, tensor))
                        store[name] = _ordinary(tensor)
        yield
    finally:
        for store, name, tensor in before:
            store[name] = tensor


def _ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers as an ordinary tensor: over the same memory; a tensor of a type of its own is copied."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        ordinary = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage(), *place)
    else:
        ordinary = tensor.detach().clone()
    return torch.nn.Parameter(ordinary, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else ordinary


@contextmanager
def _in_training() -> Iterator[None]:
    """The host's own mark, by which quantised layers take a differentiable way (0.26 and later)."""
    management = comfy.model_management
    if not hasattr(management, "in_training"):
        yield
        return
    before, management.in_training = management.in_training, True
    try:
        yield
    finally:
        management.in_training = before


def _discrete_sigmas(model: Any) -> torch.Tensor:
    """The noise levels of the model's 1000 timesteps."""
    sigmas = getattr(model.model_sampling, "sigmas", None)
    if sigmas is None or len(sigmas) != 1000 or not hasattr(model.model_sampling, "log_sigmas"):
        raise ValueError(
            f"the model ({type(model.model_config).__name__}) has no schedule of 1000 discrete timesteps, as SD 1.x, "
            "SD 2.x and SDXL have; erasure LoRAs can be trained on those only"
        )
    return sigmas.detach().float().clone()


def _fresh(model: Any, job: Job, device: torch.device) -> dict[str, LowRank]:
    """Untrained layers by module path, on the device.

    Each is drawn by its kohya name, so that training outside the host with the same seed begins with the same numbers.
    """
    linear = {
        name: module
        for name, module in model.diffusion_model.named_modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features")
    }
    paths = {PREFIX + name: linear[name] for name in chosen_layers(linear, job.layers, job.pattern)}
    kohya = _kohya_names(model)
    features = {kohya.get(path, path): (module.in_features, module.out_features) for path, module in paths.items()}
    drawn = fresh_layers(features, job.recipe)
    return {path: _trainable(drawn[kohya.get(path, path)], device) for path in paths}


def _trainable(layer: LowRank, device: torch.device) -> LowRank:
    down, up = (tensor.detach().to(device).requires_grad_() for tensor in (layer.down, layer.up))
    return LowRank(down, up, layer.scale)


def _kohya_names(model: Any) -> dict[str, str]:
    """kohya's name of a layer (`lora_unet_down_blocks_0_...`) by its module path, of the host's own key map."""
    names: dict[str, str] = {}
    for name, key in comfy.lora.model_lora_keys_unet(model, {}).items():
        path = key.removesuffix(".weight") if isinstance(key, str) else ""
        own = f"lora_unet_{path.removeprefix(PREFIX).replace('.', '_')}"
        if name.startswith("lora_unet_") and name != own:
            names[path] = min(name, names.get(path, name))  # the map has two for some, in no fixed order
    return names


def _named(layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The trained layers as an adapter holds them: on the CPU, no gradients."""
    return {
        path: LowRank(layer.down.detach().cpu().clone(), layer.up.detach().cpu().clone(), layer.scale)
        for path, layer in layers.items()
    }


def usable(trained: Trained, name: str, conditionings: Mapping[str, Conditioning], prompts: Prompts) -> ErasureLora:
    """The trained adapter as a wire carries it, with its concept's and the neutral prompt."""
    own = prompts.erased[0].target
    return ErasureLora(
        name=name,
        adapter=trained.adapter,
        concept_prompt=trained.adapter.card.concept_prompt,
        concept=conditionings[own],
        neutral=conditionings[prompts.neutral],
    )


def calibrated(
    model: Any,
    lora: ErasureLora,
    own: Sequence[Conditioning],
    others: Sequence[Conditioning],
    latent: torch.Tensor,
    on_cancel: str = DISCARD,
) -> ErasureLora:
    """The erasure LoRA with its calibration for this model in the card.

    Where there are too few other prompts to compare with, or the calibration fails, it stays without: what was trained
    is not given up for it, and Calibrate Erasure LoRA can do it later.

    Args:
        own: prompts with the concept, besides its own.
        others: prompts without it.
        on_cancel: as for `Job`.
    """
    assert lora.neutral is not None
    chosen, settings = calibration.Prompts(own, others), calibration.CalibrationSettings(repeats=1, own_repeats=8)
    reason: object = f"there are {len(others)} prompts without the concept; expected {LEAST_OTHERS}"
    try:
        if len(others) >= LEAST_OTHERS:
            (lora,) = calibration.calibrated(model, [lora], [chosen], lora.neutral, PREVIEW_CFG, latent, settings)
            return lora
    except comfy.model_management.InterruptProcessingException:
        if on_cancel == DISCARD:
            raise
        reason = "it was cancelled"
    except (ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        reason = error
    log.warning("UnGuide: %s is trained, but not calibrated (%s); use Calibrate Erasure LoRA", lora.name, reason)
    return lora
