"""What a prompt's influence is compared with: the adapter's influence on another prompt, at the same noise level.

An adapter's calibration has it for the concept's own prompt. Where that does not hold, it is measured on short rollouts
of the prompt and remembered, under a key that covers everything that the rollouts read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from ...unguide_core.adapter import Adapter
from ...unguide_core.probe.calibration import Calibration, Level
from ..lora.load import Conditioning, ErasureLora
from ..model.key import has_forward_patches, matches_model, model_key
from .conds import Context, Entry, digest, everywhere
from .predictions import Predictions, Subject
from .rollout import down_to, noise_at, rollout, schedule
from .settings import Settings

REPEATS = 4
REMEMBERED = 256


class Memory:
    """The last baselines that were measured: values per noise seed, in eps units."""

    def __init__(self, size: int = REMEMBERED):
        self.size = size
        self._values: OrderedDict[tuple[Any, ...], tuple[float, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: tuple[Any, ...] | None, measure: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
        """Return the values of a key, measured where they are not there; without a key they are not remembered."""
        if key is None:
            return measure()
        if key not in self._values:
            self._values[key] = measure()
        self._values.move_to_end(key)
        while len(self._values) > self.size:
            self._values.popitem(last=False)
        return self._values[key]

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()


memory = Memory()
_read: WeakKeyDictionary[Adapter, Calibration | None] = WeakKeyDictionary()
"""The calibrations of adapters, read once from their metadata."""


def influence_on_prompt(
    predictions: Predictions, index: int, lora: ErasureLora, settings: Settings, conditioning: Conditioning
) -> tuple[float, ...]:
    """Return the influence of adapter `index` on a prompt, at the latent size and noise level of some predictions."""
    context = predictions.context
    entry = {name: value for name, value in context.prompt[0].items() if name != "control"}
    entries = context.retargeted(entry, conditioning, predictions.latent[:1], settings.seed)
    return influence_on_entries(predictions, index, lora, settings, entries)


def influence_on_entries(
    predictions: Predictions, index: int, lora: ErasureLora, settings: Settings, entries: Sequence[Entry]
) -> tuple[float, ...]:
    """Return the same for processed entries, such as the negative prompt's."""
    entries = [everywhere(entry) for entry in entries]
    key = _key(predictions, lora, settings, entries)
    return memory.get(key, lambda: _measured(predictions, index, settings, entries))


def _key(
    predictions: Predictions, lora: ErasureLora, settings: Settings, entries: Sequence[Entry]
) -> tuple[Any, ...] | None:
    """Everything that the rollouts read; None where they read something without a value, such as a function."""
    context = predictions.context
    guider, options = context.guider, context.model_options
    others = {name: conds for name, conds in guider.conds.items() if name != "positive"}
    said = digest([entries, others])
    functions = any(name.startswith("sampler_") for name in options) or has_forward_patches(guider.model_patcher)
    if said is None or functions:
        return None
    scales = {name: value for name, value in vars(guider).items() if isinstance(value, int | float | str)}
    return (
        context.model_key,
        type(guider).__name__,
        tuple(sorted(scales.items())),
        lora.key,
        tuple(predictions.latent.shape[1:]),
        predictions.level,
        settings.probe_schedule_steps,
        settings.seed,
        said,
    )


def _measured(predictions: Predictions, index: int, settings: Settings, entries: Sequence[Entry]) -> tuple[float, ...]:
    context, shape = predictions.context, (REPEATS, *predictions.latent.shape[1:])
    sigmas = down_to(schedule(context, settings.probe_schedule_steps), predictions.level)
    start = noise_at(context, float(sigmas[0]), shape, settings.seed)
    latent = rollout(context, start, sigmas, entries, settings.seed)
    there, subject = Predictions(context, latent, predictions.level), Subject(("baseline",), tuple(entries))
    there.fetch([(subject, None), (subject, index)])
    return tuple(there.influence(subject, index).tolist())


@dataclass(frozen=True)
class Calibrated:
    """What an adapter's calibration says for a run.

    Args:
        influence, alignment: figures at the noise level; None where the calibration is not for this model, adapter and
            noise level.
        baseline: the influence on the concept's own prompt; None where the latent's size or the guidance scale differ.
        note: why something is None, in words.
    """

    influence: Level | None = None
    alignment: Level | None = None
    baseline: float | None = None
    note: str = ""


def hash_ahead(patcher: Any, loras: Sequence[ErasureLora]) -> None:
    """Hash a model's weights where a calibration names it by them: inside a step that would take long, unseen."""
    key = model_key(patcher)
    for lora in loras:
        matches_model(str(lora.adapter.card.calibration.get("model", "")), patcher, key)


def valid_calibration(context: Context, lora: ErasureLora) -> tuple[Calibration | None, str]:
    """Return the calibration in the adapter's metadata if it is for this model and adapter, else why not, in words."""
    if not lora.adapter.card.calibration:
        return None, "the adapter is not calibrated"
    if lora.adapter not in _read:
        _read[lora.adapter] = Calibration.from_card(lora.adapter.card.calibration)
    calibration = _read[lora.adapter]
    if calibration is None:
        return None, "the adapter's calibration is of another version; calibrate it again"
    if calibration.adapter != lora.adapter.signature:
        return None, "the calibration is for another adapter"
    if any("hooks" in entry for entries in context.guider.conds.values() for entry in entries or ()):
        return None, "the calibration is for the model without the hooks on the conditioning"
    if not matches_model(calibration.model, context.guider.model_patcher, context.model_key):
        return None, (
            f"the calibration is for another model (key {calibration.model}) than this one (key {context.model_key})"
        )
    return calibration, ""


def read_calibration(predictions: Predictions, lora: ErasureLora) -> Calibrated:
    """Return what the calibration in the adapter's metadata says here, every key checked.

    Thresholds are relative to the influence on the concept's own prompt, and hold for the model and the adapter. That
    influence itself holds only for the latent's size and the guidance scale.
    """
    context = predictions.context
    calibration, note = valid_calibration(context, lora)
    if calibration is None:
        return Calibrated(note=note)
    influence, alignment = (calibration.at(name, predictions.level) for name in ("influence", "alignment"))
    if influence is None:
        only = "" if calibration.levels else "; only the text stage is calibrated"
        return Calibrated(note=f"the calibration has no noise level near sigma {predictions.level:.3g}{only}")
    here = tuple(predictions.latent.shape[1:])
    if calibration.latent != here:
        there = list(calibration.latent)
        return Calibrated(
            influence, alignment, note=f"the baseline is calibrated for latent {there}, and measured for {list(here)}"
        )
    if calibration.cfg != context.cfg:
        return Calibrated(
            influence,
            alignment,
            note=f"the baseline is calibrated for cfg {calibration.cfg}, and measured for {context.cfg}",
        )
    return Calibrated(influence, alignment, influence.baseline)
