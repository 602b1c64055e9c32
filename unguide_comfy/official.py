"""The research code of arXiv 2508.05755 inside the host, oddities included: its schedule, its probe, its weights.

Its published numbers depend on what it does: the noisiest step is dropped, the last one ends above zero, the probe
evaluates its latents at a noisier level than they have, and an unrelated prompt gets weight 2. See
`unguide_core.trajectory.official_run`. For ordinary use the other gate modes are better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..unguide_core.probe import decide_by, paper_statistic
from ..unguide_core.trajectory import OfficialRun, from_sigma_space, official_run
from .context import Context, Entry
from .deciding import Found, ProbeSettings
from .erasure import Conditioning, ErasureLora
from .looking import Look, Subject
from .trajectories import trajectory

WEIGHTS = (-1.0, 2.0)
TIMESTEPS = 1000


@dataclass(frozen=True)
class Start:
    """What the official probe draws at random, one per repeat.

    Args:
        codes: variance-preserving noise, [repeats, C, H, W].
        timesteps: at which the end of the trajectory is evaluated, [repeats].
    """

    codes: torch.Tensor
    timesteps: torch.Tensor

    @staticmethod
    def drawn(settings: ProbeSettings, shape: Sequence[int]) -> Start:
        """From a generator of its own: the official code's draws hang on its global random numbers."""
        generator = torch.Generator().manual_seed(settings.seed)
        codes = torch.randn(settings.repeats, *shape, generator=generator)
        low, high = _probe_run(settings).probe_timesteps
        return Start(codes, torch.randint(low, high, (settings.repeats,), generator=generator))


def decide_officially(
    context: Context,
    settings: ProbeSettings,
    shape: Sequence[int],
    loras: Sequence[tuple[int, ErasureLora]],
    neutral: Conditioning | None = None,
    start: Start | None = None,
) -> list[Found]:
    """The official probe and rule: the mean influence on the prompt strictly above that on the neutral prompt.

    Args:
        shape: of one sample, [C, H, W].
        loras: with their numbers in the run.
        start: what is otherwise drawn from the settings' seed.
    Raises: ValueError for a model without Stable Diffusion's schedule, or without a neutral or negative prompt.
    """
    start = start or Start.drawn(settings, shape)
    found = []
    prompt = _look(context, settings, start, context.prompt)
    neutrals: dict[int, Any] = {}
    for index, lora in loras:
        conditioning = neutral if neutral is not None else lora.neutral
        if id(conditioning) not in neutrals:
            neutrals[id(conditioning)] = _look(context, settings, start, _entries(context, conditioning, start))
        values = [look.influence(subject, index) for look, subject in (prompt, neutrals[id(conditioning)])]
        decision = decide_by(
            [paper_statistic(*values)],
            *WEIGHTS,
            reason="paper, by the official code's probe",
            model_key=context.model_key,
            adapter_key=lora.key,
        )
        found.append(Found((decision,), None, prompt[0].level))
    return found


def _entries(context: Context, conditioning: Conditioning | None, start: Start) -> list[Entry]:
    if conditioning is not None:
        return context.retargeted(context.prompt[0], conditioning, start.codes[:1].to(context.device), seed=0)
    if not context.negative:
        raise ValueError("the gate mode 'official' compares with a neutral prompt; connect one, or a negative prompt")
    return context.negative


def _look(context: Context, settings: ProbeSettings, start: Start, entries: Sequence[Entry]) -> tuple[Look, Subject]:
    """A look at the end of a prompt's trajectory, at the timesteps that the official code takes it for."""
    run = _probe_run(settings)
    sigmas = sigmas_of(context, run)
    codes = start.codes.to(context.device)
    latent = trajectory(context, codes * torch.hypot(sigmas[0], torch.ones(())), sigmas, entries, settings.seed)
    evaluated = _levels(context)[start.timesteps.to(context.device)]
    scale = (1.0 + evaluated.square()).sqrt().view(-1, *[1] * (latent.ndim - 1))
    look = Look(context, from_sigma_space(latent, float(sigmas[-1])) * scale, evaluated)
    return look, Subject(("official", id(entries)), tuple(entries))


def _probe_run(settings: ProbeSettings) -> OfficialRun:
    return official_run(settings.schedule_steps, settings.schedule_steps - settings.probe_steps)


def _levels(context: Context) -> torch.Tensor:
    """The noise level of each timestep, [1000]."""
    levels = getattr(context.model.model_sampling, "sigmas", None)
    if levels is None or len(levels) != TIMESTEPS:
        raise ValueError(
            f"the gate mode 'official' repeats code for Stable Diffusion's schedule of {TIMESTEPS} timesteps, and "
            f"{type(context.model).__name__} has another; use the mode 'trajectory' or 'probe'"
        )
    return levels.to(context.device)


def sigmas_of(context: Context, run: OfficialRun) -> torch.Tensor:
    """The noise levels of an official run, [steps + 1]."""
    return _levels(context)[torch.tensor([*run.timesteps, run.end_timestep], device=context.device)]


@dataclass(frozen=True)
class OfficialSampling:
    """The official schedule in place of a sampling run's own.

    Args:
        sigmas: its noise levels.
        noise: the run's, so that the host starts from it as the official code does: unscaled, at the second level.
    """

    sigmas: torch.Tensor
    noise: torch.Tensor

    @staticmethod
    def replacing(
        context: Context, sigmas: torch.Tensor, noise: torch.Tensor, latent: torch.Tensor | None
    ) -> OfficialSampling:
        """The official run of as many steps as `sigmas` has.

        Raises: ValueError where there is a picture to start from, which the official code does not know.
        """
        if context.denoise_mask is not None or (latent is not None and bool(latent.any())):
            raise ValueError(
                "the gate mode 'official' draws from noise alone, and a picture or mask is connected; use an empty "
                "latent, or the mode 'trajectory' or 'probe'"
            )
        levels = sigmas_of(context, official_run(len(sigmas) - 1))
        first = float(levels[0])
        return OfficialSampling(levels, noise * ((1.0 + first**2) ** 0.5 / first))

    def finished(self, latent: torch.Tensor) -> torch.Tensor:
        """The official code's final latent: variance-preserving, at the last level, which is not zero."""
        return from_sigma_space(latent, float(self.sigmas[-1]))
