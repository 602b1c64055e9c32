"""Stable Diffusion 1.x's noise schedule and a DDIM sampler with classifier-free guidance.

It does not know ComfyUI, prompts or images: latents in, latents out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TRAIN_STEPS = 1000


def alphas_cumprod() -> Tensor:
    """Returns the cumulative products of 1 - beta, [1000], float32; beta is linear in its square root."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def add_noise(latent: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """Returns sqrt(alpha) latent + sqrt(1 - alpha) noise, alpha [B]."""
    alpha = alpha.view(-1, 1, 1, 1)
    return alpha.sqrt() * latent + (1 - alpha).sqrt() * noise


def min_snr_weight(alpha: Tensor, gamma: float = 5.0) -> Tensor:
    """Returns min(SNR, gamma) / SNR, the weight of an eps loss (arXiv 2303.09556, Sec. 3.4)."""
    snr = alpha / (1 - alpha)
    return snr.clamp(max=gamma) / snr


@torch.no_grad()
def ddim(
    predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int = 25, callback: Callable | None = None
) -> Tensor:
    """Returns the latent that deterministic DDIM (eta 0, "trailing" spacing) makes of unit noise.

    Args:
        predict: (latents, timesteps [B]) to predicted noise, guidance included.
        callback: called with (step, denoised) after each step.
    """
    alphas = alphas_cumprod().to(noise.device)
    times = torch.linspace(TRAIN_STEPS - 1, 0, steps + 1).round().long()[:-1]
    x = noise
    for i, t in enumerate(times):
        alpha = alphas[t]
        following = alphas[times[i + 1]] if i + 1 < steps else torch.ones(())
        eps = predict(x, torch.full((x.shape[0],), int(t), device=x.device))
        denoised = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        x = following.sqrt() * denoised + (1 - following).sqrt() * eps
        if callback is not None:
            callback(i, denoised)
    return x


@torch.no_grad()
def sample(
    unet: Callable[..., Tensor],
    context: Tensor,
    neutral: Tensor,
    noise: Tensor,
    guidance_scale: float = 4.0,
    steps: int = 25,
) -> Tensor:
    """Returns latents sampled with classifier-free guidance.

    Args:
        unet: (latents, timesteps, context) to predicted noise.
        context: text states [B, 77, 768], one row a latent.
        neutral: text states of the empty prompt [1, 77, 768].
        noise: unit noise [B, 4, H, W].
    """
    both = torch.cat([context, neutral.expand_as(context)])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = unet(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    return ddim(predict, noise, steps)
