"""The research code of arXiv 2508.05755 inside the host, oddities included: its schedule, its probe, its weights.

Its published numbers depend on what it does: the noisiest step is dropped, the last one ends above zero, the probe
evaluates its latents at a noisier level than they have, and an unrelated prompt gets weight 2. See
`unguide_core.schedule.official_run`. For ordinary use the other ways to decide are better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...unguide_core.probe import Decision, decide_by, paper_statistic
from ...unguide_core.schedule import OfficialRun, from_sigma_space, official_run
from ..lora.load import Conditioning, ErasureLora
from ..probe.conds import Context, Entry
from ..probe.predictions import Predictions, Subject
from ..probe.rollout import rollout
from ..probe.settings import Settings

WEIGHTS = (-1.0, 2.0)
TIMESTEPS = 1000


@dataclass(frozen=True)
class Start:
    """What the official probe samples at random, one per repeat.

    Args:
        codes: variance-preserving noise, [repeats, C, H, W].
        timesteps: at which the end of the rollout is evaluated, [repeats].
    """

    codes: torch.Tensor
    timesteps: torch.Tensor

    @staticmethod
    def random(settings: Settings, shape: Sequence[int]) -> Start:
        """Return random ones from a generator of their own; the official code uses the global one."""
        generator = torch.Generator().manual_seed(settings.seed)
        codes = torch.randn(settings.repeats, *shape, generator=generator)
        low, high = _probe_run(settings).probe_timesteps
        return Start(codes, torch.randint(low, high, (settings.repeats,), generator=generator))


def decide_as_paper(
    context: Context,
    settings: Settings,
    shape: Sequence[int],
    loras: Sequence[tuple[int, ErasureLora]],
    start: Start | None = None,
) -> list[tuple[Decision]]:
    """Return the official rule's decisions: the mean influence on the prompt strictly above that on the neutral prompt.

    Args:
        shape: of one sample, [C, H, W].
        loras: with their numbers in the run.
        start: what is otherwise drawn from the settings' seed.
    Raises: ValueError for a model without Stable Diffusion's schedule, or without a neutral or negative prompt.
    """
    start = start or Start.random(settings, shape)
    decisions = []
    prompt = _probe(context, settings, start, context.prompt)
    neutrals: dict[int, tuple[Predictions, Subject]] = {}
    for index, lora in loras:
        conditioning = settings.neutral if settings.neutral is not None else lora.neutral
        if id(conditioning) not in neutrals:
            neutrals[id(conditioning)] = _probe(context, settings, start, _entries(context, conditioning, start))
        values = [there.influence(subject, index) for there, subject in (prompt, neutrals[id(conditioning)])]
        decision = decide_by(
            [paper_statistic(*values)],
            *WEIGHTS,
            reason="paper, by the official code's probe",
            model_key=context.model_key,
            adapter_key=lora.key,
            sigma=prompt[0].level,
        )
        decisions.append((decision,))
    return decisions


def _entries(context: Context, conditioning: Conditioning | None, start: Start) -> list[Entry]:
    if conditioning is not None:
        return context.retargeted(context.prompt[0], conditioning, start.codes[:1].to(context.device), seed=0)
    if not context.negative:
        raise ValueError(
            "deciding as the paper compares with a neutral prompt; connect a CLIP to Load Erasure LoRA, or a negative "
            "prompt"
        )
    return context.negative


def _probe(context: Context, settings: Settings, start: Start, entries: Sequence[Entry]) -> tuple[Predictions, Subject]:
    """Predictions at the end of a prompt's rollout, at the timesteps that the official code takes it for."""
    sigmas = sigmas_of(context, _probe_run(settings))
    codes = start.codes.to(context.device)
    latent = rollout(context, codes * torch.hypot(sigmas[0], torch.ones(())), sigmas, entries, settings.seed)
    evaluated = _levels(context)[start.timesteps.to(context.device)]
    scale = (1.0 + evaluated.square()).sqrt().view(-1, *[1] * (latent.ndim - 1))
    there = Predictions(context, from_sigma_space(latent, float(sigmas[-1])) * scale, evaluated)
    return there, Subject(("official", id(entries)), tuple(entries))


def _probe_run(settings: Settings) -> OfficialRun:
    return official_run(settings.probe_schedule_steps, settings.probe_schedule_steps - settings.probe_steps)


def _levels(context: Context) -> torch.Tensor:
    """The noise level of each timestep, [1000]."""
    levels = getattr(context.model.model_sampling, "sigmas", None)
    if levels is None or len(levels) != TIMESTEPS:
        raise ValueError(
            f"deciding as the paper repeats code for Stable Diffusion's schedule of {TIMESTEPS} timesteps, and "
            f"{type(context.model).__name__} has another; decide during or before sampling"
        )
    return levels.to(context.device)


def sigmas_of(context: Context, run: OfficialRun) -> torch.Tensor:
    """Return the noise levels of an official run, [steps + 1]."""
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
        """Return the official run of as many steps as `sigmas` has.

        Raises: ValueError where there is an image to start from, which the official code does not know.
        """
        if context.denoise_mask is not None or (latent is not None and bool(latent.any())):
            raise ValueError(
                "deciding as the paper generates from noise alone, and an image or mask is connected; use an empty "
                "latent, or decide during or before sampling"
            )
        levels = sigmas_of(context, official_run(len(sigmas) - 1))
        first = float(levels[0])
        return OfficialSampling(levels, noise * ((1.0 + first**2) ** 0.5 / first))

    def finished(self, latent: torch.Tensor) -> torch.Tensor:
        """Return the official code's final latent: variance-preserving, at the last level, which is not zero."""
        return from_sigma_space(latent, float(self.sigmas[-1]))
