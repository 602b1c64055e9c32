import dataclasses
import json
import math

import pytest
import torch

from unguide_core.probe.calibration import Calibration, CalibrationPrompts, Level, calibrated_levels, tells_apart
from unguide_core.probe.spread import TAIL_RATES, Spread


def spread(low, high, *, upper, count=200):
    return Spread.of([low + (high - low) * i / (count - 1) for i in range(count)], upper=upper)


def level(sigma, baseline=2.0, own=(0.5, 1.2), others=(0.0, 0.2)):
    return Level(sigma, baseline, 0.1, spread(*own, upper=False), spread(*others, upper=True))


def calibration(*levels, **changes):
    content = {"model": "m", "adapter": "a", "latent": (4, 8, 8), "cfg": 4.0, "repeats": 8}
    return Calibration(**{**content, **changes}, levels={"influence": levels})


def test_a_tail_is_what_a_share_of_the_scores_lies_beyond():
    others, own = spread(0.0, 1.0, upper=True, count=1001), spread(0.0, 1.0, upper=False, count=1001)
    for share in TAIL_RATES:
        assert others.beyond(share) == pytest.approx(1.0 - share, abs=1e-3)
        assert own.beyond(share) == pytest.approx(share, abs=1e-3)
    assert others.beyond(0.02) == pytest.approx((others.beyond(0.01) + others.beyond(0.03)) / 2, abs=5e-3)
    assert others.beyond(1e-6) == others.beyond(TAIL_RATES[0])


def test_a_share_below_a_score_is_the_inverse_of_the_score_that_a_share_lies_beyond():
    own = spread(0.0, 1.0, upper=False, count=1001)
    for share in (0.001, 0.005, 0.02, 0.3):
        assert own.share_below(own.beyond(share)) == pytest.approx(share)
    assert own.share_below(-1.0) == pytest.approx(TAIL_RATES[0])
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
    threshold = level(5.0).threshold(0.01)
    assert 0.2 < threshold < 0.5
    assert threshold == pytest.approx(math.sqrt(level(5.0).others.beyond(0.01) * level(5.0).concept.beyond(0.01)))


def test_a_threshold_keeps_the_false_positive_rate_where_the_prompts_overlap():
    overlapping = level(5.0, own=(0.1, 1.0), others=(0.0, 0.5))
    assert overlapping.threshold(0.03) == overlapping.others.beyond(0.03)


def test_a_higher_false_positive_rate_lowers_the_threshold():
    thresholds = [level(5.0, others=(0.0, 0.6)).threshold(rate) for rate in (0.003, 0.01, 0.1, 0.3)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[0] > thresholds[-1]


def test_figures_between_two_noise_levels_are_interpolated_in_the_logarithm():
    found = calibration(level(10.0, 1.0), level(2.5, 3.0)).at("influence", 5.0)
    assert found.baseline == pytest.approx(2.0)
    assert found.concept.count == 200


def test_a_noise_level_a_little_outside_the_calibrated_ones_has_the_nearest_ones_figures_and_one_far_outside_none():
    known = calibration(level(10.0, 1.0), level(2.5, 3.0))
    assert known.at("influence", 10.4).baseline == 1.0
    assert known.at("influence", 2.4).baseline == 3.0
    assert known.at("influence", 10.6) is None
    assert known.at("influence", 2.3) is None
    assert known.at("alignment", 5.0) is None


def test_a_card_keeps_a_calibration_exactly():
    known = calibration(level(10.0), level(2.5), cfg=None)
    content = json.loads(json.dumps(known.to_card(), allow_nan=False))
    assert Calibration.from_card(content) == known


def test_a_card_without_a_calibration_or_of_another_version_gives_none():
    assert Calibration.from_card({}) is None
    assert Calibration.from_card({**calibration(level(5.0)).to_card(), "version": 2}) is None


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


SIGMAS = (9.0, 5.0)


class Probe:
    """Influence and alignment that depend on the prompt and the repeat, and a record of the calls."""

    def __init__(self, **strength: float):
        self.strength, self.calls = strength, []

    def __call__(self, asked):
        for one in asked:
            self.calls.append((one.prompt, one.repeats, one.adapters))
            text = one.prompt if isinstance(one.prompt, str) else one.prompt[0]
            noise = torch.arange(one.repeats) * 0.01
            values = {sigma: self.strength.get(text, 0.1) * sigma + noise for sigma in SIGMAS}
            yield [
                (sigma, dict.fromkeys(one.adapters, dict.fromkeys(("influence", "alignment"), value)))
                for sigma, value in values.items()
            ]


def test_calibrating_probes_each_prompt_once_for_all_adapters_that_ask_for_it():
    probe, progress = Probe(cat=1.0), []
    asked = [
        CalibrationPrompts("cat", ["cat asleep"], ["empty", "dog"]),
        CalibrationPrompts("dog", ["dog asleep"], ["empty", "cat"]),
    ]
    found = calibrated_levels(
        asked, probe, repeats=2, own_repeats=4, on_prompt=lambda done, total: progress.append((done, total))
    )
    assert probe.calls == [
        ("cat", 4, (0, 1)),
        ("cat asleep", 2, (0,)),
        ("empty", 2, (0, 1)),
        ("dog", 4, (0, 1)),
        ("dog asleep", 2, (1,)),
    ]
    assert progress == [(done, 5) for done in range(1, 6)]
    assert [sorted(levels) for levels in found] == [["alignment", "influence"]] * 2
    cat = found[0]["influence"]
    assert [level.sigma for level in cat] == list(SIGMAS)
    assert cat[0].baseline == pytest.approx(9.015)  # the mean of four repeats
    assert (cat[0].concept.count, cat[0].others.count) == (4 + 2, 2 + 2)  # a shared prompt's first repeats
    assert found[0]["alignment"][0].baseline == 1.0


def test_prompts_that_cannot_be_hashed_are_told_apart_by_identity():
    own, same, other = ["cat"], ["cat"], ["dog"]
    probe = Probe(cat=1.0)
    calibrated_levels([CalibrationPrompts(own, [own, same], [other])], probe, repeats=2, own_repeats=2)
    assert [prompt for prompt, _, _ in probe.calls] == [own, same, other]
    assert probe.calls[0][0] is own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minimum_others": 3}, "got 2 prompts without the concept; expected at least 3"),
        ({"repeats": 0}, "got 0 repeats per prompt and 2 of the concept's own"),
        ({"own_repeats": 1}, "got 1 repeats per prompt and 1 of the concept's own"),
    ],
)
def test_too_few_prompts_or_repeats_are_refused_before_anything_is_probed(changes, message):
    probe = Probe()
    with pytest.raises(ValueError, match=message):
        calibrated_levels(
            [CalibrationPrompts("cat", [], ["dog", "ship"])], probe, **{"repeats": 1, "own_repeats": 2, **changes}
        )
    assert probe.calls == []


def test_an_adapter_without_influence_on_its_concept_is_named():
    prompts = CalibrationPrompts("cat", [], ["dog", "ship"], name="cat.safetensors")
    with pytest.raises(ValueError, match=r"adapter 'cat\.safetensors': .*no influence on its own concept"):
        calibrated_levels([prompts], Probe(cat=-1.0), repeats=2, own_repeats=2)
