"""Prompts to what a UNet of Stable Diffusion reads of them: the text encoders of SD 1.x (one) and SDXL (two).

They come from a diffusers folder or from a checkpoint's weights; nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SD1 = "cond_stage_model.transformer."
SDXL = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
"""Where a checkpoint file has its text encoders. SDXL's second is named as OpenCLIP names it."""
OPEN_CLIP_PAD = "!"
"""What fills up SDXL's second prompt; all others are filled up with the end token."""
TOKENS = 77


class ModelError(ValueError):
    """A base model cannot be used; the message says why."""


@dataclass(frozen=True)
class Encoded:
    """One prompt: its text states, [77, width], and for SDXL the pooled state of the second encoder, [width]."""

    states: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of transformers with its tokenizer."""

    model: Any
    tokenizer: Any

    def __call__(self, prompt: str, device: torch.device) -> Any:
        """What the model gives for a prompt, the states after every layer included."""
        tokens = self.tokenizer(prompt, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        return self.model(tokens.input_ids.to(device), output_hidden_states=True)


TextEncoders = tuple[TextEncoder, ...]
"""One for SD 1.x, two for SDXL."""


@torch.no_grad()
def encode(encoders: TextEncoders, prompts: Sequence[str], device: torch.device) -> dict[str, Encoded]:
    """The prompts by name, on the CPU. The encoders are on the device meanwhile only.

    SD 1.x reads the last layer, normed; SDXL the last but one of both encoders, side by side, and the second's pooled
    state.
    """
    for encoder in encoders:
        encoder.model.to(device)
    found = {}
    for prompt in prompts:
        out = [encoder(prompt, device) for encoder in encoders]
        if len(out) == 1:
            found[prompt] = Encoded(out[0].last_hidden_state[0].float().cpu())
        else:
            states = torch.cat([one.hidden_states[-2][0] for one in out], dim=-1)
            found[prompt] = Encoded(states.float().cpu(), out[-1].text_embeds[0].float().cpu())
    for encoder in encoders:
        encoder.model.to("cpu")
    return found


def from_folder(path: Path, tokenizer: Path | None) -> TextEncoders:
    """The text encoders of a diffusers folder. Raises: OSError or ValueError where they cannot be read."""
    first = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", local_files_only=True)
    encoders = [TextEncoder(_frozen(first), read_tokenizer(tokenizer or path / "tokenizer"))]
    if (path / "text_encoder_2").is_dir():
        second = CLIPTextModelWithProjection.from_pretrained(path, subfolder="text_encoder_2", local_files_only=True)
        words = read_tokenizer(tokenizer, OPEN_CLIP_PAD) if tokenizer else read_tokenizer(path / "tokenizer_2")
        encoders.append(TextEncoder(_frozen(second), words))
    return tuple(encoders)


def from_weights(weights: Mapping[str, Tensor], tokenizer: Path, file: str) -> TextEncoders:
    """The text encoders in a checkpoint's weights.

    Args:
        tokenizer: folder of CLIP's; SDXL's second encoder reads the same words.
        file: named in errors.
    Raises: ModelError if there are none of SD 1.x or SDXL, or not all their weights.
    """
    if own := _part(weights, SD1):
        return (_clip(own, read_tokenizer(tokenizer)),)
    first, second = (_part(weights, prefix) for prefix in SDXL)
    if first and second:
        return _clip(first, read_tokenizer(tokenizer)), _open_clip(second, read_tokenizer(tokenizer, OPEN_CLIP_PAD))
    places = f"{SD1!r} (SD 1.x) and none under {SDXL[0]!r} and {SDXL[1]!r} (SDXL)"
    raise ModelError(f"{file!r} holds no CLIP under {places}; expected a whole checkpoint of one of the two")


def read_tokenizer(folder: Path, pad: str | None = None) -> Any:
    """CLIP's tokenizer. Raises: ModelError if there is none."""
    filled: dict[str, Any] = {"pad_token": pad} if pad else {}
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, **filled)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"there is no CLIP tokenizer in {str(folder)!r}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an exception says, shortly."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _clip(weights: Mapping[str, Tensor], tokenizer: Any) -> TextEncoder:
    return _built(CLIPTextModel, weights, tokenizer, hidden_act="quick_gelu")


def _open_clip(weights: Mapping[str, Tensor], tokenizer: Any) -> TextEncoder:
    projection = weights.get("text_projection")
    if projection is None:
        raise ModelError("the checkpoint's second text encoder lacks its 'text_projection'; download it again")
    named = convert_open_clip_checkpoint(None, dict(weights), prefix="")
    return _built(CLIPTextModelWithProjection, named, tokenizer, hidden_act="gelu", projection_dim=projection.shape[1])


def _built(kind: Any, weights: Mapping[str, Tensor], tokenizer: Any, **config: Any) -> TextEncoder:
    """A text encoder of transformers whose shape is read off its weights, in transformers' names."""
    numbers = [int(found[1]) for name in weights if (found := re.search(r"encoder\.layers\.(\d+)\.", name))]
    vocabulary, width = weights["text_model.embeddings.token_embedding.weight"].shape
    model = kind(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=weights["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=max(numbers) + 1,
            num_attention_heads=max(1, width // 64),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **config,
        )
    )
    expected = set(model.state_dict())
    if not expected & set(weights):  # newer versions of transformers name its layers without the outer model
        weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    missing = expected - set(weights) - {name for name in expected if name.endswith("position_ids")}
    if missing:
        raise ModelError(f"the checkpoint's text encoder lacks {len(missing)} weights, such as {min(missing)!r}")
    model.load_state_dict({name: weights[name] for name in expected if name in weights}, strict=False)
    return TextEncoder(_frozen(model), tokenizer)


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _frozen(model: Any) -> Any:
    return model.float().requires_grad_(False).eval()
