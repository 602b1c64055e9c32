"""A compact SD 1.x UNet in plain torch, with ComfyUI's (and the original's) parameter names.

Any width works: 64 channels while training ("narrow"), 320 as shipped to ComfyUI ("wide"). Convolutional projections,
eight heads, one residual block a level, eps prediction. It does not know schedules, prompts or images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import NARROW_WIDTH

HEADS = 8
CONTEXT_DIM = 768
CHANNEL_MULT = (1, 2)


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Returns the sinusoidal embedding [B, dim]: cosines, then sines."""
    half = dim // 2
    frequencies = torch.exp(
        -math.log(10000.0) * torch.arange(half, device=timesteps.device, dtype=torch.float32) / half
    )
    angles = timesteps[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Returns softmax(q k^T / sqrt(d)) v; written out, for torch's fused one is far slower here on a CPU."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e4)
    return scores.softmax(dim=-1).to(v.dtype) @ v


class ResBlock(nn.Module):
    """Two convolutions with the time embedding added between them."""

    def __init__(self, n_in: int, n_out: int, n_time: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, n_in), nn.SiLU(), nn.Conv2d(n_in, n_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(n_time, n_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, n_out), nn.SiLU(), nn.Identity(), nn.Conv2d(n_out, n_out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Eight-headed attention; over its own input when no context is given."""

    def __init__(self, dim: int, context_dim: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Identity())

    def forward(
        self, x: Tensor, context: Tensor | None = None, rows: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        source = x if context is None else context
        k, v = self.to_k(source), self.to_v(source)
        if context is not None and rows is not None:
            k, v = k[rows], v[rows]
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.to_q(x), k, v))
        return self.to_out(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Linear layer whose second half gates its first."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU and a linear layer back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each behind a LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn1 = Attention(dim, dim)
        self.ff = FeedForward(dim)
        self.attn2 = Attention(dim, CONTEXT_DIM)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor, rows: Tensor | None, mask: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, rows, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, dim, eps=1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, context: Tensor, rows: Tensor | None, mask: Tensor | None) -> Tensor:
        h = self.proj_in(self.norm(x))
        tokens = h.flatten(2).transpose(1, 2)
        tokens = self.transformer_blocks[0](tokens, context, rows, mask)
        return x + self.proj_out(tokens.transpose(1, 2).reshape(h.shape))


class Downsample(nn.Module):
    """Strided convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """The SD 1.x UNet at a chosen width, eps prediction."""

    def __init__(self, width: int = NARROW_WIDTH) -> None:
        super().__init__()
        self.width = width
        time = 4 * width
        widths = [m * width for m in CHANNEL_MULT]
        self.time_embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(4, width, 3, padding=1)])])
        skips, ch = [width], width
        for level, n in enumerate(widths):
            self.input_blocks.append(nn.ModuleList([ResBlock(ch, n, time), SpatialTransformer(n)]))
            ch = n
            skips.append(ch)
            if level < len(widths) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(ch)]))
                skips.append(ch)
        self.middle_block = nn.ModuleList([ResBlock(ch, ch, time), SpatialTransformer(ch), ResBlock(ch, ch, time)])
        self.output_blocks = nn.ModuleList()
        for level, n in reversed(list(enumerate(widths))):
            for i in range(2):
                layers: list[nn.Module] = [ResBlock(ch + skips.pop(), n, time), SpatialTransformer(n)]
                ch = n
                if level and i == 1:
                    layers.append(Upsample(ch))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(nn.GroupNorm(32, ch), nn.SiLU(), nn.Conv2d(ch, 4, 3, padding=1))

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, rows: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Returns the predicted noise, shaped like `x`.

        Args:
            x: noisy latents [B, 4, H, W].
            timesteps: [B], 0..999.
            context: text states [B, 77, 768], or [U, 77, 768] with `rows`.
            rows: [B], the context of each sample (saves work when captions repeat in a batch).
            mask: boolean, broadcastable to [B, 1, 1, 77]; False hides a text position from cross-attention.
        """
        emb = self.time_embed(timestep_embedding(timesteps, self.width).to(x.dtype))

        def run(layers: nn.Module, h: Tensor) -> Tensor:
            for layer in layers:  # type: ignore[attr-defined]
                if isinstance(layer, ResBlock):
                    h = layer(h, emb)
                elif isinstance(layer, SpatialTransformer):
                    h = layer(h, context, rows, mask)
                else:
                    h = layer(h)
            return h

        h, skips = x, []
        for block in self.input_blocks:
            h = run(block, h)
            skips.append(h)
        h = run(self.middle_block, h)
        for block in self.output_blocks:
            h = run(block, torch.cat([h, skips.pop()], dim=1))
        return self.out(h)
