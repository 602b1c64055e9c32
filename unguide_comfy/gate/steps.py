"""At which step of a schedule a gate probes, and from which noise level on erasing is too late; functions of sigmas."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from math import log

import torch

SETTLED = 0.14
"""Progress after which the base model has settled the image's silhouette: erasing later leaves it, see docs/gate.md."""

IMAGE_SIGMA, IMAGE_SIGMAS = 0.35, (0.02, 0.75)
"""The noise level at which an image is best read during a run, and those between which it can be, see docs/gate.md."""

FROM_NOISE = 0.8
"""An image that shows the concept is generated again from at least this share of the schedule."""


def step_of(sigmas: torch.Tensor, sigma: float) -> int:
    """Return the step, from 0, that a prediction at a noise level belongs to, in a falling or rising schedule."""
    levels = sigmas.tolist()
    falling = levels[0] >= levels[-1]
    passed = [level >= sigma * (1 - 1e-4) if falling else level <= sigma * (1 + 1e-4) for level in levels]
    return max(0, sum(passed) - 1)


def progress(schedule: torch.Tensor, sigma: float) -> float:
    """Return how far a noise level is in denoising: after which share of a schedule's steps it is reached.

    Args:
        schedule: falling noise levels, the last one 0, [steps + 1]; between two of them log sigma is interpolated.
    """
    levels = [-log(level) for level in schedule.tolist()[:-1]]
    if sigma <= 0.0:
        return 1.0
    place = bisect_right(levels, -log(sigma))
    if place in (0, len(levels)):
        return max(0, place - 1) / len(levels)
    low, high = levels[place - 1], levels[place]
    return (place - 1 + (-log(sigma) - low) / (high - low)) / len(levels)


def probing_step(sigmas: torch.Tensor, schedule: torch.Tensor, probe_steps: int) -> int:
    """Return the step at which to probe: the one nearest to the probe's noise level before the silhouette is settled.

    There is one in every schedule; where few steps lead past that level at once, it is the first.

    Args:
        sigmas: the run's noise levels, [steps + 1].
        schedule: the probe's own, whose level after `probe_steps` steps is the probe's noise level.
    """
    wanted = probe_steps / (len(schedule) - 1)
    at = [progress(schedule, sigma) for sigma in sigmas.tolist()[:-1]] or [0.0]
    early = [step for step, reached in enumerate(at) if reached <= max(wanted + 1e-3, SETTLED)]
    return min(early, key=lambda step: abs(at[step] - wanted), default=0)


def is_settled(schedule: torch.Tensor, sigma: float) -> bool:
    """Return whether the base model has settled the image's silhouette by this noise level."""
    return progress(schedule, sigma) > SETTLED


def starts_from_image(sigmas: torch.Tensor, sigma_max: float, latent_image: torch.Tensor | None) -> bool:
    """Return whether a run starts from an image with less noise than pure noise has.

    Args:
        sigma_max: the model's highest noise level.
        latent_image: without noise; all zeros stand for none.
    """
    below = float(sigmas[0]) < sigma_max * (1.0 - 1e-5)
    return below and latent_image is not None and bool(latent_image.any())


def reading_step(sigmas: torch.Tensor) -> int | None:
    """Return the step at which a run's image is read: the one nearest to `IMAGE_SIGMA`; None where none is near."""
    low, high = IMAGE_SIGMAS
    near = {step: abs(log(s / IMAGE_SIGMA)) for step, s in enumerate(sigmas.tolist()[:-1]) if low <= s <= high}
    return min(near, key=near.__getitem__, default=None)


def from_more_noise(sigmas: torch.Tensor, schedule: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """Return a run's noise levels, with others before them if it starts from less than `FROM_NOISE` of a schedule.

    Args:
        schedule: makes the whole schedule of a number of steps, whose levels the run's are completed with.
    """
    fine = schedule(100)
    share = 1.0 - progress(fine, float(sigmas[0]))
    if share >= FROM_NOISE - 0.03:  # schedules of few steps round it
        return sigmas
    steps = len(sigmas) - 1
    whole = schedule(min(round(steps / max(share, 0.01)), max(steps, 20)))
    first = fine[round(100 * (1.0 - FROM_NOISE))]
    between = whole[(whole < first) & (whole > sigmas[0] * 1.02)]
    return torch.cat([first[None], between, sigmas.to(first)]).to(sigmas)
