"""From a person's words to an erasure LoRA on a wire: encode the prompts, train, calibrate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.model_management
import torch

from ...unguide_core.adapter import Adapter, Card
from ...unguide_core.probe.calibration import MINIMUM_OTHERS, Calibration, CalibrationPrompts
from ...unguide_core.training.finish import finish
from ...unguide_core.training.layers import layer_expression
from ...unguide_core.training.prompts import (
    KEPT,
    PREFIX,
    SCENES,
    Pair,
    TrainingPrompts,
    calibration_prompts,
    prompts_for,
    text_calibration_prompts,
)
from ...unguide_core.training.recipe import Recipe
from ..lora.load import Conditioning, ErasureLora, encode_prompts
from ..probe.calibrate import CalibrationSettings, calibrate
from ..report.progress import Counter, say
from .job import DISCARD, PREVIEW_CFG, Job, train
from .show import TrainingDisplay

log = logging.getLogger(__name__)

TARGET, REFERENCE, NEUTRAL = "target", "reference_prompt", "neutral"


@dataclass(frozen=True)
class Concept:
    """What to erase, in words.

    Args:
        concept: a word or two.
        reference: what is generated in its place.
        synonyms: other words for the concept.
        prefix: makes a prompt of a word.
        scenes: in which the concept is erased as well.
        kept: prompts that are held to the base model.
    """

    concept: str
    reference: str
    synonyms: tuple[str, ...] = ()
    prefix: str = PREFIX
    scenes: tuple[str, ...] = SCENES
    kept: tuple[str, ...] = KEPT

    @property
    def words(self) -> tuple[str, ...]:
        """The words for the concept."""
        return tuple(word for word in (self.concept.strip(), *self.synonyms) if word)

    def prompts(self) -> TrainingPrompts:
        """Return all prompts that the words make. Raises: ValueError if concept or reference is missing."""
        return prompts_for(
            self.concept, self.reference, self.synonyms, prefix=self.prefix, scenes=self.scenes, kept=self.kept
        )

    def prompt(self, word: str) -> str:
        """Return the prompt of a word; "" for none."""
        return f"{self.prefix} {word}".strip() if word.strip() else ""


@dataclass(frozen=True)
class Encoded:
    """Prompts that were connected in place of words: the concept's, what is generated instead, the empty one."""

    target: Conditioning | None = None
    reference: Conditioning | None = None
    neutral: Conditioning | None = None

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return any(part is not None for part in (self.target, self.reference, self.neutral))

    def by_name(self) -> dict[str, Conditioning]:
        """Return the three prompts by name. Raises: ValueError if one is missing or two are equal."""
        parts = {TARGET: self.target, REFERENCE: self.reference, NEUTRAL: self.neutral}
        missing = [name for name, part in parts.items() if part is None]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} of {', '.join(parts)} {'is' if len(missing) == 1 else 'are'} not connected; "
                "connect all three, or none and a CLIP"
            )
        assert self.target is not None
        assert self.reference is not None
        if torch.equal(self.target[0][0], self.reference[0][0]):
            raise ValueError(
                "target and reference_prompt are the same prompt, so there is nothing to learn; use as "
                "reference_prompt what should be generated in place of the concept"
            )
        return {name: part for name, part in parts.items() if part is not None}


def train_concept(
    model: Any,
    clip: Any,
    latent: torch.Tensor,
    concept: Concept,
    recipe: Recipe,
    preset: str,
    encoded: Encoded,
    **options: Any,
) -> tuple[ErasureLora, tuple[float, ...]]:
    """Return a trained and calibrated erasure LoRA, and the loss of every iteration.

    Args:
        model: a `ModelPatcher`; whatever patches are on it count as the base.
        clip: encodes the prompts that the words make; None only where prompts are connected.
        latent: whose shape is trained at, [B, C, H, W].
        preset: the recipe's name, for the adapter's metadata.
        encoded: connected prompts, which take the place of the words'.
        options: of `Job`.
    Raises: ValueError for words or prompts that mean nothing, and as `job.train`.
    """
    layer_expression(options.get("layers", "object"), options.get("pattern", ""))  # refuse before anything is encoded
    texts = None if encoded.given else concept.prompts()
    if texts is None:
        prompts, conditionings = TrainingPrompts((Pair(TARGET, REFERENCE),), (NEUTRAL,), NEUTRAL), encoded.by_name()
        target, reference = concept.prompt(concept.concept), concept.prompt(concept.reference)
    else:
        prompts = recipe.trained_prompts(texts)
        conditionings = encode_prompts(clip, prompts.names, Counter("Encoding", "prompts"))
        target, reference = texts.erased[0].target, texts.erased[0].reference
    card = Card(
        concept=concept.concept.strip(),
        synonyms=concept.synonyms,
        target=target,
        reference=reference,
        objective=preset,
    )
    job = Job(recipe, prompts, conditionings, card, **options)
    say("Loading the model")
    trained = train(model, job, latent, TrainingDisplay(model), Counter("Generating", "latents to train at"))
    asked = [
        ([], []) if clip is None else of(texts, concept.words) for of in (calibration_prompts, text_calibration_prompts)
    ]
    lora = ErasureLora(
        name=card.concept or "trained here",
        adapter=Adapter(dict(trained.training.layers)),
        concept_prompt=trained.card.concept_prompt,
        concept=conditionings[prompts.erased[0].target],
        neutral=conditionings[prompts.neutral],
    )
    calibrated = partial(_calibrate, model, lora, clip, asked, latent)
    cancelled = comfy.model_management.InterruptProcessingException
    interrupted = () if job.on_cancel == DISCARD else (cancelled,)
    adapter = finish(trained.training, trained.card, calibrated, interrupted=interrupted, log=log.warning)
    done, losses = trained.training.iteration, trained.training.losses
    calibrated_or_not = "calibrated" if adapter.card.calibration else "not calibrated"
    say(f"Trained: {done} of {recipe.iterations} iterations, loss {losses[-1]:.4f}; {calibrated_or_not}")
    return replace(lora, adapter=adapter), tuple(losses)


def _calibrate(
    model: Any,
    lora: ErasureLora,
    clip: Any,
    asked: Sequence[tuple[Sequence[str], Sequence[str]]],
    latent: torch.Tensor,
    adapter: Adapter,
) -> Calibration:
    """The calibration of a trained adapter: on few prompts and noise seeds, and of its text stage on all prompts.

    Args:
        asked: prompts with the concept and without it, for evaluations and for the text stage.
    """
    (_, others), _ = asked
    if len(others) < MINIMUM_OTHERS:
        raise ValueError(f"there are {len(others)} prompts without the concept; expected at least {MINIMUM_OTHERS}")
    texts = (text for groups in asked for group in groups for text in group)
    encoded = encode_prompts(clip, tuple(dict.fromkeys(texts)))
    assert lora.concept is not None
    assert lora.neutral is not None
    prompts, text_prompts = (
        CalibrationPrompts(lora.concept, *([encoded[text] for text in group] for group in groups), lora.name)
        for groups in asked
    )
    settings = CalibrationSettings(PREVIEW_CFG, repeats=1, own_repeats=8)
    trained, counter = [replace(lora, adapter=adapter)], partial(Counter, "Calibrating the gate,")
    (found,) = calibrate(model, trained, [prompts], lora.neutral, latent, settings, counter, [text_prompts])
    return found
