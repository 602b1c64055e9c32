"""The end of a training: an adapter that is complete, and never lost to a calibration that fails."""

from __future__ import annotations

import pytest
import torch

from unguide_core.adapter import Adapter, Card
from unguide_core.probe.calibration import Calibration
from unguide_core.training.finish import finish
from unguide_core.training.prompts import Pair, TrainingPrompts
from unguide_core.training.recipe import Recipe
from unguide_core.training.trainer import Training, fresh_layers

CARD = Card(concept="cat", settings={"layers": "object", "seed": "kept"})


class Cancelled(BaseException):
    """What a host raises where its user cancels."""


@pytest.fixture
def training() -> Training:
    recipe = Recipe(rank=2, alpha=4.0)
    layers = fresh_layers({"lora_unet_to_k": (6, 4)}, recipe)
    return Training(None, layers, TrainingPrompts((Pair("cat", "forest"),)), recipe, (4, 8, 8))


def failing(error: BaseException):
    def calibrate(adapter: Adapter) -> Calibration:
        raise error

    return calibrate


def test_the_adapter_holds_detached_copies_of_the_layers_and_its_card_says_how_it_was_trained(training):
    adapter = finish(training, CARD, None, log=pytest.fail)
    layer, trained = adapter.layers["lora_unet_to_k"], training.layers["lora_unet_to_k"]
    assert not layer.down.requires_grad
    assert torch.equal(layer.down, trained.down)
    assert layer.down.data_ptr() != trained.down.data_ptr()
    assert (adapter.card.concept, adapter.card.rank, adapter.card.alpha) == ("cat", 2, 4.0)
    assert adapter.card.settings == {**training.settings, "layers": "object", "seed": "kept"}
    assert adapter.card.calibration == {}


def test_the_calibration_is_stored_in_the_card(training):
    found = Calibration("model", "adapter", (4, 8, 8), 4.0, 8, {})
    seen = []
    adapter = finish(training, CARD, lambda adapter: seen.append(adapter) or found, log=pytest.fail)
    assert Calibration.from_card(adapter.card.calibration) == found
    assert seen[0].signature == adapter.signature


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("too few prompts"), "too few prompts"),
        (torch.OutOfMemoryError("no room"), "no room"),
        (Cancelled(), "it was cancelled"),
    ],
)
def test_a_calibration_that_fails_or_is_cancelled_leaves_the_adapter_uncalibrated_and_says_why(training, error, reason):
    said: list[str] = []
    adapter = finish(training, CARD, failing(error), interrupted=(Cancelled,), log=said.append)
    assert adapter.card.calibration == {}
    assert said == [f"cat is trained, but not calibrated ({reason}); use Calibrate Erasure LoRA"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("cat"), Cancelled()])
def test_other_errors_are_raised(training, error):
    with pytest.raises(type(error)):
        finish(training, CARD, failing(error), log=pytest.fail)
