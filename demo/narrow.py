"""The narrow demo model at work: prompts to keys and values, and predictions.

An erasure adapter of the demo changes nothing but the keys and values that cross-attention takes from the text. So what
a prompt does under an adapter is a *table*, those keys and values, computed once and read at every step; prompts
share a batch as rows of one table. It does not know training, sampling or images.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from unguide_core.adapter import LowRank
from unguide_core.adapter.lowrank import weights_hash
from unguide_core.schedule import sd_alphas_cumprod, sigma_from_alpha_cumprod

from .networks import load_text_encoder, load_unet
from .seed import SEED_PATH, wide_unet_state_dict
from .text import TextEncoder, Tokenizer
from .unet import UNet

Layers = Mapping[str, LowRank]
"""An adapter's changes by module path in the UNet, such as `input_blocks.1.1.transformer_blocks.0.attn2.to_k`."""

Table = dict[str, Tensor]
"""Keys or values of prompts by module path, each [prompts, 77, channels]."""

LATENT = (4, 8, 8)
ADAPTED = ("attn2.to_k", "attn2.to_v")

SIGMAS = sigma_from_alpha_cumprod(sd_alphas_cumprod())
"""The noise level of each timestep, float64 [1000], rising."""


def timestep_of(sigma: Tensor) -> Tensor:
    """Returns the timesteps whose noise levels are nearest in the logarithm, as ComfyUI finds them; same shape."""
    return (sigma.double().log()[..., None] - SIGMAS.log()).abs().argmin(-1)


class Narrow:
    """The frozen narrow UNet and its text encoder.

    Args:
        unet, text, tokenizer: of the demo model.
        base_hash: what names them on an adapter's card.
    """

    def __init__(self, unet: UNet, text: TextEncoder, tokenizer: Tokenizer, base_hash: str) -> None:
        self.unet, self.text, self.tokenizer = unet.requires_grad_(False), text.requires_grad_(False), tokenizer
        self.layers = {name: module for name, module in unet.named_modules() if name.endswith(ADAPTED)}
        self.base_hash = base_hash
        self._states: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Returns the text states of prompts, [prompts, 77, 768]."""
        for prompt in prompts:
            if prompt not in self._states:
                self._states[prompt] = self.text(self.tokenizer([prompt]))[0]
        return torch.stack([self._states[prompt] for prompt in prompts])

    @torch.no_grad()
    def table(self, states: Tensor) -> Table:
        """Returns the base model's keys and values of text states [prompts, 77, 768]."""
        return {name: torch.nn.functional.linear(states, layer.weight) for name, layer in self.layers.items()}

    def eps(self, x: Tensor, timesteps: Tensor, table: Table, rows: Tensor) -> Tensor:
        """Returns the predicted noise.

        Args:
            x: variance-preserving latents, [B, 4, H, W].
            timesteps: [B].
            table, rows: each sample's prompt is row `rows[i]` of the table.
        """
        for name, layer in self.layers.items():
            layer.forward = lambda _, values=table[name]: values
        return self.unet(x, timesteps, next(iter(table.values())), rows)


def adapted_table(table: Table, states: Tensor, layers: Layers) -> Table:
    """Returns a table under an adapter; gradients flow into the adapter.

    Args:
        table: the base model's, of the same text states.
        states: [prompts, 77, 768].
    """
    return {name: values + layers[name].delta(states) for name, values in table.items()}


def load_narrow(tokenizer: Path, seed: Path = SEED_PATH) -> Narrow:
    """Returns the packed demo model at its narrow width.

    Args:
        tokenizer: ComfyUI's folder `comfy/sd1_tokenizer`.
    """
    return Narrow(load_unet(seed), load_text_encoder(seed), Tokenizer(tokenizer), base_hash(seed))


@lru_cache(maxsize=2)
def base_hash(seed: Path = SEED_PATH) -> str:
    """Returns what an adapter's card has as `base_hash`, by the one rule of all trainers: of the checkpoint's UNet."""
    return weights_hash(wide_unet_state_dict(seed).values())


_loaded: list[Narrow] = []


def start_worker(tokenizer: Path, seed: Path) -> None:
    """Loads the model in a process of its own, on one core; see `worker_model`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    _loaded.append(load_narrow(tokenizer, seed))


def worker_model() -> Narrow:
    """Returns the model of this process."""
    return _loaded[0]
