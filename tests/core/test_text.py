"""The text stage's statistics, against the layers themselves, and its thresholds."""

import dataclasses
import json
import math

import pytest
import torch

from unguide_core.adapter import LowRank
from unguide_core.probe.calibration import Calibration
from unguide_core.probe.spread import Spread, joint_rate
from unguide_core.probe.text import (
    Scores,
    TextCalibration,
    calibrated_text,
    concept_direction,
    text_map,
    text_norms,
    text_scores,
)

WIDTH = 12


def layers_of(*ranks: int) -> list[LowRank]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((rank, 20 + 4 * i, 0.5 + i) for i, rank in enumerate(ranks))
    return [
        LowRank(torch.randn(rank, WIDTH, generator=generator), torch.randn(out, rank, generator=generator), scale)
        for rank, out, scale in sizes
    ]


def changes(layers: list[LowRank], norms: list[float], states: torch.Tensor) -> torch.Tensor:
    """v of each state by its definition, [..., the layers' outputs]."""
    return torch.cat([layer.delta(states) / norm for layer, norm in zip(layers, norms, strict=True)], dim=-1)


@pytest.mark.parametrize("ranks", [(1,), (1, 1, 1), (4, 2), (3, 64, 1)], ids=str)
def test_the_map_keeps_every_inner_product_of_the_layers_changes_at_any_rank(ranks):
    layers, norms = layers_of(*ranks), [1.5 + i for i in range(len(ranks))]
    states = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))
    seen, changed = text_map(layers, norms), changes(layers, norms, states)
    assert len(seen) == sum(min(rank, 20 + 4 * i) for i, rank in enumerate(ranks))
    torch.testing.assert_close((states @ seen.T) @ (states @ seen.T).T, changed @ changed.T, rtol=1e-4, atol=1e-3)


def test_the_scores_are_those_of_the_definition_and_the_concepts_own_prompt_has_1():
    layers, norms = layers_of(1, 2, 4), [1.0, 2.0, 3.0]
    own, prompts = torch.randn(5, WIDTH), torch.randn(3, 9, WIDTH)
    seen = text_map(layers, norms)
    direction = concept_direction(seen, own)
    changed, concept = changes(layers, norms, prompts), changes(layers, norms, own)
    longest = concept[concept.norm(dim=1).argmax()]
    expected = ((changed @ longest) / longest.square().sum()).amax(dim=1)
    torch.testing.assert_close(text_scores(prompts, direction), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(text_norms(prompts, seen), changed.norm(dim=2).amax(dim=1), rtol=1e-4, atol=1e-4)
    assert float(text_scores(own[None], direction)) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("layers", "norms", "message"),
    [
        ([], [], "expected linear layers of one width"),
        ([LowRank(torch.ones(1, 3), torch.ones(4, 1)), LowRank(torch.ones(1, 5), torch.ones(4, 1))], [1.0, 1.0], "one"),
        ([LowRank(torch.ones(1, 3), torch.ones(4, 1))], [0.0], "expected a finite number above 0"),
    ],
)
def test_layers_that_are_not_of_one_text_space_are_refused(layers, norms, message):
    with pytest.raises(ValueError, match=message):
        text_map(layers, norms)


def test_an_adapter_that_leaves_its_concept_alone_is_refused():
    with pytest.raises(ValueError, match="does not change its own concept's text"):
        concept_direction(text_map([LowRank(torch.zeros(1, 3), torch.ones(4, 1))], [1.0]), torch.ones(2, 3))


def scores(own: tuple[float, float], others: tuple[float, float]) -> Scores:
    def spread(low: float, high: float, upper: bool) -> Spread:
        return Spread.of([low + (high - low) * i / 200 for i in range(201)], upper=upper)

    return Scores(spread(*own, False), spread(*others, True))


@pytest.mark.parametrize(("most", "half_way"), [(0.5, True), (0.4, False)])
def test_the_thresholds_lie_between_the_two_kinds_of_prompts(most, half_way):
    lower, upper = scores((0.8, 1.1), (0.0, most)).thresholds(0.01)
    others, concept = most * (1.0 - 0.01), 0.8 + 0.3 * 0.01
    assert others < lower < upper < concept
    assert lower / others == pytest.approx((concept / others) ** 0.25, abs=0.01)
    assert upper == pytest.approx(math.sqrt(others * concept) if half_way else 0.75 * concept, abs=0.01)


def test_three_quarters_of_the_concepts_score_are_never_decided_however_high_other_prompts_score():
    lower, upper = scores((0.8, 1.1), (0.0, 0.75)).thresholds(0.01)
    assert lower == pytest.approx(0.75 * 0.8, abs=0.01)
    assert upper > 0.75


def test_the_lower_threshold_is_above_zero_where_other_prompts_score_below_it():
    lower, upper = scores((0.8, 1.1), (-0.4, -0.1)).thresholds(0.01)
    assert 0.0 < lower < upper < 0.8


def test_a_statistic_that_does_not_separate_has_no_thresholds():
    assert scores((0.4, 1.0), (0.0, 0.6)).thresholds(0.01) is None


def test_the_more_adapters_the_higher_the_thresholds():
    found = scores((0.8, 1.1), (0.0, 0.5))
    for values in zip(*(found.thresholds(0.03, n) for n in (1, 4, 10)), strict=True):
        assert list(values) == sorted(set(values))


@pytest.mark.parametrize("adapters", [1, 2, 10, 100])
def test_adapters_that_err_independently_reach_the_joint_rate_together(adapters):
    each = joint_rate(0.01, adapters)
    assert 1.0 - (1.0 - each) ** adapters == pytest.approx(0.01)
    assert each <= 0.01


def calibration() -> TextCalibration:
    seen = text_map(layers_of(1, 2), [1.0, 2.0])
    own, *rest = torch.randn(8, 5, WIDTH, generator=torch.Generator().manual_seed(3))
    return calibrated_text(seen, own, rest[:3], rest[3:])


def test_a_card_keeps_the_text_stage_exactly():
    whole = Calibration("m", "a", text=calibration())
    assert Calibration.from_card(json.loads(json.dumps(whole.to_card(), allow_nan=False))) == whole


@pytest.mark.parametrize(
    ("name", "value"),
    [("direction", []), ("direction", [math.nan]), ("direction", [0.0] * 20_000), ("norm", 0.0), ("text", {})],
)
def test_a_damaged_text_stage_is_refused(name, value):
    card = json.loads(json.dumps(Calibration("m", "a", text=calibration()).to_card()))
    card["text"][name] = value
    with pytest.raises(ValueError, match="the card's calibration is damaged"):
        Calibration.from_card(card)


def test_the_text_stage_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        calibration().norm = 2.0
