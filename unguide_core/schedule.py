"""Noise schedules and a deterministic denoising loop, in sigma space.

A latent in sigma space is x = x0 + sigma * noise (variance exploding), as in k-diffusion and ComfyUI; the official code
uses x_vp = x / sqrt(1 + sigma^2) (variance preserving). Does not know the model: the loop takes any function
denoise(x, sigma) -> x0, guidance included.

Timesteps are Stable Diffusion's discrete 0 to 999. The functions named official_* do exactly what the research code of
arXiv 2508.05755 does, quirks included, because its published numbers depend on them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""denoise(x, sigma): x in sigma space [B, C, ...], sigma [B] -> the predicted x0, [B, C, ...]."""


def sd_betas(timesteps: int = 1000, linear_start: float = 0.00085, linear_end: float = 0.012) -> Tensor:
    """Return Stable Diffusion's noise schedule, float64 [timesteps].

    beta_t = (linear from sqrt(linear_start) to sqrt(linear_end))^2
    """
    return torch.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=torch.float64) ** 2


def sd_alphas_cumprod(timesteps: int = 1000, linear_start: float = 0.00085, linear_end: float = 0.012) -> Tensor:
    """Return the signal's fraction of the variance at each timestep, float64 [timesteps].

    alpha_bar_t = prod_{s <= t} (1 - beta_s)
    """
    return torch.cumprod(1.0 - sd_betas(timesteps, linear_start, linear_end), dim=0)


def sigma_from_alpha_cumprod(alpha_cumprod: Tensor) -> Tensor:
    """Return the noise level in sigma space: sigma = sqrt((1 - alpha_bar) / alpha_bar)."""
    return ((1.0 - alpha_cumprod) / alpha_cumprod).sqrt()


def to_sigma_space(x_vp: Tensor, sigma: float) -> Tensor:
    """Return the variance-preserving latent in sigma space: x = x_vp * sqrt(1 + sigma^2)."""
    return x_vp * math.hypot(1.0, sigma)


def from_sigma_space(x: Tensor, sigma: float) -> Tensor:
    """Return the sigma-space latent in variance-preserving form: x_vp = x / sqrt(1 + sigma^2)."""
    return x / math.hypot(1.0, sigma)


def partial_denoise(
    denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callable[[dict[str, object]], None] | None = None
) -> Tensor:
    """Return the latent that deterministic DDIM (arXiv 2010.02502, eta 0) has at the last of the noise levels.

    x_{i+1} = x0 + (sigma_{i+1} / sigma_i) * (x_i - x0),  x0 = denoise(x_i, sigma_i)

    In sigma space this is Euler's method, which holds for flow models as well.

    Args:
        denoise: see `Denoise`.
        x: the latent at noise level sigmas[0], [B, C, ...].
        sigmas: strictly falling noise levels, [steps + 1]; only the last one may be 0.
        callback: called with {"i", "x", "sigma", "denoised"} after each model evaluation; may raise to stop.
    Raises: ValueError if the noise levels do not fall.
    """
    levels = _falling_levels(sigmas)
    dtype = torch.promote_types(x.dtype, torch.float32)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, x.new_full((x.shape[0],), sigma, dtype=dtype))
        if callback is not None:
            callback({"i": i, "x": x, "sigma": sigma, "denoised": denoised})
        x = denoised + (sigma_next / sigma) * (x - denoised)
    return x


def _falling_levels(sigmas: Tensor) -> list[float]:
    """The validated noise levels as numbers: copied from the device once, so that the loop does not wait for it."""
    levels: list[float] = sigmas.double().tolist() if sigmas.ndim == 1 else []
    falling = all(high > low for high, low in pairwise(levels))
    if not levels or not falling or levels[-1] < 0.0 or not bool(sigmas.isfinite().all()):
        raise ValueError(
            f"the noise levels (shape {list(sigmas.shape)}) are {levels}; "
            "expected strictly falling, finite, non-negative numbers"
        )
    return levels


@dataclass(frozen=True)
class OfficialRun:
    """One denoising run of the official code, full or partial.

    timesteps: where the model is evaluated, falling.
    end_timestep: the timestep of the result's noise level.
    probe_timesteps: [low, high), from which the official probe and trainer sample the timestep at which they evaluate
        the result. It lies above end_timestep: the official code evaluates the latent at a noisier level than its own.
    """

    timesteps: tuple[int, ...]
    end_timestep: int
    probe_timesteps: tuple[int, int]

    def sigmas(self, alphas_cumprod: Tensor) -> Tensor:
        """Return the run's noise levels, [steps + 1], for `partial_denoise`."""
        return sigma_from_alpha_cumprod(alphas_cumprod[[*self.timesteps, self.end_timestep]])


def official_ddim_timesteps(steps: int, timesteps: int = 1000) -> list[int]:
    """Return the official DDIM timesteps, rising.

    range(0, timesteps, timesteps // steps) + 1: if `steps` does not divide `timesteps`, there are more of them than
    `steps` (30 gives 31).

    Raises: ValueError where the official code indexes past the end of its schedule (3, or more than `timesteps` / 2).
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"got {steps} steps; expected 1 to {timesteps}")
    rising = [t + 1 for t in range(0, timesteps, timesteps // steps)]
    if rising[-1] >= timesteps:
        raise ValueError(
            f"{steps} official DDIM steps need timestep {rising[-1]}, past the last one ({timesteps - 1}); "
            "use 10, 20, 25 or 50 steps"
        )
    return rising


def official_run(steps: int, till_t: int = 0, timesteps: int = 1000) -> OfficialRun:
    """Return what the official sampler runs for `steps` DDIM steps, stopped at `till_t`.

    It always drops the noisiest timestep ("50 steps" are 49, from t = 961), and the last step of a full run ends at
    alphas_cumprod[0] instead of a clean image. The loop stops when the index into the shortened list reaches
    till_t - 1, which never happens for 0, 1 and values from its length on: these are full runs. The probe's usual
    settings are till_t = 40 of 50 steps (10 are run) and 8 of 10 (2 are run).

    Args:
        steps: the schedule's number of steps.
        till_t: the official code's `till_T` (also `t_enc`).
    Raises: ValueError as `official_ddim_timesteps`, or if `till_t` is negative.
    """
    if till_t < 0:
        raise ValueError(f"till_t is {till_t}; expected 0 or more")
    rising = official_ddim_timesteps(steps, timesteps)
    first = till_t - 1 if 1 < till_t < len(rising) else 0
    return OfficialRun(
        timesteps=tuple(reversed(rising[first:-1])),
        end_timestep=rising[first - 1] if first > 0 else 0,
        probe_timesteps=(round(till_t / steps * timesteps), round((till_t + 1) / steps * timesteps)),
    )
