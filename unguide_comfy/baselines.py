"""What a prompt's influence is compared with: the adapter's influence on another prompt, at a noise level.

Measured once on short trajectories of that prompt, and remembered for the model with its patches, the adapter, the
latent's shape, the noise level, the guidance scale and the prompt. A card's calibration spares even that.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..unguide_core.calibration import Calibration, Level
from .context import Context, Entry, everywhere
from .erasure import Conditioning, ErasureLora
from .identity import is_called
from .looking import Look, Subject
from .trajectories import down_to, noise_at, schedule, trajectory

REPEATS = 4
REMEMBERED = 256


@dataclass(frozen=True)
class Baseline:
    """Values per noise seed, in eps units.

    Args:
        influence: over the whole picture.
        patch: in the patch where it is strongest.
    """

    influence: tuple[float, ...]
    patch: tuple[float, ...]

    def of(self, statistic: str) -> torch.Tensor:
        return torch.tensor(self.patch if statistic == "patch" else self.influence)


class Memory:
    """The last baselines that were measured."""

    def __init__(self, size: int = REMEMBERED):
        self.size = size
        self._found: OrderedDict[tuple[Any, ...], Baseline] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: tuple[Any, ...]) -> Baseline | None:
        if key in self._found:
            self._found.move_to_end(key)
        return self._found.get(key)

    def put(self, key: tuple[Any, ...], baseline: Baseline) -> None:
        self._found[key] = baseline
        while len(self._found) > self.size:
            self._found.popitem(last=False)

    def clear(self) -> None:
        self._found.clear()


memory = Memory()


@dataclass(frozen=True)
class Measurement:
    """How baselines are measured: on a schedule of `steps`, with noise of `seed`."""

    context: Context
    steps: int
    seed: int

    def of_conditioning(self, index: int, lora: ErasureLora, conditioning: Conditioning, look: Look) -> Baseline:
        """The influence of adapter `index` on a conditioning, at the latent size and noise level of a look."""
        return self._remembered(index, lora, _said(conditioning), look, lambda: self._entries(conditioning, look))

    def of_entries(self, index: int, lora: ErasureLora, entries: Sequence[Entry], look: Look) -> Baseline:
        """The same for processed entries, such as the negative prompt."""
        said = _said([[entry.get("cross_attn"), entry] for entry in entries])
        return self._remembered(index, lora, said, look, lambda: [everywhere(entry) for entry in entries])

    def _entries(self, conditioning: Conditioning, look: Look) -> list[Entry]:
        entry = {name: value for name, value in self.context.prompt[0].items() if name != "control"}
        return self.context.retargeted(entry, conditioning, look.latent[:1], self.seed)

    def _remembered(self, index: int, lora: ErasureLora, said: str, look: Look, entries: Any) -> Baseline:
        shape, level = tuple(look.latent.shape[1:]), round(look.level, 4)
        key = (self.context.model_key, lora.key, shape, level, self.context.cfg, said, self.steps, self.seed)
        found = memory.get(key)
        if found is None:
            found = self._measured(index, entries(), (REPEATS, *shape), look.level)
            memory.put(key, found)
        return found

    def _measured(self, index: int, entries: Sequence[Entry], shape: Sequence[int], level: float) -> Baseline:
        sigmas = down_to(schedule(self.context, self.steps), level)
        start = noise_at(self.context, float(sigmas[0]), shape, self.seed)
        latent = trajectory(self.context, start, sigmas, entries, self.seed)
        look, subject = Look(self.context, latent, level), Subject(("baseline",), tuple(entries))
        look.fetch([(subject, None), (subject, index)])
        patches = look.map(subject, index).flatten(1).amax(dim=1)
        return Baseline(tuple(look.influence(subject, index).tolist()), tuple(patches.tolist()))


def _said(conditioning: Sequence[Sequence[Any]]) -> str:
    """Identifies what a conditioning says: its text states, pooled states, sizes."""
    digest = hashlib.sha256()
    for text, options in conditioning:
        pooled = options.get("pooled_output")
        for tensor in (text, pooled):
            if tensor is not None:
                digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        plain = {name: value for name, value in options.items() if isinstance(value, int | float | str)}
        digest.update(str(sorted(plain.items())).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class CardReading:
    """What an erasure LoRA's card says of one statistic here.

    Args:
        level: its figures at the noise level; None where the card has none for this model, adapter and noise level.
        baseline: whether the card's baseline holds too: its latent and guidance scale are the run's.
        note: why not, in words; empty where all holds.
    """

    level: Level | None = None
    baseline: bool = False
    note: str = ""


def read_card(context: Context, lora: ErasureLora, statistic: str, look: Look) -> CardReading:
    """Reads the card's calibration, every key checked.

    The thresholds are relative to the concept's own influence, and hold for the model and the adapter; the baseline
    itself for the latent's size and the guidance scale as well.
    """
    content = lora.adapter.card.calibration
    if not content:
        return CardReading(note="the card has no calibration")
    calibration = Calibration.from_card(content)
    if calibration is None:
        return CardReading(note="the card's calibration is of another version; calibrate the adapter anew")
    if calibration.adapter != lora.calibration_key:
        return CardReading(note="the card's calibration is for another adapter or strength")
    if not is_called(context.guider.model_patcher, calibration.model, context.model_key):
        return CardReading(
            note=f"the card's calibration is for another model (key {calibration.model}) than this one "
            f"(key {context.model_key})"
        )
    level = calibration.at(statistic, look.level)
    if level is None:
        return CardReading(note=f"the card's calibration has no noise level near sigma {look.level:.3g}")
    latent = tuple(look.latent.shape[1:])
    if calibration.latent != latent:
        there, here = list(calibration.latent), list(latent)
        return CardReading(level, note=f"the card's baseline is for latent {there}, and measured anew for {here}")
    if calibration.cfg != context.cfg:
        return CardReading(
            level, note=f"the card's baseline is for cfg {calibration.cfg}, and measured anew for {context.cfg}"
        )
    return CardReading(level, baseline=True)
