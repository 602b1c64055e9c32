"""The text encoders of SD 1.x (one) and SDXL (two), from a diffusers folder or a checkpoint. Nothing is downloaded."""

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
"""Prefixes of the text encoders in a checkpoint file. SDXL's second one uses OpenCLIP's names."""
OPEN_CLIP_PAD = "!"
"""The padding of SDXL's second text encoder; the others use the end token."""
TOKENS = 77


class ModelError(ValueError):
    """A base model cannot be used; the message says why."""


@dataclass(frozen=True)
class Encoded:
    """An encoded prompt: text states, [77, width], and for SDXL the second encoder's pooled state, [width]."""

    states: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of transformers with its tokenizer."""

    model: Any
    tokenizer: Any

    def __call__(self, prompt: str, device: torch.device) -> Any:
        """Returns the model's output for a prompt, with the states of every layer."""
        tokens = self.tokenizer(prompt, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        return self.model(tokens.input_ids.to(device), output_hidden_states=True)


TextEncoders = tuple[TextEncoder, ...]
"""One for SD 1.x, two for SDXL."""


@torch.no_grad()
def encode(encoders: TextEncoders, prompts: Sequence[str], device: torch.device) -> dict[str, Encoded]:
    """Returns the encoded prompts by name, on the CPU; the encoders are on the device only meanwhile.

    SD 1.x takes the normalised last layer; SDXL the last but one of both encoders, concatenated, and the pooled state.
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
    """Returns the text encoders in a diffusers folder. Raises: OSError or ValueError if they cannot be read."""
    first = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", local_files_only=True)
    encoders = [TextEncoder(_frozen(first), read_tokenizer(tokenizer or path / "tokenizer"))]
    if (path / "text_encoder_2").is_dir():
        second = CLIPTextModelWithProjection.from_pretrained(path, subfolder="text_encoder_2", local_files_only=True)
        words = read_tokenizer(tokenizer, OPEN_CLIP_PAD) if tokenizer else read_tokenizer(path / "tokenizer_2")
        encoders.append(TextEncoder(_frozen(second), words))
    return tuple(encoders)


def from_weights(weights: Mapping[str, Tensor], tokenizer: Path, file: str) -> TextEncoders:
    """Returns the text encoders in a checkpoint's weights.

    Args:
        tokenizer: folder of CLIP's tokenizer, which SDXL's second encoder uses too.
        file: the checkpoint's name, for error messages.
    Raises: ModelError if there are none of SD 1.x or SDXL, or weights are missing.
    """
    if own := _part(weights, SD1):
        return (_clip(own, read_tokenizer(tokenizer)),)
    first, second = (_part(weights, prefix) for prefix in SDXL)
    if first and second:
        return _clip(first, read_tokenizer(tokenizer)), _open_clip(second, read_tokenizer(tokenizer, OPEN_CLIP_PAD))
    places = f"{SD1!r} (SD 1.x) and none under {SDXL[0]!r} and {SDXL[1]!r} (SDXL)"
    raise ModelError(f"{file!r} holds no CLIP under {places}; expected a whole checkpoint of one of the two")


def read_tokenizer(folder: Path, pad: str | None = None) -> Any:
    """Returns CLIP's tokenizer. Raises: ModelError if there is none."""
    filled: dict[str, Any] = {"pad_token": pad} if pad else {}
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, **filled)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"there is no CLIP tokenizer in {str(folder)!r}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's message."""
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
    """A text encoder of transformers, with its configuration detected from its weights in transformers' naming."""
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
