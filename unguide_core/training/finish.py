"""The end of a training: the adapter with its metadata, calibrated."""

from collections.abc import Callable
from dataclasses import replace

from ..adapter.card import Card
from ..adapter.lowrank import Adapter, LowRank
from ..probe.calibration import Calibration
from .rollout import is_out_of_memory
from .trainer import Training


def finish(
    training: Training,
    card: Card,
    calibrate: Callable[[Adapter], Calibration] | None,
    *,
    interrupted: tuple[type[BaseException], ...] = (),
    log: Callable[[str], object],
) -> Adapter:
    """Return the trained adapter on the CPU, calibrated if that is possible.

    A calibration that fails never costs the training: the adapter is returned without it.

    Args:
        card: what is known of the adapter; rank, alpha and settings are filled in from the training. Settings that it
            has already are kept.
        calibrate: measures the adapter; None leaves it uncalibrated.
        interrupted: exceptions by which the user stops the calibration.
        log: takes a sentence for the user on why the adapter is not calibrated.
    Raises: what `calibrate` raises, except ValueError, running out of memory and `interrupted`.
    """
    layers = {
        name: LowRank(layer.down.detach().cpu().clone(), layer.up.detach().cpu().clone(), layer.scale)
        for name, layer in training.layers.items()
    }
    recipe, settings = training.recipe, {**training.settings, **card.settings}
    adapter = Adapter(layers, replace(card, rank=recipe.rank, alpha=recipe.alpha, settings=settings))
    if calibrate is None:
        return adapter
    try:
        found = calibrate(adapter)
    except BaseException as error:
        if not isinstance(error, (ValueError, *interrupted)) and not is_out_of_memory(error):
            raise
        reason = str(error) or "it was cancelled"
        log(f"{card.concept or 'the adapter'} is trained, but not calibrated ({reason}); use Calibrate Erasure LoRA")
        return adapter
    return replace(adapter, card=replace(adapter.card, calibration=found.to_card()))
