"""Formats that are not low-rank adapters, detected from their keys."""

import re
from collections.abc import Iterable

_NO_SUM = "which is not a product of two matrices that is added to the weight"

REFUSED = (
    (r"dora_scale|lora_magnitude_vector", "DoRA", "it rescales the whole weight, which a low-rank change cannot do"),
    (r"\.hada_", "LoHa", f"it is a product of two low-rank matrices, element by element, {_NO_SUM}"),
    (r"\.lokr_", "LoKr", f"it is a Kronecker product, {_NO_SUM}"),
    (r"\.b?oft_|\.oft_R\.", "OFT", "it rotates the weight instead of adding to it"),
    (r"\.[ab][12]\.weight$", "GLoRA", "it multiplies the weight as well as adding to it"),
    (r"\.on_input$|\bia3_l\b|_ia3_l\b", "IA3", "it scales activations instead of adding to the weight"),
    (r"\bvera_lambda_|_vera_lambda_", "VeRA", "its matrices are shared and random, and not in the file"),
    (r"\.lora_embedding_[AB]\b", "LoRA of an embedding", "UnGuide changes layers of the diffusion model only"),
    (r"\.lora_mid\.weight$", "LoCon with a third factor (CP decomposition)", "it is not a product of two matrices"),
    (r"\.reshape_weight$", "LoRA with reshaped weights", "it enlarges the model's layers"),
    (r"\.lora_(update|degen)\b|\bselector\.select_", "GLoCE", "a gate inside it opens and closes with the activations"),
    (r"attention_gate|\battn_gate\b|edit_direction", "CPE", "an attention gate inside it decides, token by token"),
    (
        r"attentions\.\d+\.(transformer_blocks\.\d+\.attn2\.)?(adapter\.)?(down|up)\.(weight|bias)$|[._]erasers?\.",
        "Receler",
        "its erasers have a non-linear activation",
    ),
    (r"\.lora_[AB]\.?\w*\.bias$|\.lora_up\.bias$|\.lora_down\.bias$", "LoRA with biases", "a bias is not a matrix"),
    (r"\.modules_to_save\.", "PEFT with modules_to_save", "it replaces whole layers as well"),
    (r"\.(diff|diff_b|w_norm|b_norm)$", "full weight differences", "they are not low-rank matrices"),
    (r"\.set_weight$", "full replacement weights of ComfyUI", "they are not low-rank matrices"),
    (r"^controlnet|lora_controlnet", "ControlLoRA", "it is a ControlNet, not an eraser"),
)
"""(pattern of a key, the format's name, why it cannot be used)."""

REMEDY = (
    "use a low-rank adapter in UnGuide's, kohya's (lora_unet_...), PEFT's, diffusers' or ComfyUI's naming, or convert "
    "it to one with the tool that wrote it"
)


def refuse(keys: Iterable[str]) -> None:
    """Raises: ValueError with the format's name, if a key reveals one of `REFUSED`."""
    keys = list(keys)
    for mark, name, reason in REFUSED:
        key = next((key for key in keys if re.search(mark, key)), None)
        if key is not None:
            raise ValueError(f"it is in the format {name} ('{key}'), which is refused: {reason}; {REMEDY}")
