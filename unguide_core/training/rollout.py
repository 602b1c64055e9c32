"""Rollouts: sampled trajectories and the latents they pass through. Does not know the model or the host program."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from ..guidance import classifier_free
from ..schedule import (
    from_sigma_space,
    official_run,
    partial_denoise,
    sd_alphas_cumprod,
    sigma_from_alpha_cumprod,
    to_sigma_space,
)
from .recipe import Recipe

log = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out; some accelerators only say so in a general error's message."""
    specific = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    general = getattr(torch, "AcceleratorError", ())
    return isinstance(error, specific) or (isinstance(error, general) and "out of memory" in str(error).lower())


class Predictor(Protocol):
    """A frozen model with an adapter that can be switched on. What a prompt's name stands for is its own business."""

    def __call__(self, z: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the predicted noise, float32, same shape as `z`.

        Args:
            z: variance-preserving latents, [B, C, ...].
            timesteps: 0 to 999, [B].
            prompts: one per latent.
        """

    def adapted(self) -> AbstractContextManager[None]:
        """Within the block the adapted model predicts, with gradients for the adapter."""


@dataclass(frozen=True)
class Draw:
    """The random numbers of one official iteration.

    Args:
        till_t: the official code's `t_enc`: the step of the schedule to stop at.
        timestep: where the models are evaluated, from the run's `probe_timesteps`.
        noise: unit noise to start from, [1, C, ...].
    """

    till_t: int
    timestep: int
    noise: Tensor

    @classmethod
    def random(cls, recipe: Recipe, shape: Sequence[int], generator: torch.Generator) -> "Draw":
        """Return the next one."""
        till_t = int(torch.randint(recipe.schedule_steps, (), generator=generator))
        times = official_run(recipe.schedule_steps, till_t).probe_timesteps
        timestep = int(torch.randint(*times, (), generator=generator))
        return cls(till_t, timestep, torch.randn((1, *shape), generator=generator))


def sampled_timesteps(steps: int) -> list[int]:
    """Return the timesteps of a full denoising in `steps` steps, falling: evenly spaced from 999, without 0."""
    return [round(999 * (1 - i / steps)) for i in range(steps)]


@dataclass(frozen=True)
class Latents:
    """Noisy latents with their prompts.

    Args:
        z: variance-preserving, [N, C, ...].
        timesteps: [N].
        prompts: N of them.
        eps: the noise that was predicted, or that training aims at, [N, C, ...].
    """

    z: Tensor
    timesteps: Tensor
    prompts: tuple[str, ...]
    eps: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice | Tensor) -> "Latents":
        if isinstance(rows, slice):
            return Latents(self.z[rows], self.timesteps[rows], self.prompts[rows], self.eps[rows])
        rows = rows.to(self.z.device)
        prompts = tuple(self.prompts[i] for i in rows.tolist())
        return Latents(self.z[rows], self.timesteps[rows], prompts, self.eps[rows])

    @staticmethod
    def joined(parts: Sequence["Latents"]) -> "Latents":
        """Return all latents of several collections, in order."""
        z, timesteps, eps = (torch.cat([getattr(part, name) for part in parts]) for name in ("z", "timesteps", "eps"))
        return Latents(z, timesteps, tuple(chain.from_iterable(part.prompts for part in parts)), eps)


@dataclass(frozen=True)
class Rollout:
    """A sampled trajectory.

    Args:
        visited: the latents before each step, step by step, with the noise predicted for their prompts.
        latent: the variance-preserving result, [B, C, ...].
    """

    visited: Latents
    latent: Tensor


class Denoiser:
    """Predicts and denoises in batches of limited size, and counts model evaluations (one per latent and prompt).

    Args:
        predict: the predictor.
        neutral: the empty prompt.
        rows: maximum batch size.
        sigmas: the noise level of each timestep, rising, [1000]; None takes Stable Diffusion's.
    """

    def __init__(self, predict: Predictor, neutral: str, rows: int = 32, sigmas: Tensor | None = None):
        self.predict, self.neutral, self.rows = predict, neutral, rows
        self.evaluations, self.note = 0, ""
        self.sigmas = sigma_from_alpha_cumprod(sd_alphas_cumprod()) if sigmas is None else sigmas.double()

    def eps(self, z: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the predicted noise for any number of latents; see `Predictor`.

        If memory runs out while no gradients are computed, it tries again with half the batch size.
        """
        while True:
            parts = [slice(i, i + self.rows) for i in range(0, len(prompts), self.rows)]
            try:
                predicted = torch.cat([self.predict(z[p], timesteps[p], prompts[p]) for p in parts])
            except RuntimeError as error:
                if not is_out_of_memory(error) or torch.is_grad_enabled() or self.rows == 1:
                    raise
                self.halve(len(prompts))
            else:
                self.evaluations += len(prompts)
                return predicted

    def halve(self, rows: int) -> None:
        """Halves the batch size after a batch of `rows` ran out of memory."""
        self.rows = max(1, min(self.rows, rows) // 2)
        self.note = f"Memory ran out: the batch size is now {self.rows}, which is slower."
        log.warning("UnGuide: %s", self.note)

    def rollout(
        self,
        noise: Tensor,
        timesteps: Sequence[int],
        end_sigma: float,
        prompts: Sequence[str],
        guidance_scale: float,
        watch: Callable[[int], None] | None = None,
    ) -> Rollout:
        """Return a deterministic denoising (DDIM) with classifier-free guidance.

        Args:
            noise: unit noise, [B, C, ...].
            timesteps: where the model is evaluated, falling.
            end_sigma: the noise level of the result.
            prompts: one per latent.
            watch: called after every step with the number of latents visited since the last one.
        """
        count, neutral = len(prompts), [self.neutral] * len(prompts)
        levels = [*self.sigmas[list(timesteps)].tolist(), end_sigma]
        visited: list[Latents] = []

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            level, times = float(sigma[0]), torch.full((count,), timesteps[len(visited)], device=x.device)
            z = from_sigma_space(x, level)
            if guidance_scale == 1.0:
                cond = guided = self.eps(z, times, prompts)
            else:
                both = self.eps(torch.cat([z, z]), torch.cat([times, times]), [*prompts, *neutral])
                cond, uncond = both.chunk(2)
                guided = classifier_free(cond, uncond, guidance_scale)
            visited.append(Latents(z, times, tuple(prompts), cond))
            if watch is not None:
                watch(count)
            return x - level * guided

        x = to_sigma_space(noise, levels[0])
        x = partial_denoise(denoise, x, torch.tensor(levels, dtype=torch.float64))
        return Rollout(Latents.joined(visited), from_sigma_space(x, levels[-1]))

    def official_latent(self, draw: Draw, recipe: Recipe, prompt: str) -> Tensor:
        """Return the latent of an official iteration, [1, C, ...], variance-preserving."""
        run = official_run(recipe.schedule_steps, draw.till_t)
        end = float(self.sigmas[run.end_timestep])
        return self.rollout(draw.noise, run.timesteps, end, [prompt], recipe.guidance_scale).latent
