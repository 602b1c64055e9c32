"""Tiny models of every family, random weights: the host detects and builds them from their weights alone.

Widths that the host takes for a family's mark (320 channels, 768 text features, ...) stay; depth and everything else is
as small as it lets it be. diffusers' own model with the same weights is made from the host's own map of names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import comfy.ldm.flux.model
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """One architecture, tiny.

    Args:
        model_class, model_type: what the host must detect.
        weights: names and random values of its weights.
        text: width of the text states.
        pooled: width of the pooled text vector, 0 where it has none.
        channels: of the latent.
        diffusers: makes diffusers' model of the same shape; None where this is not compared.
        names: the host's map from diffusers' names, for its configuration.
        layers: names, in the files' namings, of the layers that test adapters change.
        layout: of its UNet, as in `unguide_core.names.LAYOUTS`.
    """

    name: str
    model_class: str
    model_type: str
    weights: Callable[[], Weights]
    text: int
    layers: tuple[str, ...]
    pooled: int = 0
    channels: int = 4
    diffusers: Callable[[], Any] | None = None
    names: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    layout: str | None = None

    @cached_property
    def model(self) -> Any:
        """The host's `ModelPatcher`."""
        return comfy.sd.load_diffusion_model_state_dict(self.weights())

    def conditioning(self, prompt: int, tokens: int = 77) -> list[list[Any]]:
        """A CONDITIONING of random text states, the same for the same number."""
        generator = torch.Generator().manual_seed(prompt)
        extra = {} if not self.pooled else {"pooled_output": torch.randn(1, self.pooled, generator=generator)}
        return [[torch.randn(1, tokens, self.text, generator=generator), extra]]

    def latent(self, batch: int = 1, size: int = 8) -> dict[str, torch.Tensor]:
        return {"samples": torch.zeros(batch, self.channels, size, size)}

    def weight(self, layer: str) -> torch.Tensor:
        """The host's weight, or part of one, that a layer acts on; by the host's own map, not the pack's."""
        import comfy.lora

        key_map = comfy.lora.model_lora_keys_unet(self.model.model, {})
        key = key_map[layer]
        weights = self.model.model.state_dict()
        if isinstance(key, str):
            return weights[key]
        _, start, length = key[1]
        return weights[key[0]].narrow(0, start, length)

    @cached_property
    def theirs(self) -> Any:
        """diffusers' model with the host's weights."""
        assert self.diffusers is not None
        assert self.names is not None
        model = self.diffusers()
        host = {k.removeprefix("diffusion_model."): v for k, v in self.model.model.state_dict().items()}
        state = {}
        for theirs, ours in self.names(self.model.model.model_config.unet_config).items():
            if theirs in (known := model.state_dict()):
                state[theirs] = _part(host, ours).reshape(known[theirs].shape)
        assert set(known) == set(state), set(known) ^ set(state)
        model.load_state_dict(state)
        return model.eval()


def _part(host: Weights, ours: Any) -> torch.Tensor:
    if isinstance(ours, str):
        return host[ours]
    key, offset, function = (*ours, None)[:3]
    weight = host[key] if offset is None else host[key].narrow(*offset)
    return weight if function is None else function(weight)


def drawn(network: torch.nn.Module, seed: int = 7) -> Weights:
    """Random values for a network's weights: matrices that keep a vector's size, norms about 1, biases small."""
    pool = torch.randn(1 << 23, generator=torch.Generator().manual_seed(seed))  # many weights share a stretch of it
    weights = {}
    for number, (name, value) in enumerate(network.state_dict().items()):
        start = number * 10007 % (len(pool) - value.numel())
        noise = pool[start : start + value.numel()].reshape(value.shape)
        if value.ndim >= 2:
            weights[name] = noise / value[0].numel() ** 0.5
        elif name.endswith((".weight", ".scale")):
            weights[name] = 1.0 + 0.1 * noise
        else:
            weights[name] = 0.15 * noise  # above 0.09: the host takes SD 2.x with that for a v-prediction
    return weights


def unet(**changed: Any) -> Callable[[], Weights]:
    def make() -> Weights:
        config = {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [1, 1],
            "channel_mult": (1, 1), "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
            "transformer_depth_middle": 1, "use_spatial_transformer": True, "legacy": False, "context_dim": 768,
            "num_heads": 8, "num_head_channels": -1,
        }  # fmt: skip
        extra = {key: changed[key] for key in ("markers",) if key in changed}
        config |= {key: value for key, value in changed.items() if key not in extra}
        network = UNetModel(**config, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
        return {**drawn(network), **{name: torch.zeros(1) for name in extra.get("markers", ())}}

    return make


HEADS_OF_64 = {"num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True}
SDXL = {
    **HEADS_OF_64, "context_dim": 2048, "num_classes": "sequential", "adm_in_channels": 2816, "channel_mult": (1, 1, 1),
    "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2], "transformer_depth_middle": 2,
}  # fmt: skip
SD2_V = {
    **HEADS_OF_64, "context_dim": 1024, "num_res_blocks": [2, 2, 2, 2], "channel_mult": (1, 1, 1, 1),
    "transformer_depth": [1, 1, 0, 0, 0, 0, 0, 0], "transformer_depth_output": [1, 1, 1, *[0] * 9],
}  # fmt: skip


def sd3() -> Weights:
    network = OpenAISignatureMMDITWrapper(
        depth=2, input_size=None, in_channels=16, out_channels=16, adm_in_channels=2048, num_patches=64,
        pos_embed_max_size=8, qk_norm="rms", x_block_self_attn_layers=[0],
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 256, "out_features": 128}},
        dtype=torch.float32, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    return drawn(network)


def flux(guidance: bool) -> Callable[[], Weights]:
    def make() -> Weights:
        network = comfy.ldm.flux.model.Flux(
            image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=256, hidden_size=128,
            mlp_ratio=4.0, num_heads=1, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000,
            patch_size=2, qkv_bias=True, guidance_embed=guidance, txt_ids_dims=[],
            dtype=torch.float32, operations=comfy.ops.disable_weight_init,
        )  # fmt: skip
        return drawn(network)

    return make


def their_unet(**config: Any) -> Callable[[], Any]:
    def make() -> Any:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(sample_size=8, **config)

    return make


def their_sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=64, num_attention_heads=2, joint_attention_dim=256,
        caption_projection_dim=128, pooled_projection_dim=2048, pos_embed_max_size=8, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )  # fmt: skip


def their_flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=256,
        pooled_projection_dim=768, guidance_embeds=True,
    )  # fmt: skip


def unet_names(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return comfy.utils.unet_to_diffusers(config)


def sd3_names(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return comfy.utils.mmdit_to_diffusers(config)


def flux_names(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return comfy.utils.flux_to_diffusers(config)


CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
KOHYA = "lora_unet_{}_transformer_blocks_0_{}"
UNET_LAYERS = (
    KOHYA.format("down_blocks_1_attentions_0", "attn2_to_k"),
    KOHYA.format("down_blocks_1_attentions_0", "attn2_to_v"),
    KOHYA.format("up_blocks_0_attentions_1", "attn1_to_out_0"),
    KOHYA.format("mid_block_attentions_0", "ff_net_0_proj"),
    "lora_unet_down_blocks_1_resnets_0_conv1",
    "lora_unet_down_blocks_1_resnets_0_time_emb_proj",
    "lora_unet_mid_block_attentions_0_proj_in",
)
SD2_V_LAYERS = tuple(
    layer.replace("down_blocks_1", "down_blocks_0").replace("up_blocks_0_attentions_1", "up_blocks_3_attentions_1")
    for layer in UNET_LAYERS
)
SD3_LAYERS = tuple(
    f"transformer.transformer_blocks.0.{layer}"
    for layer in (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.add_k_proj",
        "attn.to_out.0",
        "ff.net.0.proj",
        "attn2.to_v",
    )
)
FLUX_LAYERS = tuple(
    f"transformer.{layer}"
    for layer in (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_v",
        "transformer_blocks.0.attn.add_q_proj",
        "transformer_blocks.0.ff_context.net.0.proj",
        "single_transformer_blocks.0.attn.to_k",
        "single_transformer_blocks.0.proj_mlp",
        "single_transformer_blocks.0.proj_out",
    )
)

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "SD 1.x", "BaseModel", "EPS", unet(), 768, UNET_LAYERS, names=unet_names, layout="demo",
            diffusers=their_unet(
                block_out_channels=(320, 320), layers_per_block=1, down_block_types=(CROSS[0],) * 2,
                up_block_types=(CROSS[1],) * 2, cross_attention_dim=768, attention_head_dim=8,
            ),
        ),
        Family(
            "SD 2.x", "BaseModel", "EPS", unet(**HEADS_OF_64, context_dim=1024), 1024, UNET_LAYERS, names=unet_names,
            layout="demo",
            diffusers=their_unet(
                block_out_channels=(320, 320), layers_per_block=1, down_block_types=(CROSS[0],) * 2,
                up_block_types=(CROSS[1],) * 2, cross_attention_dim=1024, attention_head_dim=5,
                use_linear_projection=True,
            ),
        ),
        Family("SD 2.x v", "BaseModel", "V_PREDICTION", unet(**SD2_V), 1024, SD2_V_LAYERS),
        Family(
            "SDXL", "SDXL", "EPS", unet(**SDXL), 2048, UNET_LAYERS, pooled=1280, names=unet_names, layout="sdxl",
            diffusers=their_unet(
                block_out_channels=(320,) * 3, layers_per_block=2, cross_attention_dim=2048, attention_head_dim=5,
                down_block_types=("DownBlock2D", CROSS[0], CROSS[0]), up_block_types=(CROSS[1], CROSS[1], "UpBlock2D"),
                transformer_layers_per_block=(1, 1, 2), use_linear_projection=True, addition_embed_type="text_time",
                addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
            ),
        ),
        Family(
            "SDXL v", "SDXL", "V_PREDICTION", unet(**SDXL, markers=("v_pred",)), 2048, UNET_LAYERS, pooled=1280,
        ),
        Family("SD 3.x", "SD3", "FLOW", sd3, 256, SD3_LAYERS, 2048, 16, their_sd3, sd3_names),
        Family("Flux dev", "Flux", "FLUX", flux(True), 256, FLUX_LAYERS, 768, 16, their_flux, flux_names),
        Family("Flux schnell", "Flux", "FLOW", flux(False), 256, FLUX_LAYERS, 768, 16),
    )
}  # fmt: skip
