"""The gate on the narrow model: what a picture's own third step decides, as UnGuide's gate decides it by default.

After two of twenty steps of the base model the adapter is looked at once. `influence` decides, relative to that of the
concept's own prompt, against a threshold that was calibrated for one false alarm in a hundred; where the calibration
does not speak for it, `alignment`. What is found is erased from that step on, with weight 0;
all else is the base model's. The rules are `unguide_core.calibration`'s and `unguide_core.probe`'s; `python3 dev gate`
measures the same in ComfyUI, for the shipped erasure LoRAs. It does not know training, or what judges pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unguide_core.calibration import UNCALIBRATED, Level, Spread, Threshold, tells_apart
from unguide_core.probe import alignment, influence
from unguide_core.trajectory import partial_denoise, to_sigma_space

from .captions import CLASSES, SCENES, words_for
from .erasure import photo, placed
from .narrow import LATENT, Layers, Narrow, adapted_table, normal_sigmas, timestep_of

LOOK = 2
"""Steps before the look."""
ERASED_FROM = LOOK
"""The step from which on the adapter draws what was found: that of the look itself."""
FALSE_ALARM_RATE = 0.01
REPEATS, OWN_REPEATS = 4, 8
CALIBRATED_FROM, PICTURES_FROM = 0, 10_000
"""Seeds of the first noise: of a calibration, and of the pictures that `demo.evaluate` draws."""
ROWS = 64


def calibration_prompts(concept: str) -> tuple[list[str], list[str]]:
    """Returns prompts with the concept, its own first, and others, as the shipped cards are calibrated with.

    The scenes that objects are placed in are not those of `demo.evaluate`.
    """

    def of(klass: str) -> list[str]:
        return [*map(photo, words_for(klass)), *(placed(klass, scene) for scene in SCENES[0::3])]

    others = [prompt for other in CLASSES if other != concept for prompt in of(other)]
    return of(concept), ["", *map(photo, SCENES), *others]


@dataclass(frozen=True)
class Look:
    """Latents of a prompt before the third step, [N, 4, H, W], and what the base model predicts there, likewise."""

    z: Tensor
    prompt: Tensor
    neutral: Tensor


class Looks:
    """The base model's looks, each taken once for all adapters.

    Args:
        narrow: the model.
    """

    def __init__(self, narrow: Narrow) -> None:
        self.narrow = narrow
        sigmas = normal_sigmas()
        self._sigmas, self._time = sigmas[: LOOK + 1], timestep_of(sigmas[LOOK])
        self._known: dict[tuple[str, int, int], Look] = {}
        self._concepts: dict[tuple[str, str, int, int], Tensor] = {}

    @torch.no_grad()
    def at(self, prompt: str, seed: int, count: int) -> Look:
        """Returns the looks at a prompt from `count` noises of the seeds from `seed` on."""
        key = prompt, seed, count
        if key not in self._known:
            noise = torch.stack(
                [torch.randn(LATENT, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
            )
            table = self.narrow.table(self.narrow.encode([prompt, ""]))
            own, empty = torch.zeros(count, dtype=torch.long), torch.ones(count, dtype=torch.long)
            start = to_sigma_space(noise, float(self._sigmas[0]))
            x = partial_denoise(self.narrow.denoise(table, own, empty), start, self._sigmas)
            z = (x / (1.0 + self._sigmas[-1] ** 2).sqrt()).float()
            both = self._eps(z.repeat(2, 1, 1, 1), table, torch.cat([own, empty]))
            self._known[key] = Look(z, *both.chunk(2))
        return self._known[key]

    @torch.no_grad()
    def influence(self, prompts: Sequence[str], layers: Layers, seed: int, count: int) -> Tensor:
        """Returns how much an adapter changes what is predicted for each prompt, [prompts, count]."""
        looks = [self.at(prompt, seed, count) for prompt in prompts]
        states = self.narrow.encode(prompts)
        table = adapted_table(self.narrow.table(states), states, layers)
        rows = torch.arange(len(prompts)).repeat_interleave(count)
        adapted = self._eps(torch.cat([look.z for look in looks]), table, rows)
        return influence(torch.cat([look.prompt for look in looks]), adapted).view(len(prompts), count)

    @torch.no_grad()
    def alignment(self, prompts: Sequence[str], concept: str, seed: int, count: int) -> Tensor:
        """Returns how far each prompt pulls the prediction where the concept's own pulls it, [prompts, count]."""
        table = self.narrow.table(self.narrow.encode([photo(concept)]))
        found = []
        for prompt in prompts:
            look, key = self.at(prompt, seed, count), (concept, prompt, seed, count)
            if key not in self._concepts:
                self._concepts[key] = self._eps(look.z, table, torch.zeros(count, dtype=torch.long))
            found.append(alignment(look.prompt, look.neutral, self._concepts[key]))
        return torch.stack(found)

    def _eps(self, z: Tensor, table: dict[str, Tensor], rows: Tensor) -> Tensor:
        parts = zip(z.split(ROWS), rows.split(ROWS), strict=True)
        return torch.cat([self.narrow.eps(part, self._time.expand(len(part)), table, of) for part, of in parts])


@dataclass(frozen=True)
class Gate:
    """A calibrated gate of one concept.

    statistic: "influence" or "alignment".
    baseline: of the concept's own prompt, what scores are relative to.
    """

    looks: Looks
    concept: str
    layers: Layers
    statistic: str
    baseline: float
    threshold: Threshold

    def detects(self, prompts: Sequence[str], count: int) -> Tensor:
        """Returns which of the pictures of `demo.evaluate.draw` are taken for the concept, boolean [prompts, count]."""
        if self.statistic == "influence":
            values = self.looks.influence(prompts, self.layers, PICTURES_FROM, count)
        else:
            values = self.looks.alignment(prompts, self.concept, PICTURES_FROM, count)
        return values / self.baseline >= self.threshold.score


def calibrated(looks: Looks, concept: str, layers: Layers) -> Gate:
    """Returns the gate of a concept's adapter."""
    within, others = calibration_prompts(concept)
    own = looks.influence(within[:1], layers, CALIBRATED_FROM, OWN_REPEATS).flatten()
    baseline = float(own.mean())
    scores = torch.cat([own, looks.influence(within[1:], layers, CALIBRATED_FROM, REPEATS).flatten()])
    influenced = _level(scores / baseline, looks.influence(others, layers, CALIBRATED_FROM, REPEATS) / baseline)
    pulls = (looks.alignment(prompts, concept, CALIBRATED_FROM, REPEATS) for prompts in (within, others))
    if tells_apart(influenced, _level(*pulls), FALSE_ALARM_RATE):
        return Gate(looks, concept, layers, "influence", baseline, influenced.threshold(FALSE_ALARM_RATE))
    return Gate(looks, concept, layers, "alignment", 1.0, UNCALIBRATED["alignment"])


def _level(concept: Tensor, others: Tensor) -> Level:
    spreads = Spread.of(concept.flatten().tolist(), upper=False), Spread.of(others.flatten().tolist(), upper=True)
    return Level(0.0, 1.0, 0.0, *spreads)
