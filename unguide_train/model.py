"""Stable Diffusion 1.x and SDXL in diffusers, from a checkpoint file or a folder, with an adapter of peft in training.

Checkpoint files are read without any download: the UNet's shape is read off its weights. Prompts are text.py's.
"""

from __future__ import annotations

import json
import logging
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

from unguide_core.adapter import Adapter, LowRank
from unguide_core.layers import chosen_layers, weights_hash
from unguide_core.training import Recipe, fresh_layers

from . import text
from .text import Encoded, ModelError, TextEncoders, first_line

log = logging.getLogger("unguide_train")

NAME = "erasure"
KOHYA = "lora_unet_"
_UNET = "model.diffusion_model."
_OTHER_SAMPLING = ("v_pred", "edm_mean", "edm_vpred.sigma_max")
"""What marks a checkpoint whose UNet predicts something else than the noise."""
TIME_ID_WIDTH = 256
"""Of the embedding of each of the six numbers that SDXL reads besides: sizes and crop."""
_HEAD = 64
"""Channels of an attention head in SD 2.x and SDXL, whose projections are linear; SD 1.x has eight heads."""


@dataclass
class Base:
    """A frozen base model.

    unet: of diffusers.
    texts: its text encoders.
    name, hash: for the card.
    """

    unet: Any
    texts: TextEncoders
    name: str
    hash: str

    @property
    def size(self) -> int:
        """Of the pictures that it was trained on, in pixels."""
        return 1024 if self.unet.config.addition_embed_type else 512

    def encode(self, prompts: Sequence[str], device: torch.device | None = None) -> dict[str, Encoded]:
        """What the UNet reads of prompts."""
        return text.encode(self.texts, prompts, device or torch.device("cpu"))

    def to(self, device: torch.device, dtype: torch.dtype) -> Base:
        """The same model, its UNet moved, in that precision."""
        torch.nn.Module.to(self.unet, device, dtype)  # diffusers' own warns of what does not concern it
        return self


def load_base(path: Path, tokenizer: Path | None = None) -> Base:
    """The base model of a checkpoint file or a diffusers folder, float32, frozen.

    Raises: ModelError if it is none, or neither a Stable Diffusion 1.x nor an SDXL that predicts the noise.
    """
    base = _from_folder(path, tokenizer) if path.is_dir() else _from_file(path, tokenizer)
    config, widths = base.unet.config, [encoder.model.config.hidden_size for encoder in base.texts]
    sdxl = len(widths) == 2
    known = config.addition_embed_type == "text_time" if sdxl else widths == [768] and not config.addition_embed_type
    if config.in_channels != 4:
        raise ModelError(
            f"{path.name!r} takes latents of {config.in_channels} channels, as inpainting models do; expected 4: train "
            "on the model that draws whole pictures"
        )
    if config.cross_attention_dim != sum(widths) or not known:
        raise ModelError(
            f"{path.name!r} has a UNet for text states of width {config.cross_attention_dim} and text encoders of "
            f"{' + '.join(map(str, widths))}, which makes neither a Stable Diffusion 1.x (768) nor an SDXL (768 + "
            "1280): train others in the graph, with the node Train Erasure LoRA"
        )
    base.unet.requires_grad_(False).eval()
    return base


def _from_folder(path: Path, tokenizer: Path | None) -> Base:
    try:
        unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", local_files_only=True).float()
        texts = text.from_folder(path, tokenizer)
        scheduler = path / "scheduler" / "scheduler_config.json"
        predicts = json.loads(scheduler.read_text()).get("prediction_type", "epsilon") if scheduler.exists() else ""
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(path)!r} is no folder of a diffusers pipeline: {first_line(error)}") from error
    if predicts not in ("", "epsilon"):
        raise ModelError(_predicting(path, repr(predicts)))
    return Base(unet, texts, path.name, weights_hash(unet.state_dict().values()))


def _from_file(path: Path, tokenizer: Path | None) -> Base:
    if path.suffix != ".safetensors":
        raise ModelError(f"{path.name!r} is no .safetensors file; others are not opened, for they may run code")
    try:
        weights = {name: tensor.float() for name, tensor in load_file(path).items() if tensor.is_floating_point()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path.name!r} cannot be read: {first_line(error)}; download it again") from error
    if f"{_UNET}input_blocks.0.0.weight" not in weights:
        raise ModelError(
            f"{path.name!r} holds no UNet under {_UNET!r}; expected a whole checkpoint of Stable Diffusion 1.x or SDXL"
        )
    if marks := [name for name in _OTHER_SAMPLING if name in weights]:
        raise ModelError(_predicting(path, f"something else (it holds {marks[0]!r})"))
    tokenizer = tokenizer or _tokenizer_around(path)
    if tokenizer is None:
        raise ModelError(
            "a checkpoint file has no tokenizer, and neither it nor this program lies in a ComfyUI, which has one: "
            "give the folder of CLIP's with --tokenizer, such as ComfyUI's comfy/sd1_tokenizer"
        )
    texts = text.from_weights(weights, tokenizer, path.name)
    own = {name.removeprefix(_UNET): w for name, w in weights.items() if name.startswith(_UNET)}
    config = unet_config(own)
    unet: Any = UNet2DConditionModel(**config)
    try:
        unet.load_state_dict(convert_ldm_unet_checkpoint(dict(weights), config))
    except (RuntimeError, KeyError) as error:
        raise ModelError(
            f"the UNet of {path.name!r} is no plain Stable Diffusion 1.x or SDXL one: {first_line(error)}; give the "
            "folder that diffusers saved of it, which says its shape"
        ) from error
    return Base(unet, texts, path.stem, weights_hash(own.values()))


def _tokenizer_around(path: Path) -> Path | None:
    """The tokenizer of the ComfyUI that a checkpoint, or else this program, lies in."""
    above = [*path.absolute().parents, *path.resolve().parents, *Path(__file__).absolute().parents]
    return next((folder for parent in above if (folder := parent / "comfy" / "sd1_tokenizer").is_dir()), None)


def _predicting(path: Path, what: str) -> str:
    return (
        f"the UNet of {path.name!r} predicts {what}; expected the noise (epsilon), as SD 1.x and SDXL do: train it in "
        "the graph, with the node Train Erasure LoRA"
    )


def unet_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of diffusers' UNet for the weights of an SD 1.x or SDXL UNet in the original's names."""
    width = weights["input_blocks.0.0.weight"].shape[0]
    downs = [n for n in range(1, 100) if f"input_blocks.{n}.0.op.weight" in weights]
    pattern = r"input_blocks\.\d+\.0\.in_layers\.0\.weight"
    blocks = sum(re.fullmatch(pattern, name) is not None for name in weights)
    per_level = downs[0] if downs else blocks + 1
    firsts = [1 + level * per_level for level in range(len(downs) + 1)]
    channels = [weights[f"input_blocks.{n}.0.out_layers.3.weight"].shape[0] for n in firsts]
    depths = [_depth(weights, f"input_blocks.{n}.1.") for n in firsts]
    context = next(w.shape[1] for name, w in weights.items() if name.endswith("attn2.to_k.weight"))
    linear = any(w.ndim == 2 for name, w in weights.items() if name.endswith("proj_in.weight"))
    assert channels[0] == width
    config = {
        "in_channels": weights["input_blocks.0.0.weight"].shape[1],
        "out_channels": weights["out.2.weight"].shape[0],
        "block_out_channels": tuple(channels),
        "layers_per_block": per_level - 1,
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        "transformer_layers_per_block": tuple(max(1, depth) for depth in depths),
        "cross_attention_dim": context,
        "attention_head_dim": tuple(max(1, n // _HEAD) for n in channels) if linear else 8,
        "use_linear_projection": linear,
        "addition_embed_type": None,
        "class_embed_type": None,
    }
    if "label_emb.0.0.weight" in weights:
        added = weights["label_emb.0.0.weight"].shape[1]
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": TIME_ID_WIDTH}
        config |= {"projection_class_embeddings_input_dim": added}
    return config


def _depth(weights: Mapping[str, Tensor], place: str) -> int:
    """How many transformer blocks there are at a place in the UNet."""
    inside = f"{place}transformer_blocks."
    return len({name.removeprefix(inside).split(".")[0] for name in weights if name.startswith(inside)})


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
        encoded: prompts by name.
        autocast: makes the context of mixed precision; None computes as the weights are.
    """

    def __init__(
        self,
        unet: Any,
        encoded: Mapping[str, Encoded],
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    ):
        self.unet, self.encoded, self.autocast = unet, encoded, autocast or nullcontext
        self.tuned = [module for module in unet.modules() if hasattr(module, "lora_A")]
        self.adapting = False
        self._enable(False)

    def __call__(self, z: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        """The predicted noise of each row, float32."""
        encoded, dtype = [self.encoded[prompt] for prompt in prompts], self.unet.conv_in.weight.dtype
        states = torch.stack([one.states for one in encoded]).to(z.device, dtype)
        with self.autocast():
            added = _added(encoded, z, dtype)
            return self.unet(z.to(dtype), timesteps, states, added_cond_kwargs=added).sample.float()

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
        log.warning("Memory ran out: the network's blocks are now computed twice (gradient checkpointing), slower.")
        return True

    def _enable(self, enabled: bool) -> None:
        self.adapting = enabled
        for module in self.tuned:
            # not peft's enable_adapters, which sets requires_grad as well
            module._disable_adapters = not enabled


def _added(encoded: Sequence[Encoded], z: Tensor, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """What SDXL reads besides: pooled states, and the picture's size, no crop, the size again, in pixels."""
    pooled = [one.pooled for one in encoded if one.pooled is not None]
    if not pooled:
        return None
    height, width = (8 * side for side in z.shape[-2:])
    sizes = torch.tensor([[height, width, 0, 0, height, width]], device=z.device, dtype=dtype)
    return {"text_embeds": torch.stack(pooled).to(z.device, dtype), "time_ids": sizes.expand(len(pooled), -1)}
