"""The objective of erasure training: predictions in, targets and losses out. Does not know the model or the loop."""

from torch import Tensor
from torch.nn.functional import mse_loss


def erasure_target(eps_reference: Tensor, eps_target: Tensor, negative_guidance: float) -> Tensor:
    """Return what the adapted model should predict for the prompt to erase.

    target = e_reference - negative_guidance * (e_target - e_reference)  (arXiv 2508.05755, training; after ESD,
    arXiv 2303.07345, with a reference prompt in place of the empty one)

    Args:
        eps_reference: the frozen base model's prediction for the reference prompt, [B, C, ...].
        eps_target: the frozen base model's prediction for the prompt to erase, at the same latent, same shape.
        negative_guidance: how far to extrapolate beyond the reference, away from the target; the paper uses 2.
    Returns: same shape and dtype as `eps_reference`, detached.
    Raises: ValueError if the shapes differ.
    """
    _require_same_shape("eps_target", eps_target, "eps_reference", eps_reference)
    return (eps_reference - negative_guidance * (eps_target - eps_reference)).detach()


def erasure_loss(eps_adapted: Tensor, target: Tensor) -> Tensor:
    """Return the distance between the adapted model's prediction for the prompt to erase and `erasure_target`.

    loss = mean((e_adapted - target)^2)

    Args:
        eps_adapted: the adapted model's prediction for the prompt to erase, [B, C, ...].
        target: what `erasure_target` returned for the same latent, same shape.
    Returns: a scalar with gradients.
    Raises: ValueError if the shapes differ.
    """
    _require_same_shape("eps_adapted", eps_adapted, "target", target)
    return mse_loss(eps_adapted, target)


def preservation_loss(eps_adapted: Tensor, eps_base: Tensor, weight: float) -> Tensor:
    """Return the penalty for changing the prediction for a prompt to keep.

    loss = weight * mean((e_adapted - e_base)^2)

    Args:
        eps_adapted: the adapted model's prediction for a prompt to keep, [B, C, ...].
        eps_base: the frozen base model's, at the same latent, same shape.
        weight: relative to `erasure_loss`; the selective recipe uses 10.
    Returns: a scalar with gradients.
    Raises: ValueError if the shapes differ.
    """
    _require_same_shape("eps_adapted", eps_adapted, "eps_base", eps_base)
    return weight * mse_loss(eps_adapted, eps_base.detach())


def _require_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Checked here because mse_loss broadcasts, with a warning only."""
    if value.shape != other.shape:
        raise ValueError(
            f"{name} has shape {list(value.shape)} and {other_name} {list(other.shape)}; expected the same shape"
        )
