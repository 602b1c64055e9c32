"""The demo's autoencoder: TAESD's architecture with slim widths.

Images are [B, 3, H, W] in 0..1, latents [B, 4, H/8, W/8] with about unit variance. It does not know ComfyUI; the
scalars that ComfyUI multiplies latents with are added by `demo.seed`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .shapes import LATENT_CHANNELS

WIDTHS = (32, 32, 64, 64)
"""Channels at full, half, quarter and eighth resolution."""


def _conv(n_in: int, n_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=bias)


class Clamp(nn.Module):
    """Soft limit of a latent to -3..3, as TAESD has it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Three convolutions around an identity skip."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(n, n), nn.ReLU(), _conv(n, n), nn.ReLU(), _conv(n, n))
        self.fuse = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.conv(x) + x)


class Encoder(nn.Sequential):
    """Image to latent; module numbers as in TAESD."""

    def __init__(self, widths: tuple[int, int, int, int] = WIDTHS) -> None:
        full, half, quarter, eighth = widths
        super().__init__(
            *(_conv(3, full), Block(full)),
            *(_conv(full, half, 2, bias=False), Block(half), Block(half), Block(half)),
            *(_conv(half, quarter, 2, bias=False), Block(quarter), Block(quarter), Block(quarter)),
            *(_conv(quarter, eighth, 2, bias=False), Block(eighth), Block(eighth), Block(eighth)),
            _conv(eighth, LATENT_CHANNELS),
        )


def _rise(n_in: int, n_out: int) -> tuple[nn.Module, ...]:
    return Block(n_in), Block(n_in), Block(n_in), nn.Upsample(scale_factor=2), _conv(n_in, n_out, bias=False)


class Decoder(nn.Sequential):
    """Latent to image; module numbers as in TAESD."""

    def __init__(self, widths: tuple[int, int, int, int] = WIDTHS) -> None:
        full, half, quarter, eighth = widths
        super().__init__(
            *(Clamp(), _conv(LATENT_CHANNELS, eighth), nn.ReLU()),
            *(*_rise(eighth, quarter), *_rise(quarter, half), *_rise(half, full)),
            *(Block(full), _conv(full, 3)),
        )


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Returns L1 + 2 MSE + half the L1 of the horizontal and vertical differences."""
    error = output - target
    gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * gradients


def psnr(output: Tensor, target: Tensor) -> float:
    """Returns the peak signal-to-noise ratio in dB of images in 0..1, the mean over images."""
    mse = (output.clamp(0, 1) - target).square().mean(dim=(1, 2, 3))
    return float((-10 * mse.clamp_min(1e-10).log10()).mean())
