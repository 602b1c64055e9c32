"""A model with erasure LoRAs behind their gate: the wrappers that make any sampler node an UnGuide sampler.

`guided` attaches them to a clone of the model. The state of a run lives in objects of that run only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ...unguide_core.probe import Decision
from ..blend.state import RUN, Run
from ..blend.wrapper import blending, carrying
from ..lora.load import ErasureLora
from ..lora.match import Matcher
from ..model.key import OURS, model_key
from ..probe.baseline import hash_ahead
from ..probe.conds import Context
from ..probe.rollout import schedule
from ..probe.settings import Settings
from ..report.progress import show
from ..report.records import Cost, Verdict
from .gate import GATE, Branch, Gate, Restart, gated_conditionals, gated_windows
from .image import Shown
from .official import OfficialSampling, Start
from .steps import from_more_noise

RunObserver = Callable[[Sequence[Verdict], Cost], None]


def guided(
    model: Any,
    loras: Sequence[ErasureLora],
    settings: Settings,
    decisions: Sequence[Decision] | None = None,
    observer: RunObserver | None = None,
    start: Start | None = None,
    node: str = "",
) -> Any:
    """Return a clone of a `ModelPatcher` that samples with the erasure LoRAs behind a gate.

    On a model that already has erasure LoRAs the new ones join them: blends are never nested.

    Args:
        decisions: made before (by the Stability Probe node), one per erasure LoRA, used instead of probes.
        observer: called with what was decided and what it cost after every sampling run.
        start: what the official probe otherwise draws at random.
        node: the id of the node on the page that shows what becomes of these erasure LoRAs.
    Raises: AdapterError if an adapter does not fit the model; ValueError if a decision was made for another model or
        adapter, or the concept's prompt is needed and missing.
    """
    for lora in loras:
        if settings.resist_adversarial and lora.concept is None:
            raise ValueError(
                f"resisting adversarial text needs the concept's own prompt for {lora.name!r}, encoded: connect a CLIP "
                "to Load Erasure LoRA and name the concept there"
            )
    hash_ahead(model, loras)
    carried = model.get_wrappers(WrappersMP.SAMPLER_SAMPLE, OURS)
    earlier = carried[0].branches if carried else ()
    clone = blending(model)
    if decisions is not None:
        _check_decisions(decisions, loras, clone)
    matcher = Matcher(clone.model)
    branches = [
        Branch(lora, matcher.match(lora.adapter, lora.name).layers, settings, decision, start, node)
        for lora, decision in zip(loras, decisions or [None] * len(loras), strict=True)
    ]
    for kind, wrapper in gate_wrappers(GatedSampling((*earlier, *branches), observer)).items():
        clone.add_wrapper_with_key(kind, OURS, wrapper)
    return clone


def gate_wrappers(sampling: GatedSampling) -> dict[str, Callable[..., Any]]:
    """Return the wrappers that gate a run, by the host's kind; the blend's comes beside them (`blend.wrapper`)."""
    return {
        WrappersMP.CALC_COND_BATCH: gated_conditionals,
        WrappersMP.PREDICT_NOISE: gated_windows,
        WrappersMP.SAMPLER_SAMPLE: sampling,
    }


class GatedSampling:
    """The `SAMPLER_SAMPLE` wrapper: a gate for the run, and the run itself, once or twice."""

    context: type[Context] = Context
    """What the gate reads of a run: which prompts it probes, above all."""

    def __init__(self, branches: Sequence[Branch], observer: RunObserver | None = None):
        self.branches = tuple(branches)
        self.observer = observer

    def __call__(
        self,
        executor: Callable[..., torch.Tensor],
        guider: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """Return the sampled latent; the host's signature of a `SAMPLER_SAMPLE` wrapper."""
        started = time.perf_counter()
        gate, extra_args = self._gate(guider, extra_args, latent_image, denoise_mask)

        def sample(levels: torch.Tensor) -> torch.Tensor:
            official = None
            if gate.as_paper:
                official = OfficialSampling.replacing(gate.context, levels, noise, latent_image)
            levels, start = (levels, noise) if official is None else (official.sigmas, official.noise)
            gate.watch(levels)
            out = executor(guider, levels, extra_args, callback, start, latent_image, denoise_mask, disable_pbar)
            return out if official is None else official.finished(out)

        try:
            gate.decide_before(noise.shape, sigmas, latent_image)
            gate.images.read_start(sigmas, noise, latent_image)
            latent = _sampled(gate, sample, sigmas, noise, latent_image)
        finally:  # the gate knows the options that hold it: without this the model would wait for a garbage collection
            extra_args["model_options"]["transformer_options"].pop(GATE)
        self.announce(gate.verdicts(), finished=True)
        if self.observer is not None:
            self.observer(gate.verdicts(), gate.cost(len(noise), time.perf_counter() - started))
        return latent

    def announce(self, verdicts: Sequence[Verdict], finished: bool = False) -> None:
        """Say how things stand, after every decision and at the end."""
        show(verdicts, finished=finished)

    def _gate(
        self,
        guider: Any,
        extra_args: dict[str, Any],
        latent_image: torch.Tensor | None,
        denoise_mask: torch.Tensor | None,
    ) -> tuple[Gate, dict[str, Any]]:
        """The gate of a run, and the sampling function's arguments with the gate and the blend's state in them."""
        branches = self.branches
        run = Run(
            tuple(branch.lora for branch in branches),
            tuple(branch.layers for branch in branches),
            batchable=not any(branch.settings.low_memory for branch in branches),
            outside=frozenset(i for i, branch in enumerate(branches) if branch.settings.resist_adversarial),
        )
        options = carrying(extra_args, **{RUN: run})
        key = model_key(guider.model_patcher)
        context = self.context(guider, run, options["model_options"], key, latent_image, denoise_mask)
        gate = Gate(branches, context, self.announce)
        options["model_options"]["transformer_options"][GATE] = gate
        return gate, options


def _sampled(
    gate: Gate,
    sample: Callable[[torch.Tensor], torch.Tensor],
    sigmas: torch.Tensor,
    noise: torch.Tensor,
    latent_image: torch.Tensor | None,
) -> torch.Tensor:
    """The sampled latent; what shows a concept is generated again, until no image shows one that was not erased yet.

    Each time more samples are erased for more concepts, so it ends.
    """
    rewind, evaluations, latent = _random_state(), gate.run.evaluations, None
    left, levels = gate.images.left(len(noise)), sigmas
    if left is None or not bool(left.all()):
        latent = _attempt(gate, sample, sigmas, noise.shape, rewind)
        left = gate.images.left(len(noise))
    while left is not None:
        rewind()
        evaluations.discard()
        gate.erase_images()
        if latent_image is not None and bool(latent_image.any()) and bool(noise.any()):
            levels = from_more_noise(sigmas, partial(schedule, gate.context))
        redone = _attempt(gate, sample, levels, noise.shape, rewind)
        evaluations.plain = round(evaluations.plain * (len(sigmas) - 1) / (len(levels) - 1))
        if redone is not None:
            chosen = left.to(redone.device).view(-1, *[1] * (redone.ndim - 1))
            latent = redone if latent is None else torch.where(chosen, redone, latent)
        left = gate.images.left(len(noise))
    assert latent is not None
    return latent


def _attempt(
    gate: Gate,
    sample: Callable[[torch.Tensor], torch.Tensor],
    sigmas: torch.Tensor,
    shape: torch.Size,
    rewind: Callable[[], None],
) -> torch.Tensor | None:
    """One run, started again where the gate asks for it; None where every image shows a concept that is left.

    Each time more is detected, so it ends.
    """
    try:
        while True:
            with suppress(Restart):
                latent = sample(sigmas)
                if not gate.decide_rest(shape):
                    break
            rewind()
            gate.run.evaluations.discard()
        gate.images.read_finished(latent)
    except Shown:
        return None
    return latent


def _random_state() -> Callable[[], None]:
    """Note the state of the global random numbers, the GPUs' as well, and return what brings it back."""
    cpu, gpus = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def rewind() -> None:
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)

    return rewind


def _check_decisions(decisions: Sequence[Decision], loras: Sequence[ErasureLora], model: Any) -> None:
    if len(decisions) != len(loras):
        raise ValueError(
            f"got {len(decisions)} decisions and {len(loras)} erasure LoRAs; connect the same Load Erasure LoRA to the "
            "Stability Probe and here"
        )
    key = model_key(model)
    for decision, lora in zip(decisions, loras, strict=True):
        if decision.adapter_key != lora.key:
            raise ValueError(
                f"the decision was made for another erasure LoRA than {lora.name!r}; connect the same Load Erasure "
                "LoRA to the Stability Probe and here"
            )
        if decision.model_key != key:
            raise ValueError(
                f"the decision was made for another model (key {decision.model_key}) than this one (key {key}); "
                "connect the same model, with the same patches, to the Stability Probe and here"
            )
