"""The prompts of a closed-form edit: pairs that erase a concept's words, and a shipped list of prompts to keep.

Texts only; does not know text encoders and does not import torch.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .training.prompts import KEPT, OTHER_PROMPTS, SCENES, Pair, listed, names_a_word, with_article

KEPT_PROMPTS = 200
"""So many of the shipped prompts are kept by default: the commonest."""

FEW_KEPT = 20
"""With fewer prompts to keep than this, unrelated words change, too."""

MEASURED = 60
"""So many prompts without the concept show how well an edit separates."""

PAIR_LIMIT = 2000
"""The most pairs of prompts of one edit; each is encoded twice."""

_NOUNS_AT_A_TIME = 8
_PHRASES = ("a photo of the {}", "a {}", "{}")


@dataclass(frozen=True)
class Kind:
    """How prompts name a kind of concept; "{}" is the word or the reference, "{scene}" a scene.

    Args:
        alone, inside: prompts to erase, with what takes their place.
        reference: what takes the concept's place if nothing is named; None chooses a scene unlike the concept.
    """

    alone: tuple[tuple[str, str], ...]
    inside: tuple[tuple[str, str], ...]
    reference: str | None = None


KINDS: dict[str, Kind] = {
    "object": Kind(
        alone=tuple((one, one) for one in ("a photo of the {}", "a picture of a {}", "a painting of a {}", "{}")),
        inside=(("a {} in the {scene}", "a photo of the {scene}"),),
    ),
    "person": Kind(
        alone=tuple((one, one) for one in ("a photo of {}", "a portrait of {}", "a painting of {}", "{}")),
        inside=(("{} in the {scene}", "{} in the {scene}"),),
        reference="a person",
    ),
    "style": Kind(
        alone=tuple(
            (f"{one} {by}", f"{one}{{}}")
            for one in ("a painting", "a portrait", "a drawing", "an image")
            for by in ("in the style of {}", "by {}")
        ),
        inside=(("the {scene} in the style of {}", "the {scene}{}"),),
        reference="",
    ),
}
"""Kinds of concepts. In a scene an object gives way to the scene, which keeps the rest of the image; a person to
another person; a style to the same content without a style, or in the style that is named."""


@dataclass(frozen=True)
class Edit:
    """What to erase, in words.

    Args:
        concept: a word or two; "" if `more` says all.
        reference: what takes its place; "" is a style's plain content, and is not a reference for another kind.
        synonyms: other words for the concept, erased as well.
        kind: one of `KINDS`.
        scenes: in which the words are erased, too.
        more: further pairs, as they are: published lists of prompts, for instance.
    Raises: ValueError for an unknown kind, no words, a missing reference, too many pairs, or a pair of equal prompts.
    """

    concept: str
    reference: str = ""
    synonyms: tuple[str, ...] = ()
    kind: str = "object"
    scenes: tuple[str, ...] = SCENES
    more: tuple[Pair, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the kind of concept is {self.kind!r}; expected one of {', '.join(KINDS)}")
        if not self.words and not self.more:
            raise ValueError("no concept is named; give a word or two for what to erase, such as 'cat'")
        if self.words and not self.reference.strip() and KINDS[self.kind].reference != "":
            raise ValueError(f"there is no reference for {self.concept!r}; give what to generate instead")
        count = len(self.words) * (len(self.scenes) + 1) * 4 + len(self.more)
        if count > PAIR_LIMIT:
            raise ValueError(f"the words and scenes make about {count} pairs of prompts; expected {PAIR_LIMIT} at most")
        for pair in self.pairs:
            if pair.target.casefold().split() == pair.reference.casefold().split():
                raise ValueError(
                    f"the prompt to erase and its reference are both {pair.target!r}, so there is nothing to erase; "
                    "use as reference what to generate instead of the concept"
                )

    @property
    def words(self) -> tuple[str, ...]:
        """The concept and its synonyms, each once."""
        return tuple(dict.fromkeys(word.strip() for word in (self.concept, *self.synonyms) if word.strip()))

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All pairs of prompts; the first is the concept's own."""
        kind, reference = KINDS[self.kind], self.reference.strip()
        if self.kind == "style" and reference:
            reference = f" in the style of {reference}"
        made = [Pair(filled(one, word), filled(other, reference)) for word in self.words for one, other in kind.alone]
        made += [
            Pair(filled(one, word, scene), filled(other, reference, scene))
            for word in self.words
            for scene in self.scenes
            for one, other in kind.inside
        ]
        return (*made, *self.more)


def filled(template: str, word: str, scene: str = "") -> str:
    """Return a template with a word in place of "{}", its article made to fit, and a scene in place of "{scene}"."""
    placed = re.sub(r"\ba \{\}", lambda _: with_article(word), template)
    return placed.replace("{}", word).replace("{scene}", scene).strip()


def pairs_of(text: str) -> tuple[Pair, ...]:
    """Return the pairs in a text, one per line, "prompt -> reference"; without an arrow the empty prompt is it."""
    parts = (line.partition("->") for line in text.splitlines() if line.strip())
    return tuple(Pair(target.strip(), reference.strip()) for target, _, reference in parts)


def kept_prompts(words: tuple[str, ...], more: tuple[str, ...] = (), most: int = KEPT_PROMPTS) -> tuple[str, ...]:
    """Return the prompts to keep: those given, then the shipped ones, without those that name a word to erase.

    Args:
        words: to erase.
        more: prompts to keep besides the shipped ones; all are taken.
        most: of the shipped ones, in their order; 0 for none.
    """
    shipped = shipped_prompts()[: max(most, 0)]
    return tuple(prompt for prompt in dict.fromkeys((*more, *shipped)) if not names_a_word(prompt, words))


def unseen_prompts(most: int = KEPT_PROMPTS) -> tuple[str, ...]:
    """Return prompts to measure false positives with: such as people write, and shipped ones that are not kept.

    Args:
        most: of the shipped prompts, which are kept.
    """
    rest = shipped_prompts()[most:]
    step = max(1, len(rest) // (MEASURED - len(OTHER_PROMPTS)))
    return tuple(dict.fromkeys((*OTHER_PROMPTS, *rest[::step])))[:MEASURED]


@lru_cache(maxsize=1)
def shipped_prompts() -> tuple[str, ...]:
    """Return the shipped prompts, each once: the training's, then nouns, captions and styles in turn.

    Each noun comes in several phrases: one after the other, so that the first prompts name as many things as they can.
    """
    parts: dict[str, list[str]] = {}
    for line in Path(__file__).with_name("vocabulary.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            entries = parts.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            entries.append(line)
    nouns, captions, styles = listed(" ".join(parts["nouns"])), parts["captions"], parts["styles"]
    phrased = [filled(_PHRASES[(i + turn) % len(_PHRASES)], noun) for turn in range(3) for i, noun in enumerate(nouns)]
    mixed: list[str] = []
    for start in range(0, len(phrased), _NOUNS_AT_A_TIME):
        mixed += phrased[start : start + _NOUNS_AT_A_TIME]
        number = start // _NOUNS_AT_A_TIME
        mixed += (*captions[number : number + 1], *styles[number : number + 1])
    return tuple(dict.fromkeys((*KEPT, *mixed)))
