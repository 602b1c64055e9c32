"""The stability probe before a sampling run: the base model's first steps on a prompt, from noise of its own.

The probe denoises a schedule of its own: the user's may be partial (img2img, start_at_step). It draws its noise from a
generator of its own, so that a run that detects nothing is bit-identical to one without a probe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.samplers
import torch

from ..unguide_core.probe import Decision
from ..unguide_core.trajectory import partial_denoise
from .blending import Run
from .erasure import Conditioning, ErasureLora
from .looking import Context, Entry, Look, ProbeSettings, carrying

SCHEDULER = "normal"


def probe_sigmas(model: Any, settings: ProbeSettings) -> torch.Tensor:
    """Noise levels of the probe's steps and of its end, where the statistics are taken, [probe_steps + 1]."""
    sigmas = comfy.samplers.calculate_sigmas(model.model_sampling, SCHEDULER, settings.schedule_steps)
    return sigmas[: settings.probe_steps + 1]


class Probe(Look):
    """A look at the end of the probe's own trajectory. Other conditionings are looked at on trajectories of their own.

    Args:
        context, settings, neutral: as for `Look`.
        shape: of one sample, [C, ...]; `settings.repeats` of them are probed.
    """

    def __init__(
        self, context: Context, settings: ProbeSettings, shape: Sequence[int], neutral: Conditioning | None = None
    ):
        self.sigmas = probe_sigmas(context.guider.inner_model, settings).to(context.device)
        self.noise = _noise(context, settings, (settings.repeats, *shape), self.sigmas[0])
        latent = _trajectory(context, settings, self.noise, self.sigmas)
        super().__init__(context, settings, latent, float(self.sigmas[-1]), neutral)

    def influence_on(self, index: int, entries: list[Entry]) -> torch.Tensor:
        """The adapter's influence on another conditioning, on that conditioning's trajectory, [repeats], eps units."""
        latent = _trajectory(self.context, self.settings, self.noise, self.sigmas, entries)
        return self.displacement(index, entries, latent)


def _noise(context: Context, settings: ProbeSettings, shape: Sequence[int], sigma: torch.Tensor) -> torch.Tensor:
    """The latent that every trajectory of a probe starts from, at noise level `sigma`."""
    generator = torch.Generator().manual_seed(settings.seed)
    noise = torch.randn(*shape, generator=generator).to(context.device)
    sampling = context.guider.inner_model.model_sampling
    at_maximum = float(sigma) >= float(sampling.sigma_max) * (1.0 - 1e-5)
    return sampling.noise_scaling(sigma, noise, torch.zeros_like(noise), at_maximum)


def _trajectory(
    context: Context,
    settings: ProbeSettings,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    positive: list[Entry] | None = None,
) -> torch.Tensor:
    """The latent after the probe's steps with the base model and the guider's own guidance.

    Args:
        positive: processed conditioning in place of the guider's positive one.
    """

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return context.guider(x, sigma, model_options=context.model_options, seed=settings.seed)

    with context.run.base_only(), _conditioned(context.guider, positive):
        return partial_denoise(denoise, noise, sigmas, callback=_check_interrupt)


@contextmanager
def _conditioned(guider: Any, positive: list[Entry] | None) -> Iterator[None]:
    before = guider.conds
    try:
        if positive is not None:
            guider.conds = {**before, "positive": positive}
        yield
    finally:
        guider.conds = before


def _check_interrupt(state: object) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


class ProbeSampler(comfy.samplers.Sampler):
    """A probe run as if it were a sampler: `CFGGuider.sample` loads the model and processes the conditioning for it.

    After sampling, `decisions` holds one decision per erasure LoRA.
    """

    def __init__(
        self,
        run: Run,
        loras: Sequence[ErasureLora],
        settings: ProbeSettings,
        neutral: Conditioning | None = None,
        everything: bool = True,
    ):
        self.run, self.loras, self.settings, self.neutral = run, loras, settings, neutral
        self.everything = everything
        self.decisions: list[Decision] = []

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
        """The latent that came in: the probe's result is `decisions`."""
        options = carrying(extra_args, self.run)["model_options"]
        context = Context(model_wrap, self.run, options, latent_image, denoise_mask)
        probe = Probe(context, self.settings, noise.shape[1:], self.neutral)
        self.decisions = [probe.decide(i, lora, everything=self.everything) for i, lora in enumerate(self.loras)]
        return noise
