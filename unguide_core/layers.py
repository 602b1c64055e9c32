"""Which layers of a model an erasure adapter is trained on, and a name for the model itself.

Names are module paths, ComfyUI's (`input_blocks.1.1.transformer_blocks.0.attn2.to_k`) or diffusers'
(`down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k`); the patterns fit both.
"""

import hashlib
import re
from collections.abc import Iterable

import torch
from torch import Tensor

LAYERS: dict[str, str] = {
    "object": r"\.attn2\.to_[kv]$",
    "explicit content": r"^(?!out\.|time_embed|conv_out|label_emb|add_embedding)(?!.*\.attn2\.)",
    "style": r"\.attn2\.(to_[qkv]|to_out\.0)$",
}
"""What is trained for what: the official choices for objects and explicit content (every linear layer but those of
cross-attention and of the time embedding, with what SDXL adds to it); for a style all of cross-attention, as ESD-x
(arXiv 2303.07345) has it."""

CUSTOM = "custom"


def chosen_layers(linear: Iterable[str], layers: str, pattern: str = "") -> list[str]:
    """Return the names among those of a model's linear layers that are trained.

    Args:
        layers: a key of `LAYERS`, or "custom".
        pattern: a regular expression that is searched for in each name; for "custom" only.
    Raises: ValueError if the choice is unknown, the pattern is no regular expression, or nothing is left.
    """
    if layers not in (*LAYERS, CUSTOM):
        raise ValueError(f"the layers are {layers!r}; expected one of {', '.join((*LAYERS, CUSTOM))}")
    if layers == CUSTOM and not pattern.strip():
        raise ValueError("the layers are 'custom' and the pattern is empty; give a regular expression, or a preset")
    wanted = LAYERS.get(layers, pattern.strip())
    try:
        expression = re.compile(wanted)
    except re.error as error:
        raise ValueError(f"the layer pattern {wanted!r} is no regular expression: {error}") from error
    names = list(linear)
    found = [name for name in names if expression.search(name)]
    if not found:
        example = f", such as {names[0]!r}" if names else ""
        raise ValueError(
            f"the layer pattern {wanted!r} fits none of this model's {len(names)} linear layers{example}; "
            "use a preset that fits the architecture, or another pattern"
        )
    return found


def weights_hash(weights: Iterable[Tensor]) -> str:
    """Return a sha256 that names a model by its weights, whatever program loaded it and in whatever order.

    Over the sorted sha256 of every tensor's numbers in half precision. Neither names nor shapes count, for programs
    differ in both.
    """
    digests = []
    for weight in weights:
        values = weight.detach().to("cpu", torch.float32).half().contiguous().flatten()
        digests.append(hashlib.sha256(values.numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
