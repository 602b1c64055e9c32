"""Which layers of a model an erasure adapter is trained on. Does not import torch.

Names are module paths, ComfyUI's (`input_blocks.1.1.transformer_blocks.0.attn2.to_k`) or diffusers'
(`down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k`); the patterns match both.
"""

import re
from collections.abc import Iterable

LAYERS: dict[str, str] = {
    "object": r"\.attn2\.to_[kv]$",
    "explicit content": r"^(?!out\.|time_embed|conv_out|label_emb|add_embedding)(?!.*\.attn2\.)",
    "style": r"\.attn2\.(to_[qkv]|to_out\.0)$",
}
"""Layer patterns by what is erased. The official choices for objects and for explicit content (all linear layers except
those of cross-attention, the time embedding and SDXL's added embedding); for a style all of cross-attention, as in
ESD-x (arXiv 2303.07345)."""

CUSTOM = "custom"


def layer_expression(layers: str, pattern: str = "") -> re.Pattern[str]:
    """Return the regular expression that the names of the layers to train match.

    Args:
        layers: a key of `LAYERS`, or "custom".
        pattern: for "custom": the regular expression.
    Raises: ValueError if the choice is unknown, or the pattern is not a regular expression.
    """
    if layers not in (*LAYERS, CUSTOM):
        raise ValueError(f"the layers are {layers!r}; expected one of {', '.join((*LAYERS, CUSTOM))}")
    if layers == CUSTOM and not pattern.strip():
        raise ValueError("the layers are 'custom' and the pattern is empty; give a regular expression, or a preset")
    wanted = LAYERS.get(layers, pattern.strip())
    try:
        return re.compile(wanted)
    except re.error as error:
        raise ValueError(f"the layer pattern {wanted!r} is not a regular expression: {error}") from error


def chosen_layers(linear: Iterable[str], layers: str, pattern: str = "") -> list[str]:
    """Return the names of the layers to train, out of the names of a model's linear layers.

    Args and errors as of `layer_expression`, and ValueError if nothing matches.
    """
    expression = layer_expression(layers, pattern)
    names = list(linear)
    chosen = [name for name in names if expression.search(name)]
    if not chosen:
        example = f", such as {names[0]!r}" if names else ""
        raise ValueError(
            f"the layer pattern {expression.pattern!r} matches none of this model's {len(names)} linear "
            f"layers{example}; use a preset that fits the architecture, or another pattern"
        )
    return chosen
