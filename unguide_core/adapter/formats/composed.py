"""Layers that a file does not hold as two matrices, as low-rank layers that change the weight by the same amount.

LoHa and LoKr are products of low-rank matrices, and so is the result: of rank r^2 (Hadamard), r1 r2 (Kronecker). The
changes of GLoRA, OFT, BOFT and DoRA depend on the model's own weight W. A change of full rank becomes the matrix itself
beside an identity. `dora_scale` is normed as ComfyUI does it, `lora_magnitude_vector` as PEFT does.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..lowrank import LowRank

Factors = tuple[Tensor, Tensor]
"""up [out, rank] and down [rank, in] or [rank, in, *kernel], whose product is the change."""

ROLE = (
    r"lora_mid\.weight|dora_scale|lora_magnitude_vector(?:\.weight)?|hada_(?:w[12]_[ab]|t[12])"
    r"|lokr_(?:w[12](?:_[ab])?|t2)|oft_blocks|rescale|[ab][12]\.weight"
)
"""The ends of keys that are read here; the first part of a key is the layer's name."""

MID, DORA, MAGNITUDE = "lora_mid.weight", "dora_scale", "lora_magnitude_vector"
NEEDED = {
    "LoRA": ("down", "up"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LoKr": (),
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
    "OFT": ("oft_blocks",),
}
"""The parts that a layer of each kind has to have."""
_SIZE_LIMIT = 1 << 26
"""The most numbers that a layer may become; the largest of known models need 5e7."""


def kind_of(roles: Iterable[str]) -> str:
    """Return a layer's kind, one of `NEEDED`, by the names of its parts."""
    held = list(roles)
    marks = (("LoHa", "hada_"), ("LoKr", "lokr_"), ("OFT", "oft_"), ("GLoRA", ("a1.", "a2.", "b1.", "b2.")))
    return next((kind for kind, mark in marks if any(role.startswith(mark) for role in held)), "LoRA")


def rank_of(kind: str, parts: Mapping[str, Tensor]) -> int | None:
    """Return the rank that alpha is divided by; None if the layer has none."""
    if kind == "LoRA":
        return parts["down"].shape[0]
    if kind == "LoHa":
        return parts["hada_w1_b"].shape[0]
    if kind == "LoKr":
        return next((parts[key].shape[0] for key in ("lokr_w2_b", "lokr_w1_b") if key in parts), None)
    return min(parts["a1.weight"].shape[:2]) if kind == "GLoRA" else None


def needs_weight(kind: str, parts: Mapping[str, Tensor]) -> str | None:
    """Return the name of the format if its change depends on the model's weight, else None."""
    if DORA in parts or MAGNITUDE in parts:
        return "DoRA"
    return kind if kind in ("GLoRA", "OFT") else None


def low_rank_of(kind: str, parts: Mapping[str, Tensor], scale: float, weight: Tensor | None) -> LowRank:
    """Return the low-rank layer.

    Args:
        parts: the layer's tensors, by the ends of their keys.
        scale: factor on the change; OFT and BOFT have none.
        weight: the model's, [out, in] or [out, in, *kernel], where `needs_weight`.
    Raises: ValueError if the parts do not fit each other or the weight.
    """
    parts = {role: part.float() for role, part in parts.items()}
    try:
        if weight is None:
            up, down = _factors(kind, parts, None)
        else:
            weight = weight.detach().to("cpu", torch.float32)
            up, down = _factors(kind, parts, weight)
            if needs_weight(kind, parts) == "DoRA":
                (up, down), scale = whole(_decomposed(parts, weight, scale * product(up, down))), 1.0
            down = down.reshape(-1, *weight.shape[1:])
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{role} {list(part.shape)}" for role, part in parts.items())
        against = "" if weight is None else f" and the model's weight {list(weight.shape)}"
        raise ValueError(
            f"its {kind} parts do not fit each other ({shapes}{against}): the file is damaged, or was made for another "
            "architecture"
        ) from error
    return LowRank(down.contiguous(), up.reshape(*up.shape, *[1] * (down.ndim - 2)).contiguous(), scale)


def product(up: Tensor, down: Tensor) -> Tensor:
    """Return the change as a matrix, [out, in * kernel]."""
    _require_small(1, up.shape[0] * down[0].numel(), 0)
    return up @ down.flatten(1)


def whole(change: Tensor) -> Factors:
    """Return the factors of a change of any rank: the change and an identity, the smaller of the two possible."""
    matrix = change.flatten(1)
    out, rest = matrix.shape
    if out <= rest:
        return torch.eye(out), change
    return matrix, torch.eye(rest)


def hadamard(first: Factors, second: Factors) -> Factors:
    """Return the factors of (up1 down1) * (up2 down2), element by element, of rank r1 r2."""
    (up, down), (up2, down2) = first, second
    rank, (out, rest) = up.shape[1] * up2.shape[1], (up.shape[0], down[0].numel())
    _require_small(min(rank, out, rest), out, rest)
    if rank >= min(out, rest):
        return whole((product(up, down) * product(up2, down2)).reshape(out, *down.shape[1:]))
    return (up[:, :, None] * up2[:, None, :]).flatten(1), (down[:, None] * down2[None]).flatten(0, 1)


def kronecker(first: Factors, second: Factors) -> Factors:
    """Return the factors of the Kronecker product of up1 down1, [a, b], and up2 down2, [c, d, *kernel]."""
    (up, down), (up2, down2) = first, second
    rank = up.shape[1] * up2.shape[1]
    _require_small(rank, up.shape[0] * up2.shape[0], down.shape[1] * down2[0].numel())
    # not torch.kron, which fails on some strides
    both, flat = (torch.einsum("ab,cd->acbd", *pair) for pair in ((up, up2), (down, down2.flatten(1))))
    return both.flatten(2).flatten(0, 1), flat.reshape(rank, -1, *down2.shape[2:])


def glora(parts: Mapping[str, Tensor], weight: Tensor) -> Factors:
    """Return the factors of W a1 a2 + b1 b2; files of old LyCORIS have the two of each pair in the other order."""
    names = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    a1, a2, b1, b2 = (parts[name].flatten(1) for name in names)
    if a1.shape[0] < a1.shape[1]:
        a1, a2, b1, b2 = a2, a1, b2, b1
    if weight[0].numel() == weight.shape[1]:
        return torch.cat([weight.flatten(1) @ a1, b1], dim=1), torch.cat([a2, b2])
    changed = torch.einsum("oi...,ij->oj...", weight, a1 @ a2)
    return whole(changed + (b1 @ b2).reshape(weight.shape))


def rotation(parts: Mapping[str, Tensor], weight: Tensor) -> Factors:
    """Return the factors of R W - W for the orthogonal R of OFT or BOFT, by Cayley's map of its blocks.

    Blocks are [count, size, size] for OFT, [stages, count, size, size] for BOFT's butterfly  (arXiv 2306.07280,
    2311.06243); `rescale` multiplies the rows of R W.
    """
    blocks, limit = parts["oft_blocks"], parts.get("alpha")
    if blocks.ndim not in (3, 4) or blocks.shape[-1] * blocks.shape[-3] != weight.shape[0]:
        raise IndexError("the blocks do not fill the rows")
    skew = blocks - blocks.mT
    if limit is not None and 0.0 < float(limit) < float(torch.linalg.vector_norm(skew)):
        raise ValueError(
            f"its rotation is constrained (alpha {float(limit):g}), which ComfyUI and LyCORIS do differently; train it "
            "without a constraint, or convert it to a LoRA with the tool that wrote it"
        )
    identity = torch.eye(blocks.shape[-1])
    r = torch.linalg.solve((identity - skew).mT, (identity + skew).mT).mT
    if blocks.ndim == 3:
        rows = weight.reshape(*blocks.shape[:2], *weight.shape[1:])
        rotated = torch.einsum("knm,kn...->km...", r, rows).flatten(0, 1)
    else:
        rotated = _butterfly(r, weight)
    if "rescale" in parts:
        rotated = rotated * parts["rescale"].reshape(-1, *[1] * (weight.ndim - 1))
    return whole(rotated - weight)


def _butterfly(stages: Tensor, weight: Tensor) -> Tensor:
    """R W of BOFT: stage i mixes rows that lie 2^i half blocks apart."""
    size, rest = stages.shape[-1], weight.shape[1:]
    for i, blocks in enumerate(stages):
        apart = 2**i * (size // 2)
        paired = weight.reshape(-1, 2, apart, *rest).transpose(1, 2).reshape(-1, size, *rest)
        mixed = torch.einsum("bij,bj...->bi...", blocks, paired)
        weight = mixed.reshape(-1, apart, 2, *rest).transpose(1, 2).flatten(0, 2)
    return weight


def _factors(kind: str, parts: Mapping[str, Tensor], weight: Tensor | None) -> Factors:
    if kind == "LoRA":
        return _lora(parts)
    if kind == "LoHa":
        first, second = (_cored(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}")) for i in (1, 2))
        return hadamard(first, second)
    if kind == "LoKr":
        return kronecker(_lokr_part(parts, 1), _lokr_part(parts, 2))
    assert weight is not None
    return glora(parts, weight) if kind == "GLoRA" else rotation(parts, weight)


def _lora(parts: Mapping[str, Tensor]) -> Factors:
    """LoCon's third factor, a convolution of the rank's channels, goes into `down`."""
    up, down = parts["up"].flatten(1), parts["down"]
    if MID in parts:
        _, down = _cored(up, down.flatten(1), parts[MID])
    return up, down


def _cored(a: Tensor, b: Tensor, core: Tensor | None) -> Factors:
    """a b; with the core of a CP decomposition, [rank, rank, *kernel], a is [rank, out] and b [rank, in]."""
    if core is None:
        return a, b
    _require_small(len(core), 0, b.shape[1] * core[0, 0].numel())
    return a.T, torch.einsum("ij...,jr->ir...", core, b)


def _lokr_part(parts: Mapping[str, Tensor], number: int) -> Factors:
    """One side of the Kronecker product, stored whole or as factors."""
    name = f"lokr_w{number}"
    if name in parts:
        return whole(parts[name])
    if f"{name}_a" not in parts or f"{name}_b" not in parts:
        raise ValueError(f"it has neither {name} nor both {name}_a and {name}_b; the file is incomplete")
    return _cored(parts[f"{name}_a"], parts[f"{name}_b"], parts.get("lokr_t2") if number == 2 else None)


def _decomposed(parts: Mapping[str, Tensor], weight: Tensor, change: Tensor) -> Tensor:
    """The change that DoRA makes of another one: m (W + change) / norm - W  (arXiv 2402.09353).

    PEFT takes the norm of each row of W + change. ComfyUI takes, for a `dora_scale` per row, the norm of W's row, and
    for one per column, the norm of the column of W + change.
    """
    adapted = weight + change.reshape(weight.shape)
    ones = [1] * (weight.ndim - 1)
    if MAGNITUDE in parts:
        magnitude, norm = parts[MAGNITUDE].reshape(-1, *ones), adapted.flatten(1).norm(dim=1).reshape(-1, *ones)
    elif parts[DORA].shape[0] == weight.shape[0]:
        magnitude, norm = parts[DORA].reshape(-1, *ones), weight.flatten(1).norm(dim=1).reshape(-1, *ones)
    else:
        column = (1, -1, *ones[1:])
        magnitude, norm = parts[DORA].reshape(column), adapted.transpose(0, 1).flatten(1).norm(dim=1).reshape(column)
    factor: Tensor = magnitude / (norm + torch.finfo(weight.dtype).eps)
    return adapted * factor - weight


def _require_small(rank: int, out: int, rest: int) -> None:
    if rank * (out + rest) > _SIZE_LIMIT:
        raise ValueError(
            f"it would become a layer of rank {rank} for a weight of {out} x {rest}; expected {_SIZE_LIMIT} numbers at "
            "most: the file is damaged"
        )


ROLE_PATTERN = re.compile(rf"(?P<name>.+)\.(?P<side>{ROLE})")
