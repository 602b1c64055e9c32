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
    decide_by_threshold,
    influence,
    influence_map,
    influence_statistic,
    paper_statistic,
    patch_influence,
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
    assert (decision.prompt, decision.neutral, decision.concept) == ((2.0, 4.0), (1.0, 3.0), ())
    assert decision.repeats == 2


def test_scores_against_a_neutral_influence_of_zero_stay_finite():
    assert decide(0.0, 0.0).score == 1.0
    assert not decide(0.0, 0.0).detected
    assert decide(1.0, 0.0).score == sys.float_info.max
    assert decide(1.0, 5e-324).score == sys.float_info.max
    assert decide(1.0, 0.0).detected


@pytest.mark.parametrize(("prompt", "detected"), [([0.6, 0.5], True), ([0.5], True), ([0.4, 0.59], False)])
def test_alignment_detects_at_or_above_the_threshold(prompt, detected):
    decision = decide_by_threshold("alignment", prompt, 0.5, weight_detected=0.0, weight_otherwise=1.0)
    assert decision.detected is detected
    assert decision.weight == (0.0 if detected else 1.0)
    assert decision.statistic == "alignment"


@pytest.mark.parametrize(("prompt", "detected"), [([1.5, 1.3], True), ([1.36], True), ([1.0, 1.7], False)])
def test_influence_is_relative_to_the_concepts_own(prompt, detected):
    decision = decide_by_threshold("influence", prompt, 0.68, concept=[1.5, 2.5])
    assert decision.detected is detected
    assert decision.score == pytest.approx(sum(prompt) / len(prompt) / 2.0)
    assert decision.concept == (1.5, 2.5)


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
    decision = decide_by([influence_statistic([1.0, 2.0], 2.0, 0.68), paper_statistic([1.0, 2.0], 0.0)], reason="why")
    content = json.loads(decision.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["detected"] is True
    assert content["weight"] == -1.0
    assert content["score"] == 0.75
    assert content["statistic"] == "influence"
    assert content["prompt"] == [1.0, 2.0]
    assert content["concept"] == [2.0]
    assert content["repeats"] == 2
    assert content["reason"] == "why"
    assert [s["name"] for s in content["statistics"]] == ["influence", "paper"]


@pytest.mark.parametrize("wild", [NAN, INF, -INF])
def test_values_that_are_not_finite_never_make_a_decision(wild):
    for arguments in ([[1.0, wild], 1.0], [1.0, wild]):
        with pytest.raises(ValueError, match="expected finite numbers: the model predicted NaN or infinity"):
            decide(*arguments)
    with pytest.raises(ValueError, match="expected finite numbers"):
        decide_by_threshold("alignment", [wild], 0.5)
    with pytest.raises(ValueError, match="threshold of 'alignment'"):
        decide_by_threshold("alignment", [0.5], wild)
    with pytest.raises(ValueError, match="expected finite numbers"):
        decide_by_threshold("influence", [1.0], 0.5, concept=wild)
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


@pytest.mark.parametrize(
    ("statistic", "concept"), [("paper", None), ("alignment", 1.0), ("influence", None), ("x", 1.0)]
)
def test_statistics_that_have_no_threshold_or_lack_their_reference_are_refused(statistic, concept):
    with pytest.raises(ValueError, match=f"got statistic '{statistic}'"):
        decide_by_threshold(statistic, 1.0, 0.5, concept=concept)


def test_unknown_statistics_are_refused():
    with pytest.raises(
        ValueError, match="unknown statistic 'distance'; expected one of patch, influence, alignment, paper"
    ):
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


def test_the_patch_influence_of_a_change_everywhere_does_not_depend_on_the_size():
    for side in (8, 16, 64):
        base = torch.zeros(1, 4, side, side)
        assert patch_influence(base, base + 0.5).item() == pytest.approx(1.0)  # sqrt(4 channels * 0.5^2)


def test_a_small_change_counts_more_in_its_patch_than_over_the_picture():
    base = torch.zeros(2, 4, 16, 16)
    adapted = base.clone()
    adapted[0] += 1.0
    adapted[1, :, :5, :5] += 1.0
    whole, patch = influence(base, adapted), patch_influence(base, adapted)
    assert patch[1] / patch[0] > 1.5 * whole[1] / whole[0]


@pytest.mark.parametrize("shape", [(2, 4, 8, 12), (2, 4, 3, 8, 8), (2, 4, 32)])
def test_pictures_videos_and_sounds_have_maps(shape, generator):
    found = influence_map(randn(generator, *shape), randn(generator, *shape))
    assert found.shape == (2, shape[-2] if len(shape) > 3 else 1, shape[-1])
    assert bool(found.isfinite().all())


def test_maps_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="expected the same shape"):
        influence_map(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 9))


@pytest.mark.parametrize(
    ("score", "confidence"), [(0.0, 1.0), (0.25, 0.5), (0.5, 0.0), (0.6, 0.25), (0.9, 1.0), (2.0, 1.0)]
)
def test_confidence_grows_with_the_distance_from_the_threshold(score, confidence):
    assert alignment_statistic(score, 0.5, certain=0.9).confidence == pytest.approx(confidence)


def test_a_smooth_policy_goes_from_one_weight_to_the_other():
    def weight(score):
        statistics = [alignment_statistic(score, 0.5, certain=0.9)]
        return decide_by(statistics, -1.0, 1.0, policy="smooth").weight

    assert [weight(score) for score in (0.4, 0.5, 0.7, 0.9, 1.5)] == pytest.approx([1.0, 1.0, 0.0, -1.0, -1.0])


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="unknown policy 'soft'; expected one of binary, smooth"):
        decide_by([alignment_statistic(1.0, 0.5)], policy="soft")
