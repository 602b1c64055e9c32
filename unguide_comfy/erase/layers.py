"""The layers of a loaded model that read the prompt, with the weights that are in use."""

from __future__ import annotations

from typing import Any

import comfy.model_base

from ...unguide_core.text_edit import TextLayers
from ...unguide_core.training.layers import LAYERS, layer_expression
from ..model.weights import DIFFUSION, used_weights

POOLED = f"{DIFFUSION}label_emb.0.0"
"""SDXL's layer that reads the pooled text state, and sizes behind it."""


def text_layers(patcher: Any, width: int) -> TextLayers:
    """Return the weights by which a `ModelPatcher`'s network reads the prompt, by ComfyUI's names.

    Args:
        width: of the text states.
    Raises: ValueError for a model without cross-attention on the prompt, or one that reads other states.
    """
    kind, expression = type(patcher.model).__name__, layer_expression(next(iter(LAYERS)))
    modules = patcher.model.named_modules()
    names = [name for name, _ in modules if name.startswith(DIFFUSION) and expression.search(name)]
    if not names:
        raise ValueError(
            f"this model ({kind}) has no cross-attention keys and values that could be edited, as SD 1.x, SD 2.x and "
            "SDXL have; use Train Erasure LoRA, or load an erasure LoRA that was made for it"
        )
    pooled = [POOLED] if isinstance(patcher.model, comfy.model_base.SDXL | comfy.model_base.SDXLRefiner) else []
    weights = used_weights(patcher, [f"{name}.weight" for name in (*names, *pooled)])
    tokens = {name: weights[f"{name}.weight"] for name in names}
    if strange := next((name for name, weight in tokens.items() if weight.shape[1] != width), None):
        raise ValueError(
            f"the layer {strange!r} of this model ({kind}) reads states of width {tokens[strange].shape[1]}, and the "
            f"connected CLIP makes states of width {width}; connect the CLIP of the same checkpoint"
        )
    return TextLayers(tokens, {name: weights[f"{name}.weight"] for name in pooled})
