"""The prompts that an erasure adapter is trained on: what is erased, what takes its place, what is kept.

Texts only; does not know text encoders and does not import torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass


def entries(text: str) -> tuple[str, ...]:
    """Return the entries of a text without blanks; full-width commas (U+FF0C, U+3001) separate too."""
    return tuple(entry.strip() for entry in re.split("[,\uff0c\u3001]", text) if entry.strip())


def listed(text: str) -> tuple[str, ...]:
    """Return the entries of a text as `entries`, without repetitions."""
    return tuple(dict.fromkeys(entries(text)))


def lines(text: str) -> tuple[str, ...]:
    """Return the lines of a text, each a prompt; an empty line is the empty prompt."""
    return tuple(line.strip() for line in text.splitlines())


PREFIX = "a photo of the"

_SUBJECT = re.compile(r"(?:(?:an?|the) )?(?:photo|picture|image|painting) of (.+?)\.?", re.IGNORECASE)
_ARTICLE = re.compile(r"(?:an?|the) ", re.IGNORECASE)

SCENES = listed("forest, street, sea, beach, desert, snow, field, sky")
"""Scenes in which a concept is erased too, with the scene itself in its place."""

_KEPT = listed(
    "forest, street, sea, sky, field, desert, beach, snow, dog, cat, bird, horse, deer, frog, car, truck, airplane, "
    "ship, person, house"
)
KEPT = (
    *("", PREFIX, "", *(f"{PREFIX} {word}" for word in _KEPT)),
    *listed("a dog in the forest, a cat in the forest, a bird in the sky, a horse in the field, a ship on the sea"),
    *listed("a car on the street, a person on the beach"),
)
"""Default prompts to keep. The empty one counts twice because it is half of every guided prediction."""

OTHER_PROMPTS = (
    "",
    *listed("a photo, a photo of a person, a portrait of an old man, a group of people at a table, a photo of a dog"),
    *listed("a photo of a bird in a tree, a horse on a meadow, a red car on a street, a city at night"),
    *listed("a house with a garden, a kitchen with a window, a bowl of fruit, a cup of coffee on a desk"),
    *listed("a bouquet of flowers, a forest in the morning, mountains and a lake, a beach with palm trees"),
    *listed("snow on a field, a ship on the sea, an airplane in the sky, an oil painting of a village"),
    *listed("a drawing of a castle, an abstract pattern"),
)
"""Default prompts without the concept for a calibration; they are not trained on."""

CALIBRATED_OWN, CALIBRATED_OTHERS = 14, 28
"""The most prompts with and without the concept in the calibration after a training, one noise seed each."""


@dataclass(frozen=True)
class Pair:
    """A prompt to erase, and the reference prompt whose prediction takes its place."""

    target: str
    reference: str


@dataclass(frozen=True)
class TrainingPrompts:
    """The prompts of a training, by names that the predictor knows.

    Args:
        erased: prompts to erase; the first is the concept's own, the only one that the official loop trains.
        kept: prompts to hold to the base model, in the selective loop.
        neutral: the empty prompt, for guidance.
    Raises: ValueError if there is nothing to erase, a prompt is its own reference, or is both erased and kept.
    """

    erased: tuple[Pair, ...]
    kept: tuple[str, ...] = ()
    neutral: str = ""

    def __post_init__(self) -> None:
        if not self.erased:
            raise ValueError("there is no prompt to erase; give the concept's own prompt and a reference")
        for pair in self.erased:
            if pair.target.casefold().split() == pair.reference.casefold().split():
                raise ValueError(
                    f"the prompt to erase and its reference are both {pair.target!r}, so there is nothing to learn; "
                    "use as reference what to generate instead of the concept"
                )
        both = sorted({pair.target for pair in self.erased} & set(self.kept))
        if both:
            raise ValueError(f"{both[0]!r} is among the prompts to erase and to keep; remove it from one of them")

    @property
    def names(self) -> tuple[str, ...]:
        """All prompts, each once."""
        pairs = (name for pair in self.erased for name in (pair.target, pair.reference))
        return tuple(dict.fromkeys((*pairs, *self.kept, self.neutral)))


def names_a_word(prompt: str, words: Sequence[str]) -> bool:
    """Return whether a prompt contains one of the words, as a whole word or with a plural s."""
    return any(re.search(rf"\b{re.escape(word)}s?\b", prompt, re.IGNORECASE) for word in words)


def subject_of(prompt: str) -> str:
    """Return what a prompt is a photo of, such as "cat"; a prompt of another form is its own subject."""
    found = _SUBJECT.fullmatch(prompt.strip())
    return _without_article(found.group(1)) if found else prompt.strip()


def word_of(prompt: str) -> str:
    """Return the word of a concept's own prompt: "cat" for "a photo of the cat" and for "a cat"."""
    return _without_article(subject_of(prompt))


def _without_article(text: str) -> str:
    found = _ARTICLE.match(text)
    return text[found.end() :] if found else text


def prompts_for(
    concept: str,
    reference: str,
    synonyms: Sequence[str] = (),
    *,
    prefix: str = PREFIX,
    scenes: Sequence[str] = SCENES,
    kept: Sequence[str] = KEPT,
) -> TrainingPrompts:
    """Return the prompts to train for a concept: its words, alone and in scenes.

    Args:
        concept: a word or two, "cat".
        reference: what takes its place, "forest".
        synonyms: other words for it, erased as well.
        prefix: of every prompt, "a photo of the".
        scenes: "forest" maps "a cat in the forest" to "a photo of the forest".
        kept: full prompts to keep; those that name the concept or a synonym are left out.
    Raises: ValueError if concept or reference is missing, or both are the same.
    """
    if not concept.strip():
        raise ValueError("no concept is named; give a word or two for what to erase, such as 'cat'")
    if not reference.strip():
        raise ValueError(f"there is no reference for {concept!r}; give what to generate instead, such as 'forest'")

    def photo(word: str) -> str:
        return f"{prefix.strip()} {word.strip()}".strip()

    words = tuple(dict.fromkeys((concept.strip(), *synonyms)))
    alone = [Pair(photo(word), photo(reference)) for word in words]
    inside = [Pair(f"{with_article(word)} in the {scene}", photo(scene)) for word in words for scene in scenes]
    return TrainingPrompts((*alone, *inside), tuple(prompt for prompt in kept if not names_a_word(prompt, words)))


def calibration_prompts(prompts: TrainingPrompts | None, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return prompts to calibrate a trained adapter with: with its concept (besides its own prompt), and without.

    Of those without it, half were kept in training and half were not used there.

    Args:
        prompts: all that can be erased and kept for the words; None if encoded prompts were given instead of texts.
        words: for the concept. Without any, no prompt is known to be without the concept.
    """
    own, kept, unseen = _calibrating(prompts, words)
    half = CALIBRATED_OTHERS // 2
    return _evenly(own, CALIBRATED_OWN), [*_evenly(kept, half), *_evenly(unseen, half)]


def text_calibration_prompts(prompts: TrainingPrompts | None, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the same without a limit, for the text stage: it needs no model, so every prompt counts.

    Args and returns as `calibration_prompts`.
    """
    own, kept, unseen = _calibrating(prompts, words)
    return own, [*kept, *unseen]


def _calibrating(prompts: TrainingPrompts | None, words: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """All prompts with the concept but its own, all that were kept, and others that were not used in training."""
    own = [pair.target for pair in prompts.erased[1:]] if prompts else []
    kept = list(dict.fromkeys(prompts.kept)) if prompts else []
    return own, kept, [p for p in OTHER_PROMPTS if words and not names_a_word(p, words) and p not in kept]


def _evenly(prompts: Sequence[str], most: int) -> list[str]:
    """At most `most` of the prompts, evenly spaced."""
    return list(prompts[:: max(1, -(-len(prompts) // most))])


def with_article(word: str) -> str:
    """Return a word behind "a", or "an" before a vowel."""
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"
