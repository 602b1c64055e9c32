"""Stable Diffusion 1.x in diffusers, from a checkpoint file or a folder, with an adapter of peft in training.

Checkpoint files are read without any download: the UNet's shape is read off its weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from unguide_core.adapter import Adapter, LowRank
from unguide_core.layers import chosen_layers, weights_hash
from unguide_core.training import Recipe, fresh_layers

NAME = "erasure"
KOHYA = "lora_unet_"
_UNET, _TEXT = "model.diffusion_model.", "cond_stage_model.transformer."


class ModelError(ValueError):
    """A base model cannot be used; the message says why."""


@dataclass
class Base:
    """A frozen base model.

    unet, text, tokenizer: of diffusers and transformers.
    name, hash: for the card.
    """

    unet: Any
    text: Any
    tokenizer: Any
    name: str
    hash: str

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The text states of prompts, [77, width] each."""
        states = {}
        for prompt in prompts:
            tokens = self.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            states[prompt] = self.text(tokens.input_ids.to(self.text.device)).last_hidden_state[0].float()
        return states

    def to(self, device: torch.device, dtype: torch.dtype) -> Base:
        """The same model, moved: the UNet in that precision."""
        torch.nn.Module.to(self.unet, device, dtype)  # diffusers' own warns of what does not concern it
        self.text.to(device)
        return self


def load_base(path: Path, tokenizer: Path | None = None) -> Base:
    """The base model of a checkpoint file or a diffusers folder, float32, frozen.

    Raises: ModelError if it is none, or no Stable Diffusion 1.x.
    """
    base = _from_folder(path, tokenizer) if path.is_dir() else _from_file(path, tokenizer)
    if base.unet.config.addition_embed_type is not None or base.unet.config.cross_attention_dim != 768:
        raise ModelError(
            f"{path.name!r} has text states of width {base.unet.config.cross_attention_dim}; only Stable Diffusion 1.x "
            "(width 768) can be trained here so far: train others in the graph, with the node Train Erasure LoRA"
        )
    base.unet.requires_grad_(False).eval()
    base.text.requires_grad_(False).eval()
    return base


def _from_folder(path: Path, tokenizer: Path | None) -> Base:
    try:
        unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", local_files_only=True)
        text = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", local_files_only=True)
        words = _tokenizer(tokenizer or path / "tokenizer")
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(path)!r} is no folder of a diffusers pipeline: {_first_line(error)}") from error
    unet, text = unet.float(), text.float()
    return Base(unet, text, words, path.name, weights_hash(unet.state_dict().values()))


def _from_file(path: Path, tokenizer: Path | None) -> Base:
    if path.suffix != ".safetensors":
        raise ModelError(f"{path.name!r} is no .safetensors file; others are not opened, for they may run code")
    try:
        weights = {name: tensor.float() for name, tensor in load_file(path).items() if tensor.is_floating_point()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path.name!r} cannot be read: {_first_line(error)}; download it again") from error
    if f"{_UNET}input_blocks.0.0.weight" not in weights:
        raise ModelError(
            f"{path.name!r} holds no UNet under {_UNET!r}; expected a whole Stable Diffusion 1.x checkpoint"
        )
    if not any(name.startswith(_TEXT) for name in weights):
        raise ModelError(f"{path.name!r} holds no CLIP-L under {_TEXT!r}; expected a Stable Diffusion 1.x checkpoint")
    if tokenizer is None:
        raise ModelError(
            "a checkpoint file has no tokenizer: give the folder of CLIP's with --tokenizer, such as ComfyUI's "
            "comfy/sd1_tokenizer"
        )
    config = unet_config({name.removeprefix(_UNET): w for name, w in weights.items() if name.startswith(_UNET)})
    unet: Any = UNet2DConditionModel(**config)
    unet.load_state_dict(convert_ldm_unet_checkpoint(dict(weights), config))
    kept = [tensor for name, tensor in weights.items() if name.startswith(_UNET)]
    return Base(unet, _text_encoder(weights), _tokenizer(tokenizer), path.stem, weights_hash(kept))


def unet_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of diffusers' UNet for the weights of an SD 1.x UNet in the original's names."""
    width = weights["input_blocks.0.0.weight"].shape[0]
    downs = [n for n in range(1, 100) if f"input_blocks.{n}.0.op.weight" in weights]
    pattern = r"input_blocks\.\d+\.0\.in_layers\.0\.weight"
    blocks = sum(re.fullmatch(pattern, name) is not None for name in weights)
    per_level = downs[0] if downs else blocks + 1
    layers = per_level - 1
    channels, attention = [], []
    for level in range(len(downs) + 1):
        first = 1 + level * per_level
        channels.append(weights[f"input_blocks.{first}.0.out_layers.3.weight"].shape[0])
        attention.append(f"input_blocks.{first}.1.proj_in.weight" in weights)
    context = next(w.shape[1] for name, w in weights.items() if name.endswith("attn2.to_k.weight"))
    linear = any(w.ndim == 2 for name, w in weights.items() if name.endswith("proj_in.weight"))
    assert channels[0] == width
    return {
        "in_channels": weights["input_blocks.0.0.weight"].shape[1],
        "out_channels": weights["out.2.weight"].shape[0],
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "cross_attention_dim": context,
        "attention_head_dim": 8,
        "use_linear_projection": linear,
        "addition_embed_type": None,
        "class_embed_type": None,
    }


def _text_encoder(weights: Mapping[str, Tensor]) -> Any:
    own = {name.removeprefix(_TEXT): tensor for name, tensor in weights.items() if name.startswith(_TEXT)}
    numbers = [int(found[1]) for name in own if (found := re.search(r"encoder\.layers\.(\d+)\.", name))]
    embedding = own["text_model.embeddings.token_embedding.weight"]
    with torch.device("meta"):
        config = CLIPTextConfig(
            vocab_size=embedding.shape[0],
            hidden_size=embedding.shape[1],
            intermediate_size=own["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=max(numbers) + 1,
            num_attention_heads=embedding.shape[1] // 64,
            hidden_act="quick_gelu",
        )
    text = CLIPTextModel(config)
    expected = set(text.state_dict())
    if not expected & set(own):  # newer versions of transformers name its layers without the outer model
        own = {name.removeprefix("text_model."): tensor for name, tensor in own.items()}
    missing = expected - set(own) - {name for name in expected if name.endswith("position_ids")}
    if missing:
        raise ModelError(f"the checkpoint's text encoder lacks {len(missing)} weights, such as {min(missing)!r}")
    text.load_state_dict({name: own[name] for name in expected if name in own}, strict=False)
    return text


def _tokenizer(folder: Path) -> Any:
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"there is no CLIP tokenizer in {str(folder)!r}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------- the adapter


def linear_layers(unet: Any) -> dict[str, torch.nn.Linear]:
    """The UNet's linear layers by name."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear)}


def kohya_name(layer: str) -> str:
    """kohya's name of a layer: `lora_unet_down_blocks_0_...`."""
    return KOHYA + layer.replace(".", "_")


def add_adapter(unet: Any, recipe: Recipe, layers: str, pattern: str = "") -> dict[str, LowRank]:
    """Puts an untrained adapter of peft on the UNet; returns its factors by kohya's names.

    They are peft's own parameters, with the initial values that the graph's trainer draws from the same seed.
    """
    linear = linear_layers(unet)
    names = chosen_layers(linear, layers, pattern)
    features = {kohya_name(name): (linear[name].in_features, linear[name].out_features) for name in names}
    fresh = fresh_layers(features, recipe)
    inject(unet, {name: fresh[kohya_name(name)] for name in names})
    modules = dict(unet.named_modules())
    return {
        kohya_name(name): LowRank(
            modules[name].lora_A[NAME].weight, modules[name].lora_B[NAME].weight, modules[name].scaling[NAME]
        )
        for name in names
    }


def inject(unet: Any, layers: Mapping[str, LowRank]) -> None:
    """Puts peft's layers with these values on the UNet's layers, by name. All must have one rank and scale."""
    ranks, scales = {layer.rank for layer in layers.values()}, {layer.scale for layer in layers.values()}
    if len(ranks) != 1 or len(scales) != 1:
        raise ModelError(f"the adapter's layers have ranks {sorted(ranks)} and scales {sorted(scales)}; expected one")
    rank, scale = ranks.pop(), scales.pop()
    alpha: Any = scale * rank  # peft takes any number
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers), init_lora_weights=False)
    inject_adapter_in_model(config, unet, adapter_name=NAME)
    modules = dict(unet.named_modules())
    with torch.no_grad():
        for name, layer in layers.items():
            for factor, values in ((modules[name].lora_A, layer.down), (modules[name].lora_B, layer.up)):
                factor[NAME].to(torch.float32)
                factor[NAME].weight.copy_(values)
                factor[NAME].weight.requires_grad_()


def apply_adapter(unet: Any, adapter: Adapter) -> None:
    """Puts a finished adapter on the UNet, trained here or in the graph. Raises: ModelError if it does not fit."""
    linear = linear_layers(unet)
    by_kohya = {kohya_name(name): name for name in linear}
    layers, missing = {}, []
    for name, layer in adapter.layers.items():
        path = name.removeprefix("diffusion_model.")
        own = by_kohya.get(name) or diffusers_name(path, unet.config.layers_per_block)
        if own in linear:
            layers[own] = layer
        else:
            missing.append(name)
    if missing:
        raise ModelError(
            f"{len(missing)} of the adapter's {len(adapter.layers)} layers, such as {missing[0]!r}, are "
            "none of this model's linear layers; it was made for another architecture"
        )
    inject(unet, layers)


def diffusers_name(path: str, per_level: int) -> str:
    """diffusers' name of a layer in the original's names (`input_blocks.1.1...`), for the layers that are trained."""
    found = re.match(r"(input_blocks|output_blocks|middle_block)\.(\d+)(?:\.(\d+))?\.(.*)", path)
    if not found:
        return path
    block, first, second, rest = found.groups()
    rest = rest.replace("emb_layers.1", "time_emb_proj")
    n = int(first)
    if block == "middle_block":
        inside = f"{second}.{rest}" if second else rest
        return f"mid_block.attentions.0.{inside}" if n == 1 else f"mid_block.resnets.{n // 2}.{inside}"
    kind = "attentions" if second == "1" else "resnets"
    if block == "input_blocks":
        level, index = divmod(n - 1, per_level + 1)
        return f"down_blocks.{level}.{kind}.{index}.{rest}"
    level, index = divmod(n, per_level + 1)
    return f"up_blocks.{level}.{kind}.{index}.{rest}"


class DiffusersPredictor:
    """A UNet of diffusers with a peft adapter, as `unguide_core.training` wants it.

    Args:
        states: text states by prompt.
        autocast: makes the context of mixed precision; None computes as the weights are.
    """

    def __init__(
        self,
        unet: Any,
        states: Mapping[str, Tensor],
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    ):
        self.unet, self.states, self.autocast = unet, states, autocast or nullcontext
        self.tuned = [module for module in unet.modules() if hasattr(module, "lora_A")]
        self.adapting = False
        self._enable(False)

    def __call__(self, z: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        """The predicted noise of each row, float32."""
        states = torch.stack([self.states[prompt] for prompt in prompts]).to(z.device)
        dtype = self.unet.conv_in.weight.dtype
        with self.autocast():
            return self.unet(z.to(dtype), timesteps, states.to(dtype)).sample.float()

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Within the block the adapter acts."""
        if self.adapting:
            yield
            return
        self._enable(True)
        try:
            yield
        finally:
            self._enable(False)

    def relieve(self) -> bool:
        """Turns gradient checkpointing on; whether that was still to be done."""
        if self.unet.is_gradient_checkpointing:
            return False
        self.unet.enable_gradient_checkpointing()
        self.unet.train()  # diffusers checkpoints while training only; the UNet has no dropout
        torch.cuda.empty_cache()
        return True

    def _enable(self, enabled: bool) -> None:
        self.adapting = enabled
        for module in self.tuned:
            # not peft's enable_adapters, which sets requires_grad as well
            module._disable_adapters = not enabled
