"""The gate on the narrow model: what the third step of an image decides, as UnGuide's gate decides it by default.

After two of twenty steps of the base model the adapter is probed once. `influence` decides, relative to that on the
concept's own prompt, against a threshold that is calibrated for one false positive in a hundred; where it would miss
too many of the concept's prompts, `alignment` does. What is detected is erased from that step on, with weight 0; all
else is the base model's. The rules are those of `unguide_core.probe`; `python3 dev gate` measures the same in ComfyUI,
for the shipped erasure LoRAs. It does not know training, or what judges images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unguide_core.probe import alignment, influence
from unguide_core.probe.calibration import UNCALIBRATED, Level, tells_apart
from unguide_core.probe.spread import Spread
from unguide_core.schedule import partial_denoise, to_sigma_space

from .captions import CLASSES, SCENES, photo, placed, words_for
from .narrow import LATENT, Layers, Narrow, adapted_table, normal_sigmas, timestep_of

PROBE_STEPS = 2
"""Steps before the probe."""
ERASED_FROM = PROBE_STEPS
"""The step from which on the adapter erases what was detected: that of the probe itself."""
FALSE_POSITIVE_RATE = 0.01
REPEATS, OWN_REPEATS = 4, 8
CALIBRATED_FROM, IMAGES_FROM = 0, 10_000
"""Seeds of the first noise: of a calibration, and of the images that `demo.evaluate` generates."""
ROWS = 64


def calibration_prompts(concept: str) -> tuple[list[str], list[str]]:
    """Returns prompts with the concept, its own first, and others, as the shipped adapters are calibrated with.

    The scenes that objects are placed in are not those of `demo.evaluate`.
    """

    def of(klass: str) -> list[str]:
        return [*map(photo, words_for(klass)), *(placed(klass, scene) for scene in SCENES[0::3])]

    others = [prompt for other in CLASSES if other != concept for prompt in of(other)]
    return of(concept), ["", *map(photo, SCENES), *others]


@dataclass(frozen=True)
class Probe:
    """Latents of a prompt before the third step, [N, 4, H, W], and what the base model predicts there, likewise."""

    z: Tensor
    prompt: Tensor
    neutral: Tensor


class Probes:
    """The base model's predictions, each computed once for all adapters.

    Args:
        narrow: the model.
    """

    def __init__(self, narrow: Narrow) -> None:
        self.narrow = narrow
        sigmas = normal_sigmas()
        self._sigmas, self._time = sigmas[: PROBE_STEPS + 1], timestep_of(sigmas[PROBE_STEPS])
        self._known: dict[tuple[str, int, int], Probe] = {}
        self._concepts: dict[tuple[str, str, int, int], Tensor] = {}

    @torch.no_grad()
    def at(self, prompt: str, seed: int, count: int) -> Probe:
        """Returns the predictions for a prompt from `count` noises of the seeds from `seed` on."""
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
            self._known[key] = Probe(z, *both.chunk(2))
        return self._known[key]

    @torch.no_grad()
    def influence(self, prompts: Sequence[str], layers: Layers, seed: int, count: int) -> Tensor:
        """Returns how much an adapter changes what is predicted for each prompt, [prompts, count]."""
        probes = [self.at(prompt, seed, count) for prompt in prompts]
        states = self.narrow.encode(prompts)
        table = adapted_table(self.narrow.table(states), states, layers)
        rows = torch.arange(len(prompts)).repeat_interleave(count)
        adapted = self._eps(torch.cat([probe.z for probe in probes]), table, rows)
        return influence(torch.cat([probe.prompt for probe in probes]), adapted).view(len(prompts), count)

    @torch.no_grad()
    def alignment(self, prompts: Sequence[str], concept: str, seed: int, count: int) -> Tensor:
        """Returns how far each prompt pulls the prediction where the concept's own pulls it, [prompts, count]."""
        table = self.narrow.table(self.narrow.encode([photo(concept)]))
        scores = []
        for prompt in prompts:
            probe, key = self.at(prompt, seed, count), (concept, prompt, seed, count)
            if key not in self._concepts:
                self._concepts[key] = self._eps(probe.z, table, torch.zeros(count, dtype=torch.long))
            scores.append(alignment(probe.prompt, probe.neutral, self._concepts[key]))
        return torch.stack(scores)

    def _eps(self, z: Tensor, table: dict[str, Tensor], rows: Tensor) -> Tensor:
        parts = zip(z.split(ROWS), rows.split(ROWS), strict=True)
        return torch.cat([self.narrow.eps(part, self._time.expand(len(part)), table, of) for part, of in parts])


@dataclass(frozen=True)
class Gate:
    """A calibrated gate of one concept.

    statistic: "influence" or "alignment".
    baseline: of the concept's own prompt, what scores are relative to.
    """

    probes: Probes
    concept: str
    layers: Layers
    statistic: str
    baseline: float
    threshold: float

    def detects(self, prompts: Sequence[str], count: int) -> Tensor:
        """Returns in which images of `demo.evaluate.generate` the concept is detected, boolean [prompts, count]."""
        if self.statistic == "influence":
            values = self.probes.influence(prompts, self.layers, IMAGES_FROM, count)
        else:
            values = self.probes.alignment(prompts, self.concept, IMAGES_FROM, count)
        return values / self.baseline >= self.threshold


def calibrated(probes: Probes, concept: str, layers: Layers) -> Gate:
    """Returns the gate of a concept's adapter."""
    within, others = calibration_prompts(concept)
    own = probes.influence(within[:1], layers, CALIBRATED_FROM, OWN_REPEATS).flatten()
    baseline = float(own.mean())
    scores = torch.cat([own, probes.influence(within[1:], layers, CALIBRATED_FROM, REPEATS).flatten()])
    influenced = _level(scores / baseline, probes.influence(others, layers, CALIBRATED_FROM, REPEATS) / baseline)
    pulls = (probes.alignment(prompts, concept, CALIBRATED_FROM, REPEATS) for prompts in (within, others))
    if tells_apart(influenced, _level(*pulls), FALSE_POSITIVE_RATE):
        return Gate(probes, concept, layers, "influence", baseline, influenced.threshold(FALSE_POSITIVE_RATE))
    return Gate(probes, concept, layers, "alignment", 1.0, UNCALIBRATED["alignment"])


def _level(concept: Tensor, others: Tensor) -> Level:
    spreads = Spread.of(concept.flatten().tolist(), upper=False), Spread.of(others.flatten().tolist(), upper=True)
    return Level(0.0, 1.0, 0.0, *spreads)
