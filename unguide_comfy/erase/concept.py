"""From a person's words to erasure LoRAs on a wire, without training: encode, solve, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from ...unguide_core.adapter import Adapter, Card
from ...unguide_core.closed_form import ClosedForm, most_different
from ...unguide_core.probe.calibration import Calibration, CalibrationPrompts
from ...unguide_core.probe.spread import TAIL_RATES
from ...unguide_core.text_edit import Edited, Kept, edit_text
from ...unguide_core.training.prompts import PREFIX, SCENES, Pair, names_a_word
from ...unguide_core.vocabulary import FEW_KEPT, KEPT_PROMPTS, KINDS, Edit, kept_prompts, unseen_prompts
from ..lora.load import Conditioning, ErasureLora
from ..probe.calibrate import with_text_calibration
from ..probe.settings import Settings
from ..report.progress import say
from .layers import text_layers
from .states import Known, States, known_states, states_of

log = logging.getLogger(__name__)

OBJECTIVE = "closed form"

LIMITS = (
    "It works on the prompt: it cannot see what a start image shows or what no prompt names. Misspellings, other "
    "languages and text that was optimised against it may pass; add words that you know of as synonyms."
)


@dataclass(frozen=True)
class Words:
    """What to erase, in a person's words.

    Args:
        concepts: each becomes an erasure LoRA of its own.
        references: what to generate instead: one for all concepts, one for each, or none.
        synonyms: other words, for each concept in turn; fewer lists than concepts leave the rest without.
        kind, scenes: as for `Edit`.
        more: further pairs of prompts, erased with the first concept.
        kept: prompts to keep besides the shipped ones.
        shipped: so many of the shipped ones.
    Raises: ValueError if the numbers do not fit.
    """

    concepts: tuple[str, ...]
    references: tuple[str, ...] = ()
    synonyms: tuple[tuple[str, ...], ...] = ()
    kind: str = "object"
    scenes: tuple[str, ...] = SCENES
    more: tuple[Pair, ...] = ()
    kept: tuple[str, ...] = ()
    shipped: int = KEPT_PROMPTS

    def __post_init__(self) -> None:
        count = len(self.concepts)
        if not count:
            raise ValueError("no concept is named; give a word or two for what to erase, such as 'cat'")
        if len(self.references) not in (0, 1, count):
            raise ValueError(
                f"there are {count} concepts and {len(self.references)} references; give one for all concepts, one for "
                "each in the same order, or none"
            )
        if len(self.synonyms) > count:
            raise ValueError(
                f"there are {count} concepts and {len(self.synonyms)} lines of synonyms; expected a line for each "
                "concept, in the same order"
            )

    def edits(self, states: States) -> Iterator[Edit]:
        """Yield each concept's edit, a reference chosen where none is named."""
        for i, concept in enumerate(self.concepts):
            synonyms = self.synonyms[i] if i < len(self.synonyms) else ()
            reference = self.references[min(i, len(self.references) - 1)] if self.references else ""
            if not reference and KINDS[self.kind].reference is not None:
                reference = KINDS[self.kind].reference or ""
            elif not reference:
                reference = neutral_reference(states, concept, synonyms)
            yield Edit(concept, reference, synonyms, self.kind, self.scenes, self.more if i == 0 else ())


def erase_concepts(
    model: Any, clip: Any, words: Words, settings: ClosedForm, strength: float = 1.0
) -> tuple[tuple[ErasureLora, ...], str]:
    """Return an erasure LoRA for each concept, its gate calibrated for the prompt's text, and a report in sentences.

    Args:
        model: a `ModelPatcher`; whatever patches are on it count as the base.
        clip: the same checkpoint's CLIP.
        strength: of the erasure LoRAs, as in the loader.
    Raises: ValueError for words that mean nothing, or a model whose text layers cannot be edited.
    """
    states, began = States(clip), time.perf_counter()
    layers = text_layers(model, states("")[0].shape[-1])
    edits = list(words.edits(states))
    known = known_states(states, kept_prompts((), words.kept, words.shipped), unseen_prompts(words.shipped))
    loras: list[ErasureLora] = []
    lines: list[str] = []
    for number, edit in enumerate(edits, start=1):
        say(f"Erasing {edit.concept!r}, {number} of {len(edits)}")
        own, encode = known.kept.without(edit.words, states), cache(states.conditioning)
        edited = edit_text([edit], own, layers, partial(_states_by, encode), settings)
        card = card_of(edit, settings, edited, type(model.model.model_config).__name__)
        neutral, concept = states.conditioning(""), encode(card.target)
        lora = ErasureLora(edit.concept, Adapter(edited.layers, card), strength, card.concept_prompt, concept, neutral)
        loras.append(with_text_calibration(model, lora, prompts_of(edit, concept, encode, known)))
        lines += [*described(edit, edited, own), separation(loras[-1])]
    seconds = time.perf_counter() - began
    lines.append(f"{states.count} prompts encoded, {seconds:.1f} s in all, no model evaluation.")
    return tuple(loras), "\n".join([*lines, LIMITS])


def _states_by(encode: Callable[[str], Conditioning], prompt: str) -> tuple[Any, Any]:
    return states_of(encode(prompt))


def prompts_of(
    edit: Edit, own: Conditioning, encode: Callable[[str], Conditioning], known: Known
) -> CalibrationPrompts[Conditioning]:
    """Return the prompts that an edit's gate is calibrated with: all that it erases, and unseen ones without it."""
    others = [prompt for text, prompt in known.others.items() if not names_a_word(text, edit.words)]
    concept = [encode(pair.target) for pair in edit.pairs[1:]]
    return CalibrationPrompts(own, concept, others, edit.concept)


def separation(lora: ErasureLora) -> str:
    """Return a sentence on how well the gate tells the concept's prompts from others by their text."""
    calibration = Calibration.from_card(lora.adapter.card.calibration)
    text = None if calibration is None else calibration.text
    thresholds = None if text is None else text.text.thresholds(Settings.false_positive_rate)
    if text is None or thresholds is None:
        return (
            f"WARNING: by their text the gate cannot tell prompts with {lora.name!r} from others; it decides at an "
            "early step of the image, less surely. Keep more prompts that resemble it, or use Calibrate Erasure LoRA."
        )
    weakest, strongest = text.text.concept.beyond(TAIL_RATES[0]), text.text.others.beyond(TAIL_RATES[0])
    return (
        f"The gate decides by the prompt's text: {text.text.concept.count} prompts with {lora.name!r} score "
        f"{weakest:.2f} or more, {text.text.others.count} others {strongest:.2f} or less, and it is detected from "
        f"{thresholds[1]:.2f} on."
    )


def neutral_reference(states: States, concept: str, synonyms: Sequence[str]) -> str:
    """Return the scene whose text states are least similar to the concept's."""
    others = [scene for scene in SCENES if not names_a_word(scene, (concept, *synonyms))]
    own, _ = states(f"{PREFIX} {concept}")
    return most_different(own, {scene: states(f"{PREFIX} {scene}")[0] for scene in others})


def card_of(edit: Edit, settings: ClosedForm, edited: Edited, base_model: str) -> Card:
    """Return the metadata of an edit's adapter."""
    first = edit.pairs[0]
    return Card(
        concept=edit.concept,
        synonyms=edit.synonyms,
        target=first.target,
        reference=first.reference,
        objective=OBJECTIVE,
        base_model=base_model,
        source_format="generic",
        rank=edited.tokens.rank if edited.pooled is None or edited.pooled.rank == edited.tokens.rank else None,
        settings={**vars(settings), "kind": edit.kind, "pairs": len(edit.pairs), "evaluations": 0},
    )


def described(edit: Edit, edited: Edited, kept: Kept) -> Iterator[str]:
    """Yield sentences on what an edit erases, and warnings."""
    instead = f"{edit.reference!r} in its place" if edit.reference else "the same without it in its place"
    yield (
        f"{edit.concept!r}: {instead}; {len(edit.pairs)} pairs of prompts, {len(kept.prompts)} kept; rank "
        f"{edited.tokens.rank}, which explains {100 * edited.tokens.explained:.1f} % of the change."
    )
    if len(kept.prompts) < FEW_KEPT:
        yield f"WARNING: only {len(kept.prompts)} prompts are kept, so other words change; keep {FEW_KEPT} or more."
    if not edit.scenes and edit.kind == "object":
        yield "WARNING: no scenes are named, so the concept may survive in scenes, or the rest of the image may change."
