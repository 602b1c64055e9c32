"""The text stage: what an adapter does to a prompt's text states, known before any model evaluation.

Layers that read text states alone (the cross-attention keys and values of SD 1.x, 2.x and SDXL) change their output by
a linear function of those states. The changes of all layers, relative to the layers' weights, are one vector per token:

    v(c) = (scale_l up_l down_l c / ||W_l||_F) over the layers l

    text        max over the prompt's tokens t of <v(c_t), v*> / ||v*||^2
    text norm   max over the prompt's tokens t of ||v(c_t)|| / ||v*||

v* is the longest v of the concept's own prompt, so that prompt scores 1. `text` is a dot product of every state with
one vector of text space: with that vector known, it needs neither the adapter nor the model. `text norm` sees every
direction: text that was optimised to turn away from v* still has a long v. Does not know prompts or models.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..adapter.lowrank import LowRank
from .spread import LEAST, TAIL_RATES, Spread, joint_rate, threshold

WIDTH_LIMIT = 1 << 14
"""The widest text states that a card may name; the widest known model's have 4096."""

OPEN_SHARE = 0.75
"""A share of the concept's scores that the text alone never decides: it lies between the two thresholds. Prompts with
the concept in words that a calibration does not have score that low, and so do prompts without it."""


def text_map(layers: Sequence[LowRank], norms: Sequence[float]) -> Tensor:
    """Return the matrix Z with <Z c, Z c'> = <v(c), v(c')> for all text states c and c'.

    Z^T Z = sum_l scale_l^2 down_l^T up_l^T up_l down_l / ||W_l||_F^2

    Args:
        layers: that read text states, of any ranks, down [rank, width].
        norms: the Frobenius norm of each layer's weight in the base model.
    Returns: float32 [sum of the ranks, width].
    Raises: ValueError for no layers, other than linear ones of one width, or a norm that is not above 0.
    """
    widths = {tuple(layer.down.shape[1:]) for layer in layers}
    if len(widths) != 1 or len(next(iter(widths))) != 1:
        raise ValueError(f"the layers read states of widths {sorted(widths)}; expected linear layers of one width")
    parts = []
    for layer, norm in zip(layers, norms, strict=True):
        if not norm > 0.0 or not math.isfinite(norm):
            raise ValueError(f"a layer's weight has the norm {norm}; expected a finite number above 0")
        up = layer.up.double().cpu() * (layer.scale / norm)
        parts.append(torch.linalg.qr(up, mode="r").R @ layer.down.double().cpu())
    return torch.cat(parts).float()


def concept_direction(text_map: Tensor, states: Tensor) -> Tensor:
    """Return the vector of text space whose dot product with a text state is that state's part in `text`.

    Z^T Z c* / ||Z c*||^2,   c*: the concept's token with the longest Z c

    Args:
        text_map: Z, see `text_map`.
        states: of the concept's own prompt, [tokens, width].
    Returns: float32 [width].
    Raises: ValueError if the adapter leaves all of the states as they are.
    """
    changes = states.float().cpu() @ text_map.T
    longest = changes[changes.norm(dim=-1).argmax()]
    squared = longest.square().sum()
    if not float(squared) > 0.0:
        raise ValueError("the adapter does not change its own concept's text; use one that was trained for this model")
    direction: Tensor = (longest @ text_map) / squared
    return direction


def text_scores(states: Tensor, direction: Tensor) -> Tensor:
    """Return `text` of prompts: how far the adapter moves their strongest token where it moves its concept's.

    Args:
        states: text states, [B, tokens, width].
        direction: see `concept_direction`, [width].
    Returns: float32 [B].
    """
    return (states.float() @ direction.to(states.device)).amax(dim=-1)


def text_norms(states: Tensor, text_map: Tensor) -> Tensor:
    """Return how far the adapter moves the strongest token of prompts, in any direction: max over tokens of ||Z c||.

    Args:
        states: text states, [B, tokens, width].
        text_map: Z, see `text_map`.
    Returns: float32 [B].
    """
    norms: Tensor = (states.float() @ text_map.to(states.device).T).norm(dim=-1)
    return norms.amax(dim=-1)


@dataclass(frozen=True)
class Scores:
    """How one statistic of the text stage is distributed over prompts.

    concept: scores of prompts with the concept, with their lower tail.
    others: scores of prompts without it, with their upper tail.
    """

    concept: Spread
    others: Spread

    def thresholds(self, false_positive_rate: float, adapters: int = 1) -> tuple[float, float] | None:
        """Return the two thresholds: below the first the concept is absent, from the second on it is there.

        `spread.threshold` is half way (in the logarithm) from the score that the accepted share of the other prompts
        exceeds to the one that all but this share of the concept's prompts reach. The second threshold is that, or
        `OPEN_SHARE` of the concept's score if this is more; the first is a quarter of the way, or that share if it is
        less. None where the statistic does not separate: the accepted false positives score as high as the concept's
        weakest prompts.

        Args:
            false_positive_rate: accepted for one image.
            adapters: on the model, which share that rate, see `spread.joint_rate`.
        """
        others = max(self.others.beyond(joint_rate(false_positive_rate, adapters)), LEAST)
        if self.concept.beyond(TAIL_RATES[0]) <= others:
            return None
        middle = threshold(self.concept, self.others, false_positive_rate, adapters)
        between = OPEN_SHARE * self.concept.beyond(false_positive_rate)
        return min(math.sqrt(others * middle), between), max(middle, between)


@dataclass(frozen=True)
class TextCalibration:
    """The text stage of one adapter, calibrated.

    direction: see `concept_direction`, [width].
    norm: ||v*||, what `text norm` is relative to.
    text, text_norm: how the two statistics are distributed.
    """

    direction: tuple[float, ...]
    norm: float
    text: Scores
    text_norm: Scores

    def __post_init__(self) -> None:
        if not 1 <= len(self.direction) <= WIDTH_LIMIT or not all(map(math.isfinite, self.direction)):
            raise ValueError(
                f"the text stage's direction has {len(self.direction)} numbers; expected 1 to {WIDTH_LIMIT} finite ones"
            )
        if not (math.isfinite(self.norm) and self.norm > 0.0):
            raise ValueError(f"the text stage's norm is {self.norm}; expected a finite number above 0")

    @cached_property
    def vector(self) -> Tensor:
        """The direction, float32 [width]."""
        return torch.tensor(self.direction)

    @staticmethod
    def from_card(content: Mapping[str, Any]) -> "TextCalibration":
        """Return what is stored in a card. Raises: KeyError, TypeError or ValueError if it is damaged."""
        text, text_norm = (
            Scores(Spread.from_card(content[name]["concept"]), Spread.from_card(content[name]["others"]))
            for name in ("text", "text_norm")
        )
        return TextCalibration(tuple(map(float, content["direction"])), float(content["norm"]), text, text_norm)


def calibrated_text(
    text_map: Tensor, own: Tensor, concept: Sequence[Tensor], others: Sequence[Tensor]
) -> TextCalibration:
    """Return the calibration of an adapter's text stage.

    Args:
        text_map: Z, see `text_map`.
        own: text states of the concept's own prompt, [tokens, width].
        concept, others: of other prompts with the concept, and of prompts without it, likewise.
    Raises: ValueError for fewer than two prompts without the concept, or an adapter that does not change its concept's.
    """
    direction = torch.tensor([float(f"{value:.6g}") for value in concept_direction(text_map, own).tolist()])
    norm = float(text_norms(own[None], text_map))

    def spread(prompts: Sequence[Tensor], statistic: Callable[[Tensor], Tensor], upper: bool) -> Spread:
        return Spread.of([float(statistic(states[None].cpu())) for states in prompts], upper=upper)

    def scores(statistic: Callable[[Tensor], Tensor]) -> Scores:
        return Scores(spread((own, *concept), statistic, False), spread(others, statistic, True))

    text = scores(lambda states: text_scores(states, direction))
    text_norm = scores(lambda states: text_norms(states, text_map) / norm)
    return TextCalibration(tuple(direction.tolist()), round(norm, 6), text, text_norm)
