import dataclasses
import json
import math

import pytest

from unguide_core.calibration import SHARES, Calibration, Level, Spread, tells_apart


def spread(low, high, *, upper, count=200):
    return Spread.of([low + (high - low) * i / (count - 1) for i in range(count)], upper=upper)


def level(sigma, baseline=2.0, own=(0.5, 1.2), others=(0.0, 0.2)):
    return Level(sigma, baseline, 0.1, spread(*own, upper=False), spread(*others, upper=True))


def calibration(*levels, **changes):
    content = {"model": "m", "adapter": "a", "latent": (4, 8, 8), "cfg": 4.0, "repeats": 8}
    return Calibration(**{**content, **changes}, levels={"influence": levels})


def test_a_tail_is_what_a_share_of_the_scores_lies_beyond():
    others, own = spread(0.0, 1.0, upper=True, count=1001), spread(0.0, 1.0, upper=False, count=1001)
    for share in SHARES:
        assert others.beyond(share) == pytest.approx(1.0 - share, abs=1e-3)
        assert own.beyond(share) == pytest.approx(share, abs=1e-3)
    assert others.beyond(0.02) == pytest.approx((others.beyond(0.01) + others.beyond(0.03)) / 2, abs=5e-3)
    assert others.beyond(1e-6) == others.beyond(SHARES[0])


def test_a_share_below_a_score_is_the_inverse_of_the_score_that_a_share_lies_beyond():
    own = spread(0.0, 1.0, upper=False, count=1001)
    for share in (0.001, 0.005, 0.02, 0.3):
        assert own.share_below(own.beyond(share)) == pytest.approx(share)
    assert own.share_below(-1.0) == pytest.approx(SHARES[0])
    assert own.share_below(0.5) == pytest.approx(0.5, abs=0.01)
    assert own.share_below(9.0) == pytest.approx(1.0)
    assert Spread.of([0.4, 0.4], upper=False).share_below(0.5) == 1.0


def test_influence_decides_where_it_separates_or_misses_less_than_alignment():
    apart, near, far = level(5.0), level(5.0, others=(0.0, 0.6)), level(5.0, own=(0.1, 0.9), others=(0.0, 0.8))
    sees_half, sees_nearly_all = level(5.0, own=(0.0, 1.0)), level(5.0, own=(0.45, 1.2))
    assert tells_apart(apart, None, 0.01)
    assert tells_apart(apart, sees_nearly_all, 0.01)
    assert not tells_apart(near, None, 0.01)
    assert tells_apart(near, sees_half, 0.01)
    assert not tells_apart(near, sees_nearly_all, 0.01)
    assert not tells_apart(far, sees_half, 0.01)


def test_a_threshold_lies_between_the_two_kinds_of_prompts():
    found = level(5.0).threshold(0.01)
    assert 0.2 < found.score < 0.5
    assert found.score == pytest.approx(math.sqrt(level(5.0).others.beyond(0.01) * level(5.0).concept.beyond(0.01)))
    assert found.certain == pytest.approx(0.507, abs=0.01)


def test_a_threshold_keeps_the_false_alarm_rate_where_the_prompts_overlap():
    overlapping = level(5.0, own=(0.1, 1.0), others=(0.0, 0.5))
    found = overlapping.threshold(0.03)
    assert found.score == overlapping.others.beyond(0.03)
    assert found.certain >= found.score


def test_a_higher_rate_of_false_alarms_lowers_the_threshold():
    thresholds = [level(5.0, others=(0.0, 0.6)).threshold(rate).score for rate in (0.003, 0.01, 0.1, 0.3)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[0] > thresholds[-1]


def test_figures_between_two_noise_levels_are_interpolated_in_the_logarithm():
    found = calibration(level(10.0, 1.0), level(2.5, 3.0)).at("influence", 5.0)
    assert found.baseline == pytest.approx(2.0)
    assert found.concept.count == 200


def test_a_noise_level_outside_the_calibrated_ones_has_no_figures():
    known = calibration(level(10.0), level(2.5))
    assert known.at("influence", 10.2).baseline == 2.0
    assert known.at("influence", 12.0) is None
    assert known.at("influence", 2.0) is None
    assert known.at("alignment", 5.0) is None


def test_a_card_keeps_a_calibration_exactly():
    known = calibration(level(10.0), level(2.5), cfg=None)
    content = json.loads(json.dumps(known.to_card(), allow_nan=False))
    assert Calibration.from_card(content) == known


def test_a_card_without_a_calibration_or_of_another_version_gives_none():
    assert Calibration.from_card({}) is None
    assert Calibration.from_card({"mean": 1.0, "std": 0.1}) is None
    assert Calibration.from_card({**calibration(level(5.0)).to_card(), "version": 99}) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("levels", None), ("levels", {"influence": [{"sigma": 1.0}]}), ("latent", "x"), ("repeats", None)],
)
def test_a_damaged_calibration_is_refused(name, value):
    with pytest.raises(ValueError, match="the card's calibration is damaged"):
        Calibration.from_card({**calibration(level(5.0)).to_card(), name: value})


def test_a_tail_of_another_length_is_damaged():
    content = json.loads(json.dumps(calibration(level(5.0)).to_card()))
    content["levels"]["influence"][0]["others"]["tail"].pop()
    with pytest.raises(ValueError, match="a tail has 5 values; expected 6"):
        Calibration.from_card(content)


@pytest.mark.parametrize("scores", [[], [1.0], [1.0, math.nan]])
def test_scores_that_say_nothing_are_refused(scores):
    with pytest.raises(ValueError, match="expected two or more finite numbers"):
        Spread.of(scores, upper=True)


def test_a_calibration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        calibration(level(5.0)).model = "other"
