"""Calibrates an erasure LoRA for a model: how its scores spread for its concept's prompts and for others.

Every prompt is denoised by the base model from several noises, and looked at on the way, at the noise levels at which
a gate may look. See `unguide_core.calibration` for what follows from the scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from ..unguide_core.calibration import LOOKS, STEPS, Calibration, Level
from .blending import Run, blended_prediction
from .context import Context, Entry, carrying
from .erasure import Conditioning, ErasureLora
from .gating import KEY, matched, without_gates
from .identity import model_key
from .looking import Look, Wanted
from .trajectories import noise_at, schedule, trajectory

STATISTICS = ("influence", "patch", "alignment")

# where a concept is put besides alone, for it shall be found there as well
IN_SCENES = ("{} in a forest", "{} on a street", "{} on a table")


def concept_prompts(concept: str, own_prompt: str, synonyms: Sequence[str]) -> list[str]:
    """The concept's own prompt with each of its synonyms, and in scenes."""
    words = [own_prompt.replace(concept, word) if concept in own_prompt else word for word in synonyms]
    return [*words, *(scene.format(own_prompt) for scene in IN_SCENES)]


@dataclass(frozen=True)
class CalibrationSettings:
    """How a calibration is measured.

    Args:
        steps: of the schedule, of the host's scheduler "normal".
        looks: the steps before which to look, rising; they should enclose the step at which gates decide.
        repeats: noise seeds for each prompt.
        own_repeats: noise seeds for the concept's own prompt, whose mean is the baseline.
        seed: of the first noise.
    """

    steps: int = STEPS
    looks: tuple[int, ...] = LOOKS
    repeats: int = 4
    own_repeats: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        rising = list(self.looks) == sorted(set(self.looks))
        if not self.looks or not rising or self.looks[0] < 1 or self.looks[-1] >= self.steps:
            raise ValueError(
                f"calibration looks at the steps {list(self.looks)} of {self.steps}; expected rising numbers from 1 on"
            )
        if self.repeats < 1 or self.own_repeats < 2:
            raise ValueError("calibration needs at least 1 noise seed a prompt, and 2 for the concept's own")


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts to calibrate with.

    Args:
        concept: with the concept (synonyms, in scenes), besides its own prompt, which the erasure LoRA carries.
        others: without it.
    """

    concept: Sequence[Conditioning]
    others: Sequence[Conditioning]


def calibrated(
    model: Any,
    loras: Sequence[ErasureLora],
    prompts: Sequence[Prompts],
    negative: Conditioning,
    cfg: float,
    latent: torch.Tensor,
    settings: CalibrationSettings | None = None,
) -> list[ErasureLora]:
    """The erasure LoRAs with a calibration for this model in their cards; nothing else of them changes.

    Args:
        model: a `ModelPatcher`, with the patches that it will be sampled with.
        prompts: one per erasure LoRA.
        negative: the negative prompt of the trajectories.
        cfg: their guidance scale.
        latent: whose shape is used, [B, C, ...].
    Raises: ValueError if an erasure LoRA has no concept's or neutral prompt encoded, or there are no other prompts.
    """
    settings = settings or CalibrationSettings()
    for lora, own in zip(loras, prompts, strict=True):
        if lora.concept is None or lora.neutral is None:
            raise ValueError(
                f"erasure LoRA {lora.name!r} has no encoded concept to calibrate with; connect a CLIP to Load Erasure "
                "LoRA, and name the concept there"
            )
        if not own.others:
            raise ValueError("calibration needs other prompts, at least one; got none")
    base, _ = without_gates(model)
    run = Run(tuple(matched(lora, base) for lora in loras))
    base.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, blended_prediction)
    guider = comfy.samplers.CFGGuider(base)
    guider.set_conds(loras[0].neutral, negative)
    guider.set_cfg(cfg)
    sampler = _Calibration(run, model_key(base), loras, prompts, settings)
    one = latent[:1]
    guider.sample(torch.zeros_like(one), one, sampler, torch.ones(2), seed=settings.seed)
    return [
        replace(lora, adapter=replace(lora.adapter, card=replace(lora.adapter.card, calibration=found.to_card())))
        for lora, found in zip(loras, sampler.calibrations, strict=True)
    ]


class _Calibration(comfy.samplers.Sampler):
    """A calibration run as if it were a sampler: `CFGGuider.sample` loads the model for it."""

    def __init__(
        self,
        run: Run,
        key: str,
        loras: Sequence[ErasureLora],
        prompts: Sequence[Prompts],
        settings: CalibrationSettings,
    ):
        self.run, self.key, self.loras, self.prompts, self.settings = run, key, loras, prompts, settings
        self.calibrations: list[Calibration] = []

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """The latent that came in: the result is `calibrations`."""
        options = carrying(extra_args, self.run)["model_options"]
        context = Context(model_wrap, self.run, options, self.key)
        scores = _Scores(context, self.settings, tuple(noise.shape[1:]), self.loras)
        asked = _asked(self.loras, self.prompts)
        progress = comfy.utils.ProgressBar(len(asked))
        for conditioning, groups in asked:
            scores.take(conditioning, groups)
            progress.update(1)
            comfy.model_management.throw_exception_if_processing_interrupted()
        self.calibrations = [
            Calibration(
                model=self.key,
                adapter=lora.calibration_key,
                latent=tuple(noise.shape[1:]),
                cfg=context.cfg,
                repeats=self.settings.own_repeats,
                levels=scores.levels(index),
            )
            for index, lora in enumerate(self.loras)
        ]
        return noise


OWN, CONCEPT, OTHERS = "own", "concept", "others"


def _asked(loras: Sequence[ErasureLora], prompts: Sequence[Prompts]) -> list[tuple[Conditioning, dict[int, str]]]:
    """Every prompt once, with the group that it belongs to for each erasure LoRA that asks for it."""
    asked: dict[int, tuple[Conditioning, dict[int, str]]] = {}
    for index, (lora, own) in enumerate(zip(loras, prompts, strict=True)):
        assert lora.concept is not None
        for group, conditionings in ((CONCEPT, own.concept), (OTHERS, own.others), (OWN, [lora.concept])):
            for conditioning in conditionings:
                asked.setdefault(id(conditioning), (conditioning, {}))[1][index] = group
    return list(asked.values())


class _Scores:
    """The statistics' values of all erasure LoRAs: by LoRA, group of prompts, statistic and noise level."""

    def __init__(
        self, context: Context, settings: CalibrationSettings, shape: tuple[int, ...], loras: Sequence[ErasureLora]
    ):
        self.context, self.settings, self.shape, self.loras = context, settings, shape, loras
        self.sigmas = schedule(context, settings.steps)
        self._values: dict[tuple[int, str, str, int], list[float]] = {}

    def take(self, conditioning: Conditioning, groups: dict[int, str]) -> None:
        """Denoises a prompt, and takes the values of the erasure LoRAs that ask for it."""
        one = torch.zeros(1, *self.shape, device=self.context.device)
        entries = self.context.retargeted(self.context.prompt[0], conditioning, one, self.settings.seed)
        repeats = self.settings.own_repeats if OWN in groups.values() else self.settings.repeats
        for place, look in enumerate(self._looks(entries, repeats)):
            self._take_at(look, entries[0], groups, place)

    def _looks(self, entries: Sequence[Entry], repeats: int) -> Iterator[Look]:
        start, seed = 0, self.settings.seed
        latent = noise_at(self.context, float(self.sigmas[0]), (repeats, *self.shape), seed)
        for step in self.settings.looks:
            latent = trajectory(self.context, latent, self.sigmas[start : step + 1], entries, seed)
            start = step
            yield Look(self.context, latent, float(self.sigmas[step]))

    def _take_at(self, look: Look, entry: Entry, groups: dict[int, str], place: int) -> None:
        subject, wanted = look.prompt(entry), []
        for index in groups:
            wanted += [*self._aligned(look, entry, index), (subject, None), (subject, index)]
        look.fetch(wanted)
        for index, group in groups.items():
            lora = self.loras[index]
            assert lora.neutral is not None
            found = {
                "influence": look.influence(subject, index),
                "patch": look.map(subject, index).flatten(1).amax(dim=1),
                "alignment": look.alignment(entry, lora, lora.neutral),
            }
            for name, values in found.items():
                self._values.setdefault((index, group, name, place), []).extend(values.tolist())

    def _aligned(self, look: Look, entry: Entry, index: int) -> list[Wanted]:
        lora = self.loras[index]
        assert lora.neutral is not None
        return look.wanted_for_alignment(entry, lora, lora.neutral)

    def levels(self, index: int) -> dict[str, tuple[Level, ...]]:
        """Every statistic of an erasure LoRA at every noise level."""
        return {
            name: tuple(self._level(index, name, place) for place in range(len(self.settings.looks)))
            for name in STATISTICS
        }

    def _level(self, index: int, name: str, place: int) -> Level:
        own, concept, others = (self._values.get((index, g, name, place), []) for g in (OWN, CONCEPT, OTHERS))
        try:
            return Level.of(name, float(self.sigmas[self.settings.looks[place]]), own, concept, others)
        except ValueError as error:
            raise ValueError(f"erasure LoRA {self.loras[index].name!r}: {error}") from error
