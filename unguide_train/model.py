"""Stable Diffusion 1.x and SDXL in diffusers, from a checkpoint file or a folder, with a peft adapter in training.

Nothing is downloaded: the UNet's configuration is detected from its weights. Text encoders are in text.py.
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

from unguide_core.adapter import LowRank
from unguide_core.adapter.lowrank import weights_hash
from unguide_core.adapter.names import underscored
from unguide_core.training.layers import chosen_layers
from unguide_core.training.recipe import Recipe
from unguide_core.training.trainer import fresh_layers

from . import text
from .text import Encoded, ModelError, TextEncoders, first_line

log = logging.getLogger("unguide_train")

NAME = "erasure"
_UNET = "model.diffusion_model."
_OTHER_SAMPLING = ("v_pred", "edm_mean", "edm_vpred.sigma_max")
"""Keys of checkpoints whose UNet does not predict the noise."""
TIME_ID_WIDTH = 256
"""Width of the embedding of each of SDXL's six additional inputs: sizes and crop."""
_HEAD = 64
"""Channels per attention head in SD 2.x and SDXL, whose projections are linear; SD 1.x has eight heads."""


@dataclass
class Base:
    """A frozen base model.

    unet: diffusers' UNet2DConditionModel.
    texts: its text encoders.
    name, hash: for the card.
    """

    unet: Any
    texts: TextEncoders
    name: str
    hash: str

    @property
    def size(self) -> int:
        """The size of the images that it was trained on, in pixels."""
        return 1024 if self.unet.config.addition_embed_type else 512

    def encode(self, prompts: Sequence[str], device: torch.device | None = None) -> dict[str, Encoded]:
        """Returns the encoded prompts."""
        return text.encode(self.texts, prompts, device or torch.device("cpu"))

    def to(self, device: torch.device, dtype: torch.dtype) -> Base:
        """Moves the UNet to a device and precision; returns the model itself."""
        torch.nn.Module.to(self.unet, device, dtype)  # diffusers' own method warns needlessly
        return self


def load_base(path: Path, tokenizer: Path | None = None, dtype: torch.dtype = torch.float32) -> Base:
    """Returns the base model in a checkpoint file or a diffusers folder, frozen, its UNet in a precision.

    Raises: ModelError if it is not a Stable Diffusion 1.x or SDXL that predicts the noise.
    """
    base = _from_folder(path, tokenizer, dtype) if path.is_dir() else _from_file(path, tokenizer, dtype)
    config, widths = base.unet.config, [encoder.model.config.hidden_size for encoder in base.texts]
    sdxl = len(widths) == 2
    known = config.addition_embed_type == "text_time" if sdxl else widths == [768] and not config.addition_embed_type
    if config.in_channels != 4:
        raise ModelError(
            f"{path.name!r} takes latents with {config.in_channels} channels, like inpainting models; expected 4: use "
            "the text-to-image model"
        )
    if config.cross_attention_dim != sum(widths) or not known:
        raise ModelError(
            f"{path.name!r} has a UNet for text states of width {config.cross_attention_dim} and text encoders of "
            f"{' + '.join(map(str, widths))}, which makes neither a Stable Diffusion 1.x (768) nor an SDXL (768 + "
            "1280): train others in the graph, with the node Train Erasure LoRA"
        )
    base.unet.requires_grad_(False).eval()
    return base


def _from_folder(path: Path, tokenizer: Path | None, dtype: torch.dtype) -> Base:
    read = torch.float16 if dtype == torch.float16 else torch.float32  # bfloat16 would change the weights' hash
    try:
        unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", local_files_only=True, torch_dtype=read)
        texts = text.from_folder(path, tokenizer)
        scheduler = path / "scheduler" / "scheduler_config.json"
        predicts = json.loads(scheduler.read_text()).get("prediction_type", "epsilon") if scheduler.exists() else ""
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(path)!r} is not the folder of a diffusers pipeline: {first_line(error)}") from error
    if predicts not in ("", "epsilon"):
        raise ModelError(_predicting(path, repr(predicts)))
    known = weights_hash(unet.state_dict().values())
    return Base(torch.nn.Module.to(unet, dtype), texts, path.name, known)


def _from_file(path: Path, tokenizer: Path | None, dtype: torch.dtype) -> Base:
    if path.suffix != ".safetensors":
        raise ModelError(
            f"{path.name!r} is not a .safetensors file; other files are not opened because they may run code"
        )
    try:
        weights = {name: tensor for name, tensor in load_file(path).items() if tensor.is_floating_point()}
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
            "a checkpoint file has no tokenizer, and neither the file nor this program is in a ComfyUI, which has one: "
            "give the folder of CLIP's tokenizer with --tokenizer, such as ComfyUI's comfy/sd1_tokenizer"
        )
    texts = text.from_weights(weights, tokenizer, path.name)
    own = {name.removeprefix(_UNET): w for name, w in weights.items() if name.startswith(_UNET)}
    config = unet_config(own)
    with torch.device("meta"):  # no memory for weights that are replaced at once
        unet: Any = UNet2DConditionModel(**config)
    try:
        converted = convert_ldm_unet_checkpoint(dict(weights), config)
        # copies, because tensors of the file are views of it
        unet.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in converted.items()}, assign=True)
    except (RuntimeError, KeyError) as error:
        raise ModelError(
            f"the UNet of {path.name!r} is not a plain Stable Diffusion 1.x or SDXL one: {first_line(error)}; give a "
            "folder that diffusers saved, which has the UNet's configuration"
        ) from error
    return Base(unet, texts, path.stem, weights_hash(own.values()))


def _tokenizer_around(path: Path) -> Path | None:
    """The tokenizer of the ComfyUI that a checkpoint, or else this program, is in."""
    above = [*path.absolute().parents, *path.resolve().parents, *Path(__file__).absolute().parents]
    return next((folder for parent in above if (folder := parent / "comfy" / "sd1_tokenizer").is_dir()), None)


def _predicting(path: Path, what: str) -> str:
    return (
        f"the UNet of {path.name!r} predicts {what}; expected the noise (epsilon), as SD 1.x and SDXL do: train it in "
        "the graph, with the node Train Erasure LoRA"
    )


def unet_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns diffusers' configuration of an SD 1.x or SDXL UNet, from its weights in the original naming."""
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
    """The number of transformer blocks at a place in the UNet."""
    inside = f"{place}transformer_blocks."
    return len({name.removeprefix(inside).split(".")[0] for name in weights if name.startswith(inside)})


# ---------------------------------------------------------------- the adapter


def add_adapter(unet: Any, recipe: Recipe, layers: str, pattern: str = "") -> dict[str, LowRank]:
    """Adds an untrained peft adapter to the UNet; returns its layers by kohya's names.

    They are peft's own parameters, with the same initial values as in the graph's trainer for the same seed.
    """
    linear = {name: module for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear)}
    names = chosen_layers(linear, layers, pattern)
    features = {underscored(name): (linear[name].in_features, linear[name].out_features) for name in names}
    fresh = fresh_layers(features, recipe)
    inject(unet, {name: fresh[underscored(name)] for name in names})
    modules = dict(unet.named_modules())
    return {
        underscored(name): LowRank(
            modules[name].lora_A[NAME].weight, modules[name].lora_B[NAME].weight, modules[name].scaling[NAME]
        )
        for name in names
    }


def remove_adapter(unet: Any) -> None:
    """Removes what `inject` added, and the gradient checkpointing that memory may have asked for."""
    for name, module in list(unet.named_modules()):
        if hasattr(module, "lora_A"):
            parent, _, own = name.rpartition(".")
            setattr(unet.get_submodule(parent), own, module.base_layer)
    if hasattr(unet, "peft_config"):
        del unet.peft_config
    unet.disable_gradient_checkpointing()
    unet.requires_grad_(False).eval()


def inject(unet: Any, layers: Mapping[str, LowRank]) -> None:
    """Adds peft layers with these values to the UNet's layers, by name. All need the same rank and scale."""
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


class DiffusersPredictor:
    """A diffusers UNet with a peft adapter, as a `Predictor` of `unguide_core.training.rollout`.

    Args:
        encoded: prompts by name.
        autocast: returns the context for mixed precision; None computes in the weights' precision.
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
        """Returns the predicted noise, float32."""
        encoded, dtype = [self.encoded[prompt] for prompt in prompts], self.unet.conv_in.weight.dtype
        states = torch.stack([one.states for one in encoded]).to(z.device, dtype)
        with self.autocast():
            added = _added(encoded, z, dtype)
            return self.unet(z.to(dtype), timesteps, states, added_cond_kwargs=added).sample.float()

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Within the block the adapter is on."""
        before = self.adapting
        self._enable(True)
        try:
            yield
        finally:
            self._enable(before)

    def relieve(self) -> bool:
        """Turns gradient checkpointing on; returns False if it was on already."""
        if self.unet.is_gradient_checkpointing:
            return False
        self.unet.enable_gradient_checkpointing()
        self.unet.train()  # diffusers checkpoints in train mode only; the UNet has no dropout
        torch.cuda.empty_cache()
        log.warning("Memory ran out: gradient checkpointing is now on, which is slower.")
        return True

    def _enable(self, enabled: bool) -> None:
        self.adapting = enabled
        for module in self.tuned:
            # not peft's enable_adapters, which also sets requires_grad
            module._disable_adapters = not enabled


def _added(encoded: Sequence[Encoded], z: Tensor, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """SDXL's additional inputs: pooled states, and original size, crop (none) and target size in pixels."""
    pooled = [one.pooled for one in encoded if one.pooled is not None]
    if not pooled:
        return None
    height, width = (8 * side for side in z.shape[-2:])
    sizes = torch.tensor([[height, width, 0, 0, height, width]], device=z.device, dtype=dtype)
    return {"text_embeds": torch.stack(pooled).to(z.device, dtype), "time_ids": sizes.expand(len(pooled), -1)}
