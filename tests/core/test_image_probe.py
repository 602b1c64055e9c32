"""The image probe: what its fit guarantees, and what a card may hold."""

import json
from dataclasses import replace

import pytest
import torch

from unguide_core.probe import image
from unguide_core.probe.image import THRESHOLD, ImageProbe, fit_image_probe, image_features

CHANNELS = 20


def images(count, shift=0.0, seed=0, channels=CHANNELS):
    """Features of images; a concept shifts the first five of them."""
    features = torch.randn(count, 3 * channels, generator=torch.Generator().manual_seed(seed))
    features[:, :5] += shift
    return features * torch.logspace(-3, 3, 3 * channels)  # features differ in scale by a million


@pytest.fixture(scope="module")
def probe():
    return fit_image_probe(images(20, 5.0, 1), images(60, 0.0, 2))


def test_features_are_mean_maximum_and_deviation_over_positions_whatever_the_size():
    hidden = torch.randn(2, 7, 4, 6, generator=torch.Generator().manual_seed(0))
    features = image_features(hidden.half())
    expected = [hidden.mean((2, 3)), hidden.amax((2, 3)), hidden.std((2, 3), correction=0)]
    torch.testing.assert_close(features, torch.cat(expected, 1), atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(image_features(hidden.repeat(1, 1, 2, 3)), image_features(hidden))


def test_images_of_the_concept_score_above_the_threshold_and_others_below(probe):
    assert (probe.score(images(200, 5.0, 3)) >= THRESHOLD).double().mean() > 0.95
    assert (probe.score(images(200, 0.0, 4)) >= THRESHOLD).sum() == 0
    assert (probe.missed, probe.mistaken) == (0.0, 0.0)
    assert probe.images == (20, 60)


def test_the_scale_is_that_of_images_left_out_one_by_one(monkeypatch):
    """The closed form is the score of every image in a fit to all others."""
    concept, others = images(9, 2.0, 5), images(12, 0.0, 6)
    x, y = torch.cat([concept, others]).double(), torch.tensor([1.0] * 9 + [-1.0] * 12).double()
    balance = torch.tensor([0.5 / 9] * 9 + [0.5 / 12] * 12).double()
    mean = balance @ x
    z = (x - mean) / (balance @ (x - mean).square()).sqrt()
    weights, held_out = image._ridge(z, y, balance)

    def fitted(rows):
        weighed = z[rows] * balance[rows, None]
        return torch.linalg.solve(weighed.T @ z[rows] + image.RIDGE * torch.eye(z.shape[1]), weighed.T @ y[rows])

    torch.testing.assert_close(weights, fitted(torch.arange(21)))
    one_by_one = [z[i] @ fitted(torch.tensor([j for j in range(21) if j != i])) for i in range(21)]
    torch.testing.assert_close(held_out, torch.stack(one_by_one))


def test_both_groups_weigh_the_same_however_many_images_they_have():
    """More copies of the same others change the scale, not the direction."""
    concept, others = images(10, 5.0, 7), images(30, 0.0, 8)
    fits = [fit_image_probe(concept, others), fit_image_probe(concept, others.repeat(4, 1))]
    one, more = (torch.tensor(fit.weights).double() for fit in fits)
    torch.testing.assert_close(one / one.norm(), more / more.norm(), atol=1e-4, rtol=1e-3)


def test_groups_that_look_alike_have_no_probe():
    assert fit_image_probe(images(20, 0.0, 9), images(60, 0.0, 10)) is None
    assert fit_image_probe(torch.ones(9, 6), torch.ones(9, 6)) is None


def test_a_wide_network_is_weighed_by_its_strongest_features():
    fit = fit_image_probe(images(12, 30.0, 11, channels=500), images(20, 0.0, 12, channels=500))
    assert len(fit.places) == image.LARGEST
    assert set(range(5)) <= set(fit.places)
    assert len(json.dumps(fit.to_card())) < 32_000


@pytest.mark.parametrize(
    ("concept", "others", "said"),
    [
        (images(7), images(20), "7 images with the concept; expected at least 8"),
        (images(20), images(3), "3 images of other things; expected at least 8"),
        (images(20) * float("nan"), images(20), "not finite"),
    ],
)
def test_too_few_or_broken_images_are_refused(concept, others, said):
    with pytest.raises(ValueError, match=said):
        fit_image_probe(concept, others)


def test_a_card_gives_the_same_probe_back(probe):
    assert ImageProbe.from_card(json.loads(json.dumps(probe.to_card()))) == probe


def test_the_features_of_another_network_are_refused(probe):
    with pytest.raises(ValueError, match="for 60 features and the model has 63"):
        probe.score(torch.zeros(1, 63))


DAMAGED = {
    "NaN": {"weights": [float("nan")] * 60},
    "a weight too few": {"weights": [1.0] * 59},
    "far too many": {"weights": [1.0] * 100_000, "places": list(range(100_000))},
    "weights that are none": {"weights": 3},
    "infinite offset": {"offset": float("inf")},
    "no offset": {"offset": None},
    "a huge network": {"width": 10**9},
    "no multiple of three": {"width": 61},
    "places outside": {"width": 57},
    "a place twice": {"places": [0] * 60},
    "places in words": {"places": ["a"] * 60},
    "a negative place": {"places": list(range(-1, 59))},
    "one count of images": {"images": [1]},
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_card_is_refused(damage, probe):
    with pytest.raises(ValueError, match=r"image probe is damaged .*; calibrate the adapter anew"):
        ImageProbe.from_card({**probe.to_card(), **damage})
    missing = {name: value for name, value in probe.to_card().items() if name not in damage}
    with pytest.raises(ValueError, match="image probe is damaged"):
        ImageProbe.from_card(missing)


def test_a_probe_that_is_no_probe_cannot_be_made(probe):
    with pytest.raises(ValueError, match="expected as many of either"):
        replace(probe, weights=())
