"""How an erasure adapter is trained: the recipe and its presets.

official    the research code's loop (arXiv 2508.05755): each iteration denoises one latent from noise with the
            adapted model and trains there; about 54 model evaluations an iteration
selective   the same target at many latents of full rollouts, each used several times, with the base model's
            predictions computed once; prompts to keep are held to the base model as well
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..schedule import official_ddim_timesteps
from .prompts import TrainingPrompts

OFFICIAL, SELECTIVE = "official", "selective"
LOOPS = (OFFICIAL, SELECTIVE)


@dataclass(frozen=True)
class Recipe:
    """How an erasure adapter is trained; stored in its card.

    Args:
        loop: "official" or "selective".
        iterations: maximum number of optimiser steps.
        rate_down, rate_up: Adam's learning rates; the selective loop lowers that of `up` linearly to 0.
        rank, alpha: of every layer; scale = alpha / rank.
        negative_guidance: eta of `erasure_target`.
        guidance_scale: classifier-free guidance of the rollouts.
        schedule_steps: of the rollouts; the official loop stops after a random number of them.
        batch: latents of prompts to erase per iteration.
        preserved, preservation_weight: latents of prompts to keep per iteration, and the weight of their loss.
        trajectories: number of trajectories in a rollout of the selective loop: half on the prompts that share the
            reference of the concept's own, half on the others (in scenes), each half in turn.
        refresh: iterations after which the selective loop samples a new rollout with the adapter as it is then.
        kept_trajectories: the base model's trajectories on prompts to keep, sampled once; at least one per prompt. 0
            keeps none.
        check: iterations between measurements of the held-out loss; 0 never measures and never stops early.
        patience: measurements in a row without improvement after which training stops.
        seed: of all random numbers.
    Raises: ValueError for values out of range.
    """

    loop: str = SELECTIVE
    iterations: int = 100
    rate_down: float = 5e-3
    rate_up: float = 5e-4
    rank: int = 8
    alpha: float = 64.0
    negative_guidance: float = 2.0
    guidance_scale: float = 4.0
    schedule_steps: int = 10
    batch: int = 4
    preserved: int = 8
    preservation_weight: float = 10.0
    trajectories: int = 12
    refresh: int = 34
    kept_trajectories: int = 24
    check: int = 20
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loop not in LOOPS:
            raise ValueError(f"the training loop is {self.loop!r}; expected one of {', '.join(LOOPS)}")
        for name in ("iterations", "rank", "schedule_steps", "batch", "trajectories", "refresh", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("preserved", "kept_trajectories", "check"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("rate_down", "rate_up", "alpha"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number above 0")
        for name in ("negative_guidance", "guidance_scale", "preservation_weight"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number from 0 on")
        if self.loop == OFFICIAL:
            official_ddim_timesteps(self.schedule_steps)

    def with_rates(self, up: float | None, down: float | None = None) -> "Recipe":
        """Return the recipe with other learning rates; `up` alone changes both by the same factor."""
        if down is None:
            down = self.rate_down if up is None else up * self.rate_down / self.rate_up
        return replace(self, rate_up=self.rate_up if up is None else up, rate_down=down)

    def with_rank(self, rank: int | None, alpha: float | None = None) -> "Recipe":
        """Return the recipe with another rank and alpha; `rank` alone keeps the scale."""
        rank = self.rank if rank is None else rank
        return replace(self, rank=rank, alpha=self.alpha / self.rank * rank if alpha is None else alpha)

    def trained_prompts(self, prompts: TrainingPrompts) -> TrainingPrompts:
        """Return the prompts that the recipe's loop uses: the official one trains the concept's own prompt only."""
        return prompts if self.loop != OFFICIAL else TrainingPrompts(prompts.erased[:1], (), prompts.neutral)

    def to_settings(self) -> dict[str, Any]:
        """Return the card's `settings`: everything but rank and alpha, which have fields of their own."""
        return {name: value for name, value in asdict(self).items() if name not in ("rank", "alpha")}


PRESETS: dict[str, Recipe] = {
    "paper": Recipe(
        OFFICIAL,
        iterations=200,
        rate_down=3e-5,
        rate_up=3e-5,
        rank=1,
        alpha=8.0,
        guidance_scale=9.0,
        schedule_steps=50,
        batch=1,
        preserved=0,
        preservation_weight=0.0,
        kept_trajectories=0,
        check=0,
    ),
    "selective": Recipe(),
}
