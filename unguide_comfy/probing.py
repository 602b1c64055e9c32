"""The stability probe before a sampling run: the base model's first steps on the prompt, from noise of its own.

The probe denoises a schedule of its own: the user's may be partial (img2img, start_at_step).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.samplers
import torch

from .blending import Run
from .context import Context, carrying
from .deciding import Found, Judge, ProbeSettings
from .erasure import Conditioning, ErasureLora
from .looking import Look
from .trajectories import noise_at, schedule, trajectory


def probe_sigmas(context: Context, settings: ProbeSettings) -> torch.Tensor:
    """Noise levels of the probe's steps and of its end, where it looks, [probe_steps + 1]."""
    return schedule(context, settings.schedule_steps)[: settings.probe_steps + 1]


def look_ahead(context: Context, settings: ProbeSettings, shape: Sequence[int]) -> Look:
    """A look at the end of the probe's own trajectories of the prompt.

    Args:
        shape: of one sample, [C, ...]; `settings.repeats` of them are probed.
    """
    sigmas = probe_sigmas(context, settings)
    start = noise_at(context, float(sigmas[0]), (settings.repeats, *shape), settings.seed)
    return Look(context, trajectory(context, start, sigmas, seed=settings.seed), float(sigmas[-1]))


class ProbeSampler(comfy.samplers.Sampler):
    """A probe run as if it were a sampler: `CFGGuider.sample` loads the model and processes the conditioning for it.

    After sampling, `found` holds what was decided for each erasure LoRA, with all statistics that the inputs allow.
    """

    def __init__(
        self,
        run: Run,
        model_key: str,
        loras: Sequence[ErasureLora],
        settings: ProbeSettings,
        neutral: Conditioning | None = None,
    ):
        self.run, self.model_key, self.loras = run, model_key, loras
        self.settings, self.neutral = settings, neutral
        self.found: list[Found] = []

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
        """The latent that came in: the probe's result is `found`."""
        options = carrying(extra_args, self.run)["model_options"]
        context = Context(model_wrap, self.run, options, self.model_key, latent_image, denoise_mask)
        judge = Judge(context, self.settings, self.neutral, everything=True)
        look = look_ahead(context, self.settings, noise.shape[1:])
        self.found = judge.decide(look, list(enumerate(self.loras)))
        return noise
