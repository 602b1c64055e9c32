"""Rollouts beside a sampling run: noise of their own, denoised by the base model down to a noise level.

They draw from a generator of their own, so that a run that detects nothing is bit-identical to one without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import comfy.model_management
import comfy.samplers
import torch

from ...unguide_core.schedule import partial_denoise
from .conds import Context, Entry
from .settings import Settings

SCHEDULER = "normal"


def schedule(context: Context, steps: int) -> torch.Tensor:
    """Return the noise levels of a whole schedule, falling, the last one 0, [steps + 1]."""
    return comfy.samplers.calculate_sigmas(context.model.model_sampling, SCHEDULER, steps).to(context.device)


def probe_sigmas(context: Context, settings: Settings) -> torch.Tensor:
    """Return the noise levels down to the one at which the gate probes, [probe_steps + 1]."""
    return schedule(context, settings.probe_schedule_steps)[: settings.probe_steps + 1]


def down_to(sigmas: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return the part of a schedule above a noise level, and that level."""
    above = sigmas[sigmas > sigma * (1.0 + 1e-4)]
    return torch.cat([above, sigmas.new_tensor([sigma])])


def noise_at(context: Context, sigma: float, shape: Sequence[int], seed: int) -> torch.Tensor:
    """Return a latent of pure noise at a level, as the host's samplers start from it; `shape` includes the batch."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*shape, generator=generator).to(context.device)
    sampling = context.model.model_sampling
    at_maximum = sigma >= float(sampling.sigma_max) * (1.0 - 1e-5)
    level = torch.tensor(sigma, device=noise.device)
    return sampling.noise_scaling(level, noise, torch.zeros_like(noise), at_maximum)


def rollout(
    context: Context, latent: torch.Tensor, sigmas: torch.Tensor, positive: Sequence[Entry] | None = None, seed: int = 0
) -> torch.Tensor:
    """Return the latent after the base model's steps through some noise levels, with the guider's own guidance.

    Args:
        latent: at `sigmas[0]`, [B, C, ...].
        positive: processed conditioning in place of the guider's positive one.
    """

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return context.guider(x, sigma, model_options=context.model_options, seed=seed)

    with context.run.predict_with(()), _conditioned(context, positive):
        return partial_denoise(denoise, latent, sigmas, callback=_check_interrupt)


@contextmanager
def _conditioned(context: Context, positive: Sequence[Entry] | None) -> Iterator[None]:
    guider = context.guider
    before = guider.conds
    try:
        if positive is not None:
            guider.conds = {**before, "positive": list(positive)}
        yield
    finally:
        guider.conds = before


def _check_interrupt(state: object) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()
