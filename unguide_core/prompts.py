"""The prompts that an erasure adapter is trained on: what is erased, what takes its place, what is kept.

Texts only; knows no text encoder.
"""

import re
from collections.abc import Sequence

from .training import Pair, Prompts

PREFIX = "a photo of the"

SCENES = ("forest", "street", "sea", "beach", "desert", "snow", "field", "sky")
"""Scenes in which a concept is erased as well, each with the scene itself in its place."""

KEPT = (
    *("", PREFIX, "", "a photo of the forest", "a photo of the street", "a photo of the sea", "a photo of the sky"),
    *("a photo of the field", "a photo of the desert", "a photo of the beach", "a photo of the snow"),
    *("a photo of the dog", "a photo of the cat", "a photo of the bird", "a photo of the horse"),
    *("a photo of the deer", "a photo of the frog", "a photo of the car", "a photo of the truck"),
    *("a photo of the airplane", "a photo of the ship", "a photo of the person", "a photo of the house"),
    *("a dog in the forest", "a cat in the forest", "a bird in the sky", "a horse in the field"),
    *("a ship on the sea", "a car on the street", "a person on the beach"),
)
"""Prompts to keep where none are given; the empty one counts twice, for it is half of every guided prediction."""

OTHER_PROMPTS = (
    "",
    "a photo",
    "a photo of a person",
    "a portrait of an old man",
    "a group of people at a table",
    "a photo of a dog",
    "a photo of a bird in a tree",
    "a horse on a meadow",
    "a red car on a street",
    "a city at night",
    "a house with a garden",
    "a kitchen with a window",
    "a bowl of fruit",
    "a cup of coffee on a desk",
    "a bouquet of flowers",
    "a forest in the morning",
    "mountains and a lake",
    "a beach with palm trees",
    "snow on a field",
    "a ship on the sea",
    "an airplane in the sky",
    "an oil painting of a village",
    "a drawing of a castle",
    "an abstract pattern",
)
"""What stands for "any other prompt" in a calibration where the user names none; training does not see them."""

CALIBRATED_OWN, CALIBRATED_OTHERS = 14, 28
"""Prompts of the calibration that ends a training, at most; a noise seed each."""


def listed(text: str) -> tuple[str, ...]:
    """Return the entries of a text that lists them with commas, without blanks and repetitions."""
    return tuple(dict.fromkeys(entry.strip() for entry in text.split(",") if entry.strip()))


def lines(text: str) -> tuple[str, ...]:
    """Return the lines of a text, each a prompt; an empty line is the empty prompt."""
    return tuple(line.strip() for line in text.splitlines())


def names_a_word(prompt: str, words: Sequence[str]) -> bool:
    """Whether a prompt has one of the words in it, as a word by itself, or in the plural with s."""
    return any(re.search(rf"\b{re.escape(word)}s?\b", prompt, re.IGNORECASE) for word in words)


def prompts_for(
    concept: str,
    reference: str,
    synonyms: Sequence[str] = (),
    *,
    prefix: str = PREFIX,
    scenes: Sequence[str] = SCENES,
    kept: Sequence[str] = KEPT,
) -> Prompts:
    """Return what to train for a concept: its words, alone and in scenes.

    Args:
        concept: a word or two, "cat".
        reference: what takes its place, "forest".
        synonyms: other words for it, erased along with it.
        prefix: of every prompt, "a photo of the".
        scenes: "forest" erases "a cat in the forest", and leaves "a photo of the forest" in its place.
        kept: whole prompts to keep. Those that name the concept or a synonym are left out.
    Raises: ValueError if concept or reference is missing, or both are the same.
    """
    if not concept.strip():
        raise ValueError("no concept is named; give a word or two for what shall be erased, such as 'cat'")
    if not reference.strip():
        raise ValueError(
            f"there is no reference for {concept!r}; give what shall be drawn in its place, such as 'forest'"
        )

    def photo(word: str) -> str:
        return f"{prefix.strip()} {word.strip()}".strip()

    words = tuple(dict.fromkeys((concept.strip(), *synonyms)))
    alone = [Pair(photo(word), photo(reference)) for word in words]
    inside = [Pair(f"{_article(word)} {word} in the {scene}", photo(scene)) for word in words for scene in scenes]
    return Prompts((*alone, *inside), tuple(prompt for prompt in kept if not names_a_word(prompt, words)))


def calibration_prompts(prompts: Prompts | None, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return texts to calibrate a trained adapter with: with its concept, besides its own prompt, and without.

    Half of those without are what training held to the base model, half are prompts that it never saw.

    Args:
        prompts: made of the words, with all that can be erased and kept; None where prompts were connected.
        words: for the concept; without any, no other prompt can be known to be another.
    """
    own = [pair.target for pair in prompts.erased[1:]] if prompts else []
    kept = list(dict.fromkeys(prompts.kept)) if prompts else []
    unseen = [prompt for prompt in OTHER_PROMPTS if words and not names_a_word(prompt, words) and prompt not in kept]
    half = CALIBRATED_OTHERS // 2
    return _evenly(own, CALIBRATED_OWN), [*_evenly(kept, half), *_evenly(unseen, half)]


def _evenly(prompts: Sequence[str], most: int) -> list[str]:
    """At most so many of the prompts, from all over the list."""
    return list(prompts[:: max(1, -(-len(prompts) // most))])


def _article(word: str) -> str:
    return "an" if word[:1].lower() in "aeiou" else "a"
