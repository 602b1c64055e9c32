"""UnGuide's own `lora.pth`: `<module path>.lora.A` [in, rank], `.lora.B` [rank, out], no alpha, no metadata.

W += 8 * (A @ B)^T: down = A^T, up = B^T  (official lora.py and utils.py)
"""

import math
from collections.abc import Mapping

from torch import Tensor

from ..lowrank import LowRank
from ..names import HOST
from .named import Named, low_rank, matrices, scale_note
from .refused import REMEDY

SCALE = 8.0
"""The official scripts merge with alpha = 8, not divided by the rank; their files store neither."""

A, B = ".lora.A", ".lora.B"


def is_official(keys: Mapping[str, Tensor]) -> bool:
    """Return whether a file with these keys is the research code's."""
    return any(key.endswith((A, B)) for key in keys)


def read_official(tensors: Mapping[str, Tensor], alpha: float | None) -> Named:
    """Return the layers of an official file. Raises: ValueError."""
    stems: dict[str, None] = {}
    for key in tensors:
        if not key.endswith((A, B)):
            raise ValueError(f"it holds '{key}', which does not belong to a low-rank layer; {REMEDY}")
        stems[key[: -len(A)]] = None
    layers = {}
    for stem in stems:
        for side, partner in ((A, B), (B, A)):
            if stem + side not in tensors:
                raise ValueError(
                    f"'{stem}{partner}' has no partner '{stem}{side}'; the file is incomplete, download it again"
                )
        a, b = matrices(tensors, (stem + A, stem + B))
        scale = SCALE if alpha is None else alpha / a.shape[-1]
        down, up = (factor.transpose(0, -1).contiguous() for factor in (a, b))
        layers[HOST + stem.removeprefix(HOST)] = low_rank(stem, down, up, scale)
    rule = "alpha = 8 * rank, the official scripts' constant, because the file stores none"
    return Named(
        "official", layers, [scale_note({rule if alpha is None else f"alpha {alpha}, as asked for": len(layers)})]
    )


def official_tensors(layers: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Return the tensors of an official file. Raises: ValueError for what the format cannot hold exactly."""
    tensors = {}
    for name, layer in layers.items():
        if not name.startswith(HOST) or layer.down.ndim != 2:
            raise ValueError(f"the official format holds linear layers of a UNet only, and '{name}' is not one")
        factor = layer.scale / SCALE
        if math.frexp(abs(factor))[0] != 0.5:
            raise ValueError(
                f"the official format stores no alpha, its scale is always 8, and layer '{name}' has scale "
                f"{layer.scale:g}: the ratio is not a power of two, so the values would change; choose another format"
            )
        stem = name.removeprefix(HOST)
        tensors[stem + A] = layer.down.detach().T.contiguous()
        tensors[stem + B] = (layer.up.detach() * factor).T.contiguous()
    return tensors
