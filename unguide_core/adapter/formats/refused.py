"""Formats that are not low-rank adapters, detected from their keys."""

import re
from collections.abc import Iterable

REFUSED = (
    (r"\.b?oft_[RSs]\b", "OFT of PEFT", "its blocks are stored in another form than LyCORIS'"),
    (
        r"\.lambda_layer$|\.[pq]_layer\.weight$",
        "T-LoRA",
        "its rank depends on the noise level, and the matrices that its change is measured from are not in the file",
    ),
    (
        r"\.(qkv|proj)_lora\d?\.",
        "LoRA inside Flux processors (XLabs, USO)",
        "its names are not those of the model's layers",
    ),
    (r"\.bm\.weight$", "GLoRA with a third factor", "it is not a product of two matrices"),
    (r"\.on_input$|\bia3_l\b|_ia3_l\b", "IA3", "it scales activations instead of adding to the weight"),
    (r"\bvera_lambda_|_vera_lambda_", "VeRA", "its matrices are shared and random, and not in the file"),
    (r"\.lora_embedding_[AB]\b", "LoRA of an embedding", "UnGuide changes layers of the diffusion model only"),
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
    "use an adapter in UnGuide's, kohya's (lora_unet_...), LyCORIS', PEFT's, diffusers' or ComfyUI's naming, or "
    "convert it to one with the tool that wrote it"
)


def refuse(keys: Iterable[str]) -> None:
    """Raises: ValueError with the format's name, if a key reveals one of `REFUSED`."""
    keys = list(keys)
    for mark, name, reason in REFUSED:
        key = next((key for key in keys if re.search(mark, key)), None)
        if key is not None:
            raise ValueError(f"it is in the format {name} ('{key}'), which is refused: {reason}; {REMEDY}")
