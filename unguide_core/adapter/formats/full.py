"""Full replacement weights (ESD, UCE, concept ablation) as low-rank changes of the base model.

W_new - W_base = U S V^T, truncated to the smallest rank that keeps a given fraction of sum(S^2), the energy. Does not
know the model: a function returns the base weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..lowrank import LowRank
from .named import RANK_LIMIT, BaseWeights, Named, canonical

ENERGY = 0.99
"""The default fraction of each layer's change that is kept."""

_OTHER_PARTS = ("cond_stage_model.", "first_stage_model.", "conditioner.", "vae.", "text_encoder", "model_ema.")
_SCHEDULE = ("betas", "alphas_", "sqrt_", "log_one", "posterior_", "lvlb_", "logvar")


@dataclass
class Found:
    """How a file's weights were read."""

    layers: dict[str, LowRank] = field(default_factory=dict)
    kept: list[float] = field(default_factory=list)
    unchanged: int = 0
    elsewhere: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)


def are_weights(keys: Mapping[str, Tensor]) -> bool:
    """Return whether a file with these keys holds plain weights of a diffusion model."""
    return any(key.endswith(".weight") and canonical(key.removesuffix(".weight")) for key in keys)


def read_full(
    tensors: Mapping[str, Tensor], base: BaseWeights | None, energy: float, partial: bool, alpha: float | None
) -> Named:
    """Return the low-rank layers that turn the base model's weights into the file's.

    Args:
        base: the base model's parameters.
        energy: the fraction of each layer's change to keep, above 0 and at most 1.
        partial: leave out what low-rank layers cannot hold or the model lacks, instead of raising.
        alpha: has to be None: full weights have none.
    Raises: ValueError.
    """
    if base is None:
        raise ValueError(
            f"it holds full weights ('{next(iter(tensors))}'), as ESD, UCE and concept ablation write them, which can "
            "only be read with the model they were made from; connect that model to Load Erasure LoRA (on the command "
            "line: --base)"
        )
    if alpha is not None:
        raise ValueError(f"it holds full weights, which have no alpha, and alpha {alpha} was asked for; set it to 0")
    if not 0.0 < energy <= 1.0:
        raise ValueError(f"the energy to keep is {energy}; expected a fraction above 0 and at most 1")
    found = Found()
    for key, tensor in tensors.items():
        _add(found, key, tensor, base, energy)
    _check(found, partial)
    return Named("full", found.layers, _notes(found, energy))


def low_rank_change(new: Tensor, base: Tensor, energy: float) -> tuple[LowRank | None, float]:
    """Return the layer of the lowest rank that keeps at least `energy` of new - base, and the fraction it keeps.

    None instead of the layer if the two differ by rounding only.

    Args:
        new, base: weights of one shape, [out, in] or [out, in, *kernel].
    """
    change = new.double() - base.double()
    rounding = max(torch.finfo(tensor.dtype).eps for tensor in (new, base))
    if bool((change.abs() <= rounding * base.double().abs()).all()):
        return None, 1.0
    matrix = change.flatten(1)
    tall = matrix.shape[0] > matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
    squares, vectors = squares.flip(0).clamp(min=0.0), vectors.flip(1)
    shares = squares.cumsum(0) / squares.sum()
    rank = min(int((shares < energy - 1e-12).sum()) + 1, len(shares))
    chosen = vectors[:, :rank]
    up, down = (matrix @ chosen, chosen.T) if tall else (chosen, chosen.T @ matrix)
    kernel = [1] * (new.ndim - 2)
    layer = LowRank(down.float().reshape(rank, *new.shape[1:]), up.float().reshape(-1, rank, *kernel))
    return layer.require_finite(), float(shares[rank - 1])


def _add(found: Found, key: str, tensor: Tensor, base: BaseWeights, energy: float) -> None:
    path, _, kind = key.rpartition(".")
    if key.startswith((*_OTHER_PARTS, *_SCHEDULE)):
        found.elsewhere.append(key)
        return
    name = canonical(path)
    if name == "":
        found.elsewhere.append(key)
        return
    if tensor.numel() == 0 or not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
        raise ValueError(f"'{key}' holds values that are not finite numbers; the file is damaged, download it again")
    before = None if name is None else base(f"{name}.{kind}")
    if name is None or before is None:
        found.foreign.append(key)
        return
    if before.shape != tensor.shape:
        raise ValueError(
            f"'{key}' has shape {list(tensor.shape)} and the model's weight {list(before.shape)}: the file was made "
            "for another architecture; connect the model it was made from"
        )
    before = before.detach().to("cpu")
    if tensor.ndim < 2:
        if not torch.allclose(tensor.float(), before.float(), rtol=1e-3, atol=1e-6):
            found.vectors.append(key)
        return
    layer, kept = low_rank_change(tensor, before, energy)
    if layer is None:
        found.unchanged += 1
    elif layer.rank > RANK_LIMIT:
        raise ValueError(f"'{key}' differs from the base model in rank {layer.rank}; expected {RANK_LIMIT} at most")
    else:
        found.layers[name] = layer
        found.kept.append(kept)


def _check(found: Found, partial: bool) -> None:
    if not found.layers:
        raise ValueError(
            f"none of its weights differs from the connected model's ({found.unchanged} are equal, "
            f"{len(found.foreign)} have no counterpart); connect the model that it was made from, or use another file"
        )
    lost = [*found.vectors, *found.foreign]
    if lost and not partial:
        raise ValueError(
            f"{len(found.vectors)} biases and norms differ from the model's, and {len(found.foreign)} weights have no "
            f"counterpart in the model, such as '{lost[0]}'; a low-rank adapter cannot hold them: allow partial "
            "matches to leave them out"
        )


def _notes(found: Found, energy: float) -> list[str]:
    ranks = [layer.rank for layer in found.layers.values()]
    notes = [
        "scale = alpha / rank: 1 for the difference to the base model, that is alpha = rank",
        f"full weights: {len(ranks)} layers differ from the base model's; at least {energy:.4g} of each one's energy "
        f"is kept (lowest {min(found.kept):.6f}, mean {sum(found.kept) / len(ranks):.6f}), with ranks {min(ranks)} to "
        f"{max(ranks)}; {found.unchanged} layers are unchanged",
    ]
    for what, keys in (
        ("biases and norms that differ", found.vectors),
        ("weights without a counterpart in the model", found.foreign),
        ("weights of text encoder, VAE or schedule", found.elsewhere),
    ):
        if keys:
            notes.append(f"{len(keys)} {what} were left out, such as '{keys[0]}'")
    return notes
