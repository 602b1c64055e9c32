"""From words to low-rank layers: encodes the prompts of closed-form edits, fits the erasers, changes the layers.

Knows neither the host program nor the text encoder: `Encode` gives a prompt's states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapter.lowrank import LowRank
from .closed_form import RANK_LIMIT, ClosedForm, ClosedFormEraser, ClosedFormFitter, Moment
from .training.prompts import names_a_word
from .vocabulary import Edit

Encode = Callable[[str], tuple[Tensor, Tensor | None]]
"""A prompt's text states [tokens, width], and its pooled state [pooled width] where the model reads one."""

_AT_A_TIME = 32


@dataclass(frozen=True)
class Kept:
    """Prompts to keep, as the moments of their states: of their tokens, and of their pooled states if there are any.

    The moments cost one encoding for each prompt, and serve any number of edits.
    """

    prompts: tuple[str, ...]
    tokens: Moment
    pooled: Moment | None

    @staticmethod
    def of(prompts: Sequence[str], encode: Encode) -> Kept:
        """Return the moments of prompts. Raises: ValueError if there are none."""
        if not prompts:
            raise ValueError("there are no prompts to keep; give some, the empty prompt at least")
        tokens, pooled = None, None
        for start in range(0, len(prompts), _AT_A_TIME):
            states, vectors = zip(*map(encode, prompts[start : start + _AT_A_TIME]), strict=True)
            tokens = _added(tokens, states)
            pooled = _added(pooled, [vector[None] for vector in vectors if vector is not None])
        assert tokens is not None
        return Kept(tuple(prompts), tokens, pooled)

    def without(self, words: Sequence[str], encode: Encode) -> Kept:
        """Return the moments of those prompts that name none of the words."""
        named = [prompt for prompt in self.prompts if names_a_word(prompt, words)]
        if not named:
            return self
        left = tuple(prompt for prompt in self.prompts if prompt not in named)
        if not left:
            raise ValueError("every prompt to keep names a word to erase; give prompts without it")
        taken = Kept.of(named, encode)
        pooled = None if self.pooled is None or taken.pooled is None else self.pooled.minus(taken.pooled)
        return Kept(left, self.tokens.minus(taken.tokens), pooled)


def _added(moment: Moment | None, states: Sequence[Tensor]) -> Moment | None:
    """A moment with more states, made where there is none yet; None for none."""
    if not states:
        return moment
    joined = torch.cat([each.reshape(-1, each.shape[-1]) for each in states])
    return (Moment(joined.shape[-1]) if moment is None else moment).add(joined)


@dataclass(frozen=True)
class TextLayers:
    """The weights that read the prompt, by the names that an adapter's layers are to have.

    Args:
        tokens: of the layers that read text states, [out, width].
        pooled: of those that read the pooled state with their first inputs, [out, pooled width or more].
    """

    tokens: Mapping[str, Tensor]
    pooled: Mapping[str, Tensor]


@dataclass(frozen=True)
class Edited:
    """The layers of an edit, and its erasers: of the tokens' states, and of the pooled ones if the model reads any."""

    layers: Mapping[str, LowRank]
    tokens: ClosedFormEraser
    pooled: ClosedFormEraser | None


def edit_text(edits: Sequence[Edit], kept: Kept, layers: TextLayers, encode: Encode, settings: ClosedForm) -> Edited:
    """Return the layers that erase the concepts of one or several edits together.

    The rank's bound holds for each concept. SDXL's pooled state has a map of its own: the concept would leak there.

    Raises: ValueError if there is nothing to erase, or a weight does not fit the states.
    """
    settings = replace(settings, rank=min(RANK_LIMIT, settings.rank * len(edits)))
    pairs = [pair for edit in edits for pair in edit.pairs]
    prompts = dict.fromkeys(prompt for pair in pairs for prompt in (pair.target, pair.reference))
    encoded = {prompt: encode(prompt) for prompt in prompts}
    tokens = ClosedFormFitter(kept.tokens.width)
    pooled = None if kept.pooled is None or not layers.pooled else ClosedFormFitter(kept.pooled.width)
    for pair in pairs:
        (target, own), (reference, other) = encoded[pair.target], encoded[pair.reference]
        tokens.erase(target, reference)
        if pooled is not None:
            assert own is not None
            assert other is not None
            pooled.erase(own, other)
    eraser = tokens.fit(layers.tokens.values(), kept.tokens, settings)
    changed = {name: eraser.layer(weight) for name, weight in layers.tokens.items()}
    if pooled is None or kept.pooled is None:
        return Edited(changed, eraser, None)
    of_pooled = pooled.fit(layers.pooled.values(), kept.pooled, settings)
    changed |= {name: of_pooled.layer(weight) for name, weight in layers.pooled.items()}
    return Edited(changed, eraser, of_pooled)
