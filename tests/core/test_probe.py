import json
import math
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from unguide_core.probe import (
    Decision,
    Statistic,
    alignment,
    alignment_statistic,
    decide,
    decide_by,
    influence,
    influence_map,
    influence_statistic,
    paper_statistic,
)

NAN, INF = float("nan"), float("inf")


def randn(generator, *shape):
    return torch.randn(*shape, generator=generator)


def test_influence_is_the_norm_of_each_sample(generator):
    base, adapted = randn(generator, 3, 4, 8, 8), randn(generator, 3, 4, 8, 8)
    expected = [(adapted[row] - base[row]).norm() for row in range(3)]
    torch.testing.assert_close(influence(base, adapted), torch.stack(expected))


def test_influence_of_half_precision_does_not_overflow():
    base = torch.zeros(1, 4, 64, 64, dtype=torch.float16)
    assert influence(base, base + 300.0).item() == pytest.approx(300 * 128)


def test_alignment_of_the_concept_itself_is_one_and_of_the_neutral_prompt_zero(generator):
    neutral, concept = randn(generator, 3, 4, 8, 8), randn(generator, 3, 4, 8, 8)
    torch.testing.assert_close(alignment(concept, neutral, concept), torch.ones(3))
    torch.testing.assert_close(alignment(neutral, neutral, concept), torch.zeros(3))


def test_alignment_measures_only_the_pull_along_the_concept(generator):
    neutral, concept, other = (randn(generator, 2, 4, 8, 8).double() for _ in range(3))
    direction = concept - neutral
    along = (other * direction).flatten(1).sum(1) / direction.flatten(1).square().sum(1)
    sideways = other - along[:, None, None, None] * direction
    pulled = alignment(neutral + 0.4 * direction + 3.0 * sideways, neutral, concept)
    torch.testing.assert_close(pulled, torch.full((2,), 0.4, dtype=torch.float64))


def test_alignment_does_not_depend_on_the_kind_of_prediction(generator):
    x, *eps = (randn(generator, 2, 4, 8, 8).double() for _ in range(4))
    torch.testing.assert_close(alignment(*(x - 2.5 * e for e in eps)), alignment(*eps))


def test_alignment_against_a_concept_equal_to_neutral_is_refused(generator):
    neutral = randn(generator, 2, 4, 8, 8)
    with pytest.raises(ValueError, match="same prediction as the neutral prompt"):
        alignment(neutral + 1, neutral, neutral.clone())


def test_predictions_of_different_shapes_are_refused(generator):
    base = randn(generator, 2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"'base': \[2, 4, 8, 8\], 'adapted': \[1, 4, 8, 8\]"):
        influence(base, base[:1])
    with pytest.raises(ValueError, match=r"'concept': \[1, 4, 8, 8\]"):
        alignment(base, base, base[:1])


def test_the_papers_rule_compares_means_strictly():
    assert decide([2.0, 4.0, 0.1], [1.0, 2.0]).detected
    assert not decide([1.0, 2.0], [2.0, 1.0]).detected
    assert decide(math.nextafter(1.0, 2.0), 1.0).detected


def test_weights_of_the_decision_are_the_ones_given():
    assert decide(2.0, 1.0).weight == -1.0
    assert decide(1.0, 2.0).weight == 1.0
    assert decide(2.0, 1.0, weight_detected=0.25, weight_otherwise=2.0).weight == 0.25
    assert decide(1.0, 2.0, weight_detected=0.25, weight_otherwise=2.0).weight == 2.0


def test_the_score_of_the_papers_rule_is_the_ratio_of_means():
    decision = decide(torch.tensor([2.0, 4.0]), torch.tensor([[1.0], [3.0]]))
    assert (decision.score, decision.threshold, decision.statistic) == (1.5, 1.0, "paper")
    statistic = decision.statistics[0]
    assert (statistic.prompt, statistic.neutral, statistic.concept) == ((2.0, 4.0), (1.0, 3.0), ())


def test_scores_against_a_neutral_influence_of_zero_stay_finite():
    assert decide(0.0, 0.0).score == 1.0
    assert not decide(0.0, 0.0).detected
    assert decide(1.0, 0.0).score == sys.float_info.max
    assert decide(1.0, 5e-324).score == sys.float_info.max
    assert decide(1.0, 0.0).detected


@pytest.mark.parametrize(("prompt", "detected"), [([0.6, 0.5], True), ([0.5], True), ([0.4, 0.59], False)])
def test_alignment_detects_at_or_above_the_threshold(prompt, detected):
    decision = decide_by([alignment_statistic(prompt, 0.5)], 0.0, 1.0)
    assert decision.detected is detected
    assert decision.weight == (0.0 if detected else 1.0)
    assert decision.statistic == "alignment"


@pytest.mark.parametrize(("prompt", "detected"), [([1.5, 1.3], True), ([1.36], True), ([1.0, 1.7], False)])
def test_influence_is_relative_to_the_concepts_own(prompt, detected):
    decision = decide_by([influence_statistic(prompt, [1.5, 2.5], 0.68)])
    assert decision.detected is detected
    assert decision.score == pytest.approx(sum(prompt) / len(prompt) / 2.0)
    assert decision.statistics[0].concept == (1.5, 2.5)


def test_the_first_statistic_decides_and_all_are_reported():
    statistics = [alignment_statistic(0.1, 0.5), influence_statistic(2.0, 2.0, 0.68), paper_statistic(2.0, 1.0)]
    decision = decide_by(statistics, reason="the concept's prompt was available", model_key="m", adapter_key="a")
    assert not decision.detected
    assert [s.name for s in decision.statistics] == ["alignment", "influence", "paper"]
    assert [s.detected for s in decision.statistics] == [False, True, True]
    assert decide_by(statistics[::-1]).detected


def test_a_decision_is_frozen():
    with pytest.raises(FrozenInstanceError):
        decide(2.0, 1.0).weight = 0.0


def test_a_decision_can_be_tied_to_a_model_and_an_adapter():
    decision = replace(decide(2.0, 1.0), model_key="model", adapter_key="adapter")
    assert (decision.model_key, decision.adapter_key, decision.detected) == ("model", "adapter", True)


def test_a_decision_is_valid_json_with_every_value():
    statistics = [influence_statistic([1.0, 2.0], 2.0, 0.68), paper_statistic([1.0, 2.0], 0.0)]
    decision = decide_by(statistics, reason="why", step=2, sigma=8.5, influence_map=torch.ones(8, 8))
    content = json.loads(decision.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["detected"] is True
    assert content["weight"] == -1.0
    assert content["score"] == 0.75
    assert content["statistic"] == "influence"
    assert content["prompt"] == [1.0, 2.0]
    assert content["concept"] == [2.0]
    assert content["repeats"] == 2
    assert content["reason"] == "why"
    assert (content["step"], content["sigma"]) == (3, 8.5)  # a person counts steps from 1
    assert "influence_map" not in content
    assert [s["name"] for s in content["statistics"]] == ["influence", "paper"]


@pytest.mark.parametrize("wild", [NAN, INF, -INF])
def test_values_that_are_not_finite_never_make_a_decision(wild):
    for arguments in ([[1.0, wild], 1.0], [1.0, wild]):
        with pytest.raises(ValueError, match="expected finite numbers: the model predicted NaN or infinity"):
            decide(*arguments)
    with pytest.raises(ValueError, match="expected finite numbers"):
        alignment_statistic([wild], 0.5)
    with pytest.raises(ValueError, match="threshold of 'alignment'"):
        alignment_statistic([0.5], wild)
    with pytest.raises(ValueError, match="expected finite numbers"):
        influence_statistic([1.0], wild, 0.5)
    with pytest.raises(ValueError, match="weight"):
        decide(2.0, 1.0, weight_detected=wild)


def test_no_values_make_no_decision():
    with pytest.raises(ValueError, match="no values for the influence on the prompt"):
        decide([], [1.0])
    with pytest.raises(ValueError, match="at least one statistic"):
        decide_by([])


def test_an_adapter_without_influence_on_its_own_concept_is_refused():
    with pytest.raises(ValueError, match=r"influence on its own concept is 0\.0"):
        influence_statistic(1.0, [0.0, 0.0], 0.68)


def test_unknown_statistics_are_refused():
    with pytest.raises(ValueError, match="unknown statistic 'distance'; expected one of influence, alignment, paper"):
        Statistic("distance", 1.0, 1.0, True, (1.0,))
    assert Decision(1.0, (alignment_statistic(1.0, 0.5),)).detected


def test_a_map_shows_where_the_adapter_acts(generator):
    base = randn(generator, 2, 4, 16, 16)
    adapted = base.clone()
    adapted[0, :, 10:13, 2:5] += 1.0
    found = influence_map(base, adapted)
    assert found.shape == (2, 16, 16)
    assert float(found[1].max()) == 0.0
    assert divmod(int(found[0].argmax()), 16)[0] in range(9, 14)
    assert float(found[0, :4, 10:].max()) == 0.0


def test_a_map_of_a_change_everywhere_does_not_depend_on_the_size():
    for side in (8, 16, 64):
        base = torch.zeros(1, 4, side, side)
        assert influence_map(base, base + 0.5).max().item() == pytest.approx(1.0)  # sqrt(4 channels * 0.5^2)


@pytest.mark.parametrize("shape", [(2, 4, 8, 12), (2, 4, 3, 8, 8), (2, 4, 32)])
def test_pictures_videos_and_sounds_have_maps(shape, generator):
    found = influence_map(randn(generator, *shape), randn(generator, *shape))
    assert found.shape == (2, shape[-2] if len(shape) > 3 else 1, shape[-1])
    assert bool(found.isfinite().all())


def test_maps_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="expected the same shape"):
        influence_map(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 9))


def test_a_decisions_map_takes_no_part_in_comparing_and_printing_it():
    decision = decide(2.0, 1.0)
    mapped = replace(decision, influence_map=torch.ones(8, 8))
    assert mapped == decision
    assert "influence_map" not in repr(mapped)
    assert json.loads(decision.to_json())["step"] is None
