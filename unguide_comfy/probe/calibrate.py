"""Calibrates an erasure LoRA for a model: how its scores spread over prompts with its concept and over others.

The base model denoises every prompt from several noises and is probed on the way, at the noise levels at which a gate
may probe. What follows from the scores is in `unguide_core.probe.calibration`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch

from ...unguide_core.probe.calibration import (
    PROBED_STEPS,
    STEPS,
    Asked,
    Calibration,
    CalibrationPrompts,
    Probed,
    calibrated_levels,
)
from ...unguide_core.probe.image import ImageProbe
from ...unguide_core.training.prompts import OTHER_PROMPTS, names_a_word
from ..blend.state import RUN, Run
from ..blend.wrapper import bare, blending, carrying
from ..lora.load import Conditioning, ErasureLora, encoder
from ..lora.match import Matcher, match
from ..model.key import matches_model, model_key
from ..model.task import run_on_model
from .batch import alike, batches, joined
from .conds import Context
from .image import fitted_probes
from .predictions import Predictions
from .rollout import noise_at, rollout, schedule
from .text import reads_text_alone, text_calibration

Result = TypeVar("Result")

Statistics = dict[int, dict[str, torch.Tensor]]
"""Values of the statistics, [B], by name, by adapter (an index)."""

Shown = Callable[[int, int], None]
"""Called with the number of things done and their total; raises where the user stops it."""

Watch = Callable[[str], Shown]
"""Given the name of what is counted, returns what counts it."""

IMAGED = "prompts for images"
"""What is counted while the base model generates the images of the image stage; before that, it is "prompts"."""

IN_SCENES = ("{} in a forest", "{} on a street", "{} on a table")
"""Scenes in which the concept has to be detected as well."""


def _unwatched(things: str) -> Shown:
    return lambda done, total: None


def concept_prompts(concept: str, own_prompt: str, synonyms: Sequence[str]) -> list[str]:
    """Return the concept's own prompt with each of its synonyms, and in scenes."""
    words = [own_prompt.replace(concept, word) if concept in own_prompt else word for word in synonyms]
    return [*words, *(scene.format(own_prompt) for scene in IN_SCENES)]


@dataclass(frozen=True)
class CalibrationSettings:
    """How a calibration is measured.

    Args:
        cfg: guidance scale of the rollouts.
        repeats: noise seeds for each prompt.
        own_repeats: noise seeds for the concept's own prompt, whose mean is the baseline.
        seed: of the first noise.
    """

    cfg: float
    repeats: int = 4
    own_repeats: int = 16
    seed: int = 0


def calibrate(
    model: Any,
    loras: Sequence[ErasureLora],
    prompts: Sequence[CalibrationPrompts[Conditioning]],
    negative: Conditioning,
    latent: torch.Tensor,
    settings: CalibrationSettings,
    watch: Watch = _unwatched,
    text_prompts: Sequence[CalibrationPrompts[Conditioning]] = (),
) -> list[Calibration]:
    """Return each erasure LoRA's calibration for this model.

    Args:
        model: a `ModelPatcher`, with the patches that it will be sampled with.
        prompts: one set per erasure LoRA.
        negative: the negative prompt of the rollouts.
        latent: whose shape is used, [B, C, ...].
        watch: counts the prompts, and then those that images are generated for.
        text_prompts: for the text stage, which needs no evaluations, likewise; none for the same prompts.
    Raises: ValueError if an erasure LoRA has no concept's or neutral prompt encoded, or there are no other prompts.
    """

    def measured(context: Context, shape: tuple[int, ...], counted: Watch) -> list[Calibration]:
        levels = calibrated_levels(
            prompts,
            _Prober(context, shape, settings.seed),
            repeats=settings.repeats,
            own_repeats=settings.own_repeats,
            on_prompt=counted("prompts"),
        )
        model, layers = context.guider.model_patcher, context.run.layers
        asked = zip(layers, text_prompts or prompts, strict=True)
        texts = [text_calibration(model, of_adapter, texts) for of_adapter, texts in asked]
        images = fitted_probes(context, prompts, negative, shape, settings.seed, counted(IMAGED))
        return [
            Calibration(context.model_key, lora.adapter.signature, shape, settings.cfg, settings.own_repeats, *found)
            for lora, *found in zip(loras, levels, texts, images, strict=True)
        ]

    return _on_model(model, loras, negative, latent, settings, measured, watch)


def image_probes(
    model: Any,
    loras: Sequence[ErasureLora],
    prompts: Sequence[CalibrationPrompts[Conditioning]],
    negative: Conditioning,
    latent: torch.Tensor,
    settings: CalibrationSettings,
) -> list[ImageProbe | None]:
    """Return each erasure LoRA's image probe alone; None where images do not tell its concept from other things.

    Args and Raises: as `calibrate`.
    """
    return _on_model(
        model,
        loras,
        negative,
        latent,
        settings,
        lambda context, shape, counted: fitted_probes(
            context, prompts, negative, shape, settings.seed, counted(IMAGED)
        ),
    )


def _on_model(
    model: Any,
    loras: Sequence[ErasureLora],
    negative: Conditioning,
    latent: torch.Tensor,
    settings: CalibrationSettings,
    measure: Callable[[Context, tuple[int, ...], Watch], list[Result]],
    watch: Watch = _unwatched,
) -> list[Result]:
    """What `measure` returns in a run of the host, for the shape of one latent."""
    for lora in loras:
        if lora.concept is None or lora.neutral is None:
            raise ValueError(
                f"erasure LoRA {lora.name!r} has no encoded concept to calibrate with; connect a CLIP to Load Erasure "
                "LoRA and name the concept there"
            )
    base = blending(model)
    key = model_key(base)
    matcher = Matcher(base.model)
    run = Run(tuple(loras), tuple(matcher.match(lora.adapter, lora.name).layers for lora in loras))
    guider = comfy.samplers.CFGGuider(base)
    guider.set_conds(loras[0].neutral, negative)
    guider.set_cfg(settings.cfg)

    def counted(things: str) -> Shown:
        count = watch(things)

        def shown(done: int, total: int) -> None:
            count(done, total)
            comfy.model_management.throw_exception_if_processing_interrupted()

        return shown

    def measured(guider: Any, extra_args: dict[str, Any], shape: torch.Size) -> list[Result]:
        context = Context(guider, run, carrying(extra_args, **{RUN: run})["model_options"], key)
        return measure(context, tuple(shape), counted)

    return run_on_model(guider, latent, settings.seed, measured)


def calibrate_from_texts(
    model: Any,
    clip: Any,
    loras: Sequence[ErasureLora],
    concept_texts: Sequence[str],
    other_texts: Sequence[str],
    latent: torch.Tensor,
    settings: CalibrationSettings,
    watch: Watch = _unwatched,
) -> list[ErasureLora]:
    """Return the erasure LoRAs calibrated for this model, with prompts as text.

    Args:
        concept_texts: prompts with the concept; none for those that follow from each adapter's metadata.
        other_texts: prompts without it, besides the empty one. Those that name an adapter's concept or a synonym
            are left out.
        watch: as in `calibrate`.
    Raises: as `calibrate`.
    """
    encode = cache(encoder(clip))
    prompts = [_encoded_prompts(encode, lora, concept_texts, other_texts) for lora in loras]
    found = calibrate(model, loras, prompts, encode(""), latent, settings, watch)
    return [with_calibration(lora, calibration) for lora, calibration in zip(loras, found, strict=True)]


def calibrate_text(
    model: Any,
    clip: Any,
    lora: ErasureLora,
    concept_texts: Sequence[str] = (),
    other_texts: Sequence[str] = OTHER_PROMPTS,
) -> ErasureLora:
    """Return an erasure LoRA with its text stage calibrated for this model, without a model evaluation.

    What its calibration says of noise levels is kept if it is for this model and adapter. Where a layer reads more than
    text there is no text stage, and the erasure LoRA is returned as it is.

    Args:
        model: a `ModelPatcher`, with the patches that it will be sampled with.
        clip: the checkpoint's text encoder.
        concept_texts, other_texts: as of `calibrate_from_texts`.
    Raises: ValueError for fewer than two prompts without the concept, or an adapter that does not change its concept's.
    """
    if not reads_text_alone(match(lora.adapter, model.model, lora.name).layers):
        return lora
    prompts = _encoded_prompts(encoder(clip), lora, concept_texts, other_texts)
    return with_text_calibration(model, lora, prompts)


def with_text_calibration(model: Any, lora: ErasureLora, prompts: CalibrationPrompts[Conditioning]) -> ErasureLora:
    """As `calibrate_text`, with encoded prompts."""
    key, signature = model_key(bare(model)), lora.adapter.signature
    text = text_calibration(model, match(lora.adapter, model.model, lora.name).layers, prompts)
    if text is None:
        return lora
    known = Calibration.from_card(lora.adapter.card.calibration)
    if known is None or known.adapter != signature or not matches_model(known.model, bare(model), key):
        known = Calibration(key, signature)
    return with_calibration(lora, replace(known, text=text))


def _encoded_prompts(
    encode: Callable[[str], Conditioning], lora: ErasureLora, concept_texts: Sequence[str], other_texts: Sequence[str]
) -> CalibrationPrompts[Conditioning]:
    """The prompts of one erasure LoRA's calibration."""
    card = lora.adapter.card
    words = [word for word in (card.concept, lora.word, *card.synonyms) if word]
    own = concept_texts or concept_prompts(card.concept or lora.word, lora.concept_prompt, card.synonyms)
    unrelated = [text for text in dict.fromkeys(("", *other_texts)) if not names_a_word(text, words)]
    if len(unrelated) < 2:
        raise ValueError(
            f"erasure LoRA {lora.name!r}: other_prompts has no prompt without the concept "
            f"{lora.concept_prompt or lora.name!r}; add some, such as 'a photo of a house'"
        )
    concept = encode(lora.concept_prompt) if lora.concept is None else lora.concept
    return CalibrationPrompts(concept, list(map(encode, own)), list(map(encode, unrelated)), lora.name)


def with_calibration(lora: ErasureLora, calibration: Calibration) -> ErasureLora:
    """Return the erasure LoRA with a calibration in its metadata; nothing else changes."""
    card = replace(lora.adapter.card, calibration=calibration.to_card())
    return replace(lora, adapter=replace(lora.adapter, card=card))


@dataclass(frozen=True)
class _Prober:
    """Denoises a prompt and takes the statistics of some erasure LoRAs on the way."""

    context: Context
    shape: tuple[int, ...]
    seed: int

    def __call__(self, asked: Sequence[Asked[Conditioning]]) -> Iterator[Probed]:
        for batch in batches(asked, lambda one: one.repeats, _together):
            counts, found = [one.repeats for one in batch], list(self._probed(batch))
            for place in range(len(batch)):
                yield [(sigma, _rows(values, counts, place)) for sigma, values in found]

    def _probed(self, batch: Sequence[Asked[Conditioning]]) -> Iterator[tuple[float, Statistics]]:
        """All rows of a batch, before each of `PROBED_STEPS`. Every prompt starts from the same noise."""
        context, sigmas, start = self.context, schedule(self.context, STEPS), 0
        starts = [noise_at(context, float(sigmas[0]), (one.repeats, *self.shape), self.seed) for one in batch]
        latent, text = torch.cat(starts), joined([(one.prompt, one.repeats) for one in batch])
        entries = context.retargeted(context.prompt[0], text, latent, self.seed)
        for step in PROBED_STEPS:
            latent = rollout(context, latent, sigmas[start : step + 1], entries, self.seed)
            start, sigma = step, float(sigmas[step])
            yield sigma, self._statistics(Predictions(context, latent, sigma), entries[0], batch[0].adapters)

    def _statistics(self, predictions: Predictions, entry: dict[str, Any], adapters: Sequence[int]) -> Statistics:
        subject, wanted, references = predictions.prompt(entry), [], {}
        for index in adapters:
            lora = self.context.run.loras[index]
            assert lora.concept is not None
            assert lora.neutral is not None
            references[index] = lora.concept, lora.neutral
            wanted += [*predictions.aligned(entry, *references[index]), (subject, None), (subject, index)]
        predictions.fetch(wanted)
        return {
            index: {
                "influence": predictions.influence(subject, index),
                "alignment": predictions.alignment(entry, *references[index]),
            }
            for index in adapters
        }


def _together(one: Asked[Conditioning], other: Asked[Conditioning]) -> bool:
    """Whether two prompts can be probed in one batch."""
    return one.adapters == other.adapters and alike(one.prompt, other.prompt)


def _rows(values: Statistics, counts: Sequence[int], place: int) -> Statistics:
    """The values of one prompt of a batch, of which each prompt has so many rows."""
    return {
        index: {statistic: value.split(counts)[place] for statistic, value in of_adapter.items()}
        for index, of_adapter in values.items()
    }
