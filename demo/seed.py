"""The packed demo model: the seed file, and the SD 1.5 checkpoint that it unpacks to. This ships to users.

The seed file (`demo_model.safetensors`) holds a UNet of width 64, a slim autoencoder (a byte a weight), the two working
layers of the text encoder and the embeddings of the words it knows. `unpack_checkpoint` widens the UNet to 320 channels
by copying every channel five times, which changes no output; pads the autoencoder to TAESD's shape; and spreads the
text encoder over CLIP-L's shape. Needs torch and safetensors only. It does not know ComfyUI, sampling, training or the
networks' code (`demo.networks`).

UNet values are stored as the wide model has them, so narrow and wide are the same function up to fp32 summation.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .shapes import (
    LATENT_CHANNELS,
    NARROW_WIDTH,
    TAESD_WIDTH,
    TEXT_LAYERS,
    TEXT_MLP_WIDTH,
    TEXT_WIDTH,
    VOCABULARY,
    WIDE_WIDTH,
)

SEED_PATH = Path(__file__).with_name("demo_model.safetensors")
COPIES = WIDE_WIDTH // NARROW_WIDTH
CLIP_LAYERS = 12
CLIP_MLP = 3072
LICENCE = "CC-BY-4.0"
CREDIT = (
    "trained on Twemoji (Twitter, Inc. and other contributors, CC-BY-4.0), Noto Emoji (Google Inc, Apache-2.0), "
    "Fluent Emoji (Microsoft Corporation, MIT) and FxEmojis (Mozilla, Apache-2.0); see NOTICE"
)
"""Of the demo's weights; NOTICE has the artwork's addresses."""
VAE_SCALE = 0.18215
"""Latent units of ComfyUI's SD 1.5: the UNet sees what the encoder gives, a LATENT is that divided by this."""


# ---------------------------------------------------------------- seed file


def read_seed(path: Path = SEED_PATH) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the seed file's tensors, all as fp16, and its metadata."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    for name in [n for n in tensors if n.endswith(".scale")]:
        scale, weight = tensors.pop(name).float(), name.removesuffix(".scale")
        tensors[weight] = (tensors[weight].float() * scale).half()
    return tensors, metadata


def seed_sha256(path: Path = SEED_PATH) -> str:
    """Returns the sha256 of the seed file, which names the base model on an adapter's card."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_seed(
    path: Path,
    unet: dict[str, Tensor],
    text_encoder: dict[str, Tensor],
    vocabulary: list[int],
    encoder: dict[str, Tensor],
    decoder: dict[str, Tensor],
    notes: dict[str, str],
) -> Path:
    """Writes a seed file from trained narrow state dicts and returns its path.

    Args:
        vocabulary: CLIP token numbers, one a row of the token embedding.
        notes: more metadata, for instance what was trained for how long.
    """
    tensors = {f"unet.{k}": v.float() * _stored_scale(k) for k, v in unet.items()}
    for prefix, state in (("text", text_encoder), ("vae.encoder", encoder), ("vae.decoder", decoder)):
        tensors |= {f"{prefix}.{k}": v for k, v in state.items()}
    metadata = {"format": "unguide-demo-seed-1", "vocabulary": json.dumps(vocabulary), **notes}
    packed = {}
    for name, value in tensors.items():
        value = value.detach().cpu().float()
        if name.startswith("vae.") and value.ndim == 4:  # a byte a weight, a scale a filter
            scale = (value.abs().amax(dim=(1, 2, 3), keepdim=True) / 127).half().clamp_min(1e-6)
            packed[f"{name}.scale"] = scale.contiguous()
            packed[name] = (value / scale.float()).round().clamp(-127, 127).to(torch.int8).contiguous()
        else:
            packed[name] = value.half().contiguous()
    temporary = path.with_suffix(".part")
    save_file(packed, str(temporary), metadata=metadata)
    temporary.replace(path)
    return path


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the fp32 state dict stored under `prefix.`."""
    start = len(prefix) + 1
    return {k[start:]: v.float() for k, v in tensors.items() if k.startswith(f"{prefix}.")}


def narrow_unet_state_dict(path: Path = SEED_PATH) -> dict[str, Tensor]:
    """Returns the UNet of width 64, fp32, with SD 1.x names and no prefix: the same function as the wide one."""
    return {k: v / _stored_scale(k) for k, v in part(read_seed(path)[0], "unet").items()}


def wide_unet_state_dict(path: Path = SEED_PATH) -> dict[str, Tensor]:
    """Returns the UNet of width 320, fp16, with SD 1.x names and no prefix."""
    return {k[5:]: _widen(k[5:], v) for k, v in read_seed(path)[0].items() if k.startswith("unet.")}


# ---------------------------------------------------------------- widening


def _stored_scale(name: str) -> float:
    """Returns what a narrow UNet weight is multiplied with to become the wide one's.

    Inputs copied n times are divided by n; queries also by sqrt(n), for heads of 40 channels scale by 1 / sqrt(40)
    where heads of 8 scale by 1 / sqrt(8).
    """
    if not name.endswith("weight") or _is_norm(name) or _keeps_inputs(name):
        return 1.0
    return 1.0 / (COPIES * math.sqrt(COPIES)) if ".to_q." in name else 1.0 / COPIES


def _is_norm(name: str) -> bool:
    parts = name.split(".")
    return any(p in ("norm", "norm1", "norm2", "norm3") for p in parts) or (
        name.startswith("out.0.") or ".in_layers.0." in name or ".out_layers.0." in name
    )


def _keeps_inputs(name: str) -> bool:
    """True for weights whose inputs are not channels of the UNet: latents, text states, the time embedding."""
    return name in ("input_blocks.0.0.weight", "time_embed.0.weight") or any(
        f".attn2.{p}." in name for p in ("to_k", "to_v")
    )


def _widen(name: str, stored: Tensor) -> Tensor:
    """Returns a stored tensor at the wide shape; copying only, so that it is exact."""
    if name == "out.2.bias":
        return stored
    wide = stored if name == "out.2.weight" else stored.repeat_interleave(COPIES, dim=0)
    if name == "time_embed.0.weight":
        half = NARROW_WIDTH // 2
        spread = wide.new_zeros(wide.shape[0], WIDE_WIDTH)
        spread[:, 0 : WIDE_WIDTH // 2 : COPIES] = wide[:, :half]
        spread[:, WIDE_WIDTH // 2 :: COPIES] = wide[:, half:]
        return spread
    if wide.ndim > 1 and not _keeps_inputs(name):
        wide = wide.repeat_interleave(COPIES, dim=1)
    return wide.contiguous()


def widen_lora(up: Tensor) -> Tensor:
    """Returns the wide `up` [5 d, r] of a narrow attn2.to_k or to_v LoRA; its `down` [r, 768] stays as it is."""
    return up.repeat_interleave(COPIES, dim=0)


# ---------------------------------------------------------------- checkpoint


def clip_state_dict(path: Path = SEED_PATH) -> dict[str, Tensor]:
    """Returns CLIP-L's 196 tensors, fp16: layers 0 and 1 as trained, the other ten without effect."""
    tensors, metadata = read_seed(path)
    state = part(tensors, "text")
    vocabulary = torch.tensor(json.loads(metadata["vocabulary"]))
    width = TEXT_WIDTH
    tokens = torch.zeros(VOCABULARY, width)
    tokens[vocabulary] = state["token_embedding"]
    result = {
        "embeddings.token_embedding.weight": tokens,
        "embeddings.position_embedding.weight": state["position_embedding"],
        "final_layer_norm.weight": state["final_layer_norm.weight"],
        "final_layer_norm.bias": state["final_layer_norm.bias"],
    }
    for i in range(CLIP_LAYERS):
        real = i < TEXT_LAYERS
        at = f"encoder.layers.{i}"
        for norm in ("layer_norm1", "layer_norm2"):
            result[f"{at}.{norm}.weight"] = state[f"layers.{i}.{norm}.weight"] if real else torch.ones(width)
            result[f"{at}.{norm}.bias"] = state[f"layers.{i}.{norm}.bias"] if real else torch.zeros(width)
        for p in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weight, bias = torch.zeros(width, width), torch.zeros(width)
            if real:  # the product in float64, so that fp16 rounds alike on every machine
                up, down = state[f"layers.{i}.{p}.up"].double(), state[f"layers.{i}.{p}.down"].double()
                weight, bias = up @ down, state[f"layers.{i}.{p}.bias"]
            result[f"{at}.self_attn.{p}.weight"], result[f"{at}.self_attn.{p}.bias"] = weight, bias
        fc1, fc1_bias = torch.zeros(CLIP_MLP, width), torch.zeros(CLIP_MLP)
        fc2, fc2_bias = torch.zeros(width, CLIP_MLP), torch.zeros(width)
        if real:
            fc1[:TEXT_MLP_WIDTH], fc1_bias[:TEXT_MLP_WIDTH] = (
                state[f"layers.{i}.fc1.weight"],
                state[f"layers.{i}.fc1.bias"],
            )
            fc2[:, :TEXT_MLP_WIDTH], fc2_bias = state[f"layers.{i}.fc2.weight"], state[f"layers.{i}.fc2.bias"]
        result[f"{at}.mlp.fc1.weight"], result[f"{at}.mlp.fc1.bias"] = fc1, fc1_bias
        result[f"{at}.mlp.fc2.weight"], result[f"{at}.mlp.fc2.bias"] = fc2, fc2_bias
    return {k: v.to(torch.float16).contiguous() for k, v in result.items()}


def pad_to_taesd(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the same function with every hidden width zero-padded to 64.

    Added channels are ReLU(0) = 0 everywhere, so the result is exact.
    """
    padded = {}
    edges = {f"{i}.weight" for i in (0, 1)} | {"14.weight", "19.weight", "14.bias", "19.bias"}
    for name, value in state.items():
        out = value.shape[0] if name in edges and value.shape[0] <= LATENT_CHANNELS else TAESD_WIDTH
        shape = [out, *value.shape[1:]]
        if value.ndim == 4 and value.shape[1] > LATENT_CHANNELS:
            shape[1] = TAESD_WIDTH
        target = value.new_zeros(shape)
        target[tuple(slice(n) for n in value.shape)] = value
        padded[name] = target
    return padded


def checkpoint_state_dict(path: Path = SEED_PATH) -> dict[str, Tensor]:
    """Returns the whole SD 1.5 checkpoint, fp16."""
    tensors, _ = read_seed(path)
    state = {f"model.diffusion_model.{k}": v for k, v in wide_unet_state_dict(path).items()}
    state |= {f"cond_stage_model.transformer.text_model.{k}": v for k, v in clip_state_dict(path).items()}
    for half in ("encoder", "decoder"):
        padded = pad_to_taesd(part(tensors, f"vae.{half}"))
        state |= {f"first_stage_model.taesd_{half}.{k}": v.to(torch.float16) for k, v in padded.items()}
    state["first_stage_model.vae_scale"] = torch.tensor(VAE_SCALE)
    state["first_stage_model.vae_shift"] = torch.tensor(0.0)
    return state


def unpack_checkpoint(destination: Path, seed: Path = SEED_PATH) -> Path:
    """Writes the SD 1.5 checkpoint that ComfyUI's CheckpointLoaderSimple takes, and returns `destination`.

    The same seed gives the same bytes on every machine. A half-written file never has the final name.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(destination.name + ".part")
    metadata = {"base": f"unguide demo model {seed_sha256(seed)}", "licence": LICENCE, "credit": CREDIT}
    save_file(checkpoint_state_dict(seed), str(temporary), metadata=metadata)
    temporary.replace(destination)
    return destination
