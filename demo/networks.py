"""The seed file's tensors as networks that run without ComfyUI: the narrow UNet, the text encoder, the autoencoder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from . import text, vae
from .seed import SEED_PATH, clip_state_dict, narrow_unet_state_dict, part, read_seed, wide_unet_state_dict
from .shapes import NARROW_WIDTH, TEXT_WIDTH, WIDE_WIDTH
from .unet import UNet


def load_unet(path: Path = SEED_PATH) -> UNet:
    """Returns the narrow UNet, fp32, not training."""
    unet = UNet(NARROW_WIDTH)
    unet.load_state_dict(narrow_unet_state_dict(path))
    return unet.requires_grad_(False).train(False)


def load_text_encoder(path: Path = SEED_PATH) -> text.TextEncoder:
    """Returns the text encoder, fp32, not training, with the very weights that the checkpoint gives ComfyUI."""
    tensors, metadata = read_seed(path)
    encoder = text.TextEncoder(json.loads(metadata["vocabulary"]))
    encoder.load_state_dict(part(tensors, "text"))
    clip = clip_state_dict(path)
    for i, layer in enumerate(encoder.layers):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            dense = nn.Linear(TEXT_WIDTH, TEXT_WIDTH)
            at = f"encoder.layers.{i}.self_attn.{name}"
            dense.load_state_dict({k: clip[f"{at}.{k}"].float() for k in ("weight", "bias")})
            setattr(layer, name, dense)
    return encoder.requires_grad_(False).train(False)


def load_vae(path: Path = SEED_PATH) -> tuple[vae.Encoder, vae.Decoder]:
    """Returns encoder and decoder at their slim widths, fp32, not training; latents in the UNet's units."""
    tensors, _ = read_seed(path)
    encoder, decoder = vae.Encoder(), vae.Decoder()
    encoder.load_state_dict(part(tensors, "vae.encoder"))
    decoder.load_state_dict(part(tensors, "vae.decoder"))
    return encoder.requires_grad_(False).train(False), decoder.requires_grad_(False).train(False)


@torch.no_grad()
def widening_error(path: Path = SEED_PATH) -> float:
    """Returns the largest difference between narrow and wide UNet on random input, both in fp32."""
    wide = UNet(WIDE_WIDTH)
    wide.load_state_dict({k: v.float() for k, v in wide_unet_state_dict(path).items()})
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 768, generator=generator)
    times = torch.tensor([801, 37])
    return float((load_unet(path)(x, times, context) - wide(x, times, context)).abs().max())
