"""Blending of base and adapted predictions, and classifier-free guidance.

Tensors in, tensors out: does not know models, samplers or prompts. Both formulas are affine in the predictions, which
may therefore be of any type (x0, eps, v).
"""

import math
from collections.abc import Sequence

from torch import Tensor, where


def blend(base: Tensor, adapted: Tensor, weight: float | Tensor) -> Tensor:
    """Return the blend of the base model's and the adapted model's prediction.

    blended = weight * base + (1 - weight) * adapted  (arXiv 2508.05755, the auto-guidance equation)

    Weight 1 returns `base` itself and weight 0 `adapted` itself. With one weight per sample, samples of weight 1 are
    bit-identical to `base` and samples of weight 0 to `adapted`, even where the other prediction is not finite.

    Args:
        base: prediction of the base model, [B, C, ...].
        adapted: prediction of the adapted model, same shape.
        weight: a number, or one per sample, [B]; a negative one extrapolates beyond the adapted model.
    Returns: same shape and dtype as `base`.
    Raises: ValueError if the shapes differ, or a weight is not finite.
    """
    row_weight = _row_weight(base, adapted, weight)
    if isinstance(row_weight, float):
        if row_weight == 1.0:
            return base
        if row_weight == 0.0:
            return adapted
        return row_weight * base + (1.0 - row_weight) * adapted
    blended = row_weight * base + (1.0 - row_weight) * adapted
    return where(row_weight == 1.0, base, where(row_weight == 0.0, adapted, blended))


def blend_many(base: Tensor, adapted: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    """Return the blend of the base prediction with the predictions of several adapters.

    blended = base + sum_i (1 - weight_i) * (adapted_i - base)

    Adapters whose weight is the number 1 are skipped: without any left the result is `base` itself, with one left it is
    `blend`'s. Samples of weight 1 do not change either.

    Args:
        base: prediction of the base model, [B, C, ...].
        adapted: predictions of the adapters, same shape.
        weights: of the adapters, as in `blend`.
    Returns: same shape and dtype as `base`.
    Raises: ValueError as `blend`, or if the numbers of predictions and weights differ.
    """
    if len(adapted) != len(weights):
        raise ValueError(f"got {len(adapted)} adapted predictions and {len(weights)} weights; give one weight each")
    active = [(p, w) for p, w in zip(adapted, weights, strict=True) if isinstance(w, Tensor) or w != 1.0]
    if len(active) == 1:
        return blend(base, *active[0])
    blended = base
    for prediction, weight in active:
        row_weight = _row_weight(base, prediction, weight)
        added = blended + (1.0 - row_weight) * (prediction - base)
        blended = added if isinstance(row_weight, float) else where(row_weight == 1.0, blended, added)
    return blended


def classifier_free(cond: Tensor, uncond: Tensor, guidance_scale: float) -> Tensor:
    """Return the guided prediction.

    guided = uncond + guidance_scale * (cond - uncond)  (arXiv 2207.12598)

    Args:
        cond: prediction for the prompt, [B, C, ...].
        uncond: prediction for the negative or empty prompt, same shape.
        guidance_scale: 1 gives cond, 0 gives uncond.
    Returns: same shape and dtype as `cond`.
    Raises: ValueError if the shapes differ.
    """
    if cond.shape != uncond.shape:
        raise ValueError(f"cond has shape {list(cond.shape)} and uncond {list(uncond.shape)}; expected the same shape")
    return uncond + guidance_scale * (cond - uncond)


def _row_weight(base: Tensor, adapted: Tensor, weight: float | Tensor) -> float | Tensor:
    """The validated weight: a float, or a tensor [B, 1, ...] on the device of `base`."""
    if base.shape != adapted.shape:
        raise ValueError(
            f"base has shape {list(base.shape)} and adapted {list(adapted.shape)}; expected the same shape"
        )
    if not isinstance(weight, Tensor):
        if not math.isfinite(weight):
            raise ValueError(f"the blending weight is {weight}; expected a finite number")
        return float(weight)
    if weight.shape != base.shape[:1]:
        raise ValueError(
            f"the blending weight has shape {list(weight.shape)}; expected a number or one weight per sample, "
            f"[{base.shape[0]}]"
        )
    if not bool(weight.isfinite().all()):
        raise ValueError(f"the blending weights are {weight.tolist()}; expected finite numbers")
    return weight.to(base).reshape(-1, *[1] * (base.ndim - 1))
