"""A calibration made outside of ComfyUI: the same figures as the host's, and the host's gate goes by it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from demo.captions import words_for
from demo.erasure import LORAS, narrowed, path_of
from experiments.narrow import with_prefix
from tests.conftest import pack_module
from tests.host.conftest import Demo, Observer, guided, ksampler, load, without_text
from tests.train.conftest import put_on
from unguide_core.adapter import Adapter
from unguide_core.formats import load_adapter
from unguide_core.probe.calibration import PROBED_STEPS, Calibration, CalibrationPrompts
from unguide_core.training.rollout import Denoiser
from unguide_train import job
from unguide_train.calibration import calibrate
from unguide_train.config import from_values
from unguide_train.job import train_concept
from unguide_train.model import DiffusersPredictor, load_base

SHAPE = (4, 8, 8)
TARGET = "a photo of the cat"
OTHERS = ["", *(f"a photo of the {word}" for word in ("dog", "bird", "ship", "truck", "forest", "sea", "deer"))]


def decided(demo: Demo, lora: Any, prompt: str) -> Any:
    """What the host's gate decides with its defaults, at its step of the image."""
    observer = Observer()
    with torch.inference_mode():
        model = guided(demo.model, lora, observer=observer)
        ksampler(model, demo.encode(prompt), demo.encode(""), steps=20, last_step=3)
    return observer.decision


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    """The shipped cat, for the narrow model."""
    shipped = load_adapter(path_of(LORAS, "selective", "cat"))
    return replace(shipped, layers=with_prefix(narrowed(shipped)))


@pytest.fixture(scope="module")
def found(adapter, checkpoint, tokenizer) -> Calibration:
    with torch.inference_mode(False):
        base = load_base(checkpoint, tokenizer)
        put_on(base.unet, adapter)
        own = [f"a photo of the {word}" for word in words_for("cat")[1:2]]
        predict = DiffusersPredictor(base.unet, base.encode([TARGET, *own, *OTHERS]))
        prompts = CalibrationPrompts(TARGET, own, OTHERS)
        return calibrate(adapter, Denoiser(predict, "", 16), base.hash, prompts, prompts, SHAPE)


def test_its_figures_are_those_that_the_host_measured(found: Calibration, adapter: Adapter) -> None:
    """With the shipped model and adapter: the narrow ones do the same."""
    shipped = Calibration.from_card(adapter.card.calibration)
    assert shipped is not None
    assert (found.adapter, found.latent, found.cfg) == (adapter.signature, shipped.latent, shipped.cfg)
    assert len(found.levels["influence"]) == len(PROBED_STEPS)
    for sigma in (9.0, 7.0):
        here, there = found.at("influence", sigma), shipped.at("influence", sigma)
        assert here is not None
        assert there is not None
        assert here.baseline == pytest.approx(there.baseline, rel=0.15)
        assert here.others.mean < 0.3
        assert here.concept.mean > 0.8
    assert found.text is not None
    assert shipped.text is not None
    assert found.text.direction == pytest.approx(shipped.text.direction, rel=1e-2, abs=1e-4)
    assert found.text.norm == pytest.approx(shipped.text.norm, rel=1e-3)
    aligned = found.levels["alignment"][1]
    assert aligned.baseline == 1.0
    assert aligned.concept.mean > 2 * aligned.others.mean


def test_the_hosts_gate_goes_by_it_where_nothing_patches_the_model(found: Calibration, demo) -> None:
    text_lora = load("selective", "cat", demo)
    card = replace(text_lora.adapter.card, calibration=found.to_card())
    whole = replace(text_lora, adapter=replace(text_lora.adapter, card=card), concept=None)
    assert decided(demo, whole, TARGET).statistic == "text"
    lora, detected = without_text(whole), {}
    for prompt in (TARGET, "a photo of the dog"):
        decision = decided(demo, lora, prompt)
        assert decision.statistic == "influence"
        detected[prompt] = decision.detected
    assert list(detected.values()) == [True, False]
    matches_model, patched = pack_module("unguide_comfy.model.key").matches_model, demo.model.clone()
    assert matches_model(found.model, demo.model, "")
    patched.add_object_patch("model_sampling", patched.get_model_object("model_sampling"))
    assert not matches_model(found.model, patched, "")


def test_what_was_trained_is_not_lost_where_memory_runs_out_in_its_calibration(settings, monkeypatch, caplog) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(job, "calibrate", full)
    quick = {"preset": "paper", "recipe": {"iterations": 1, "schedule_steps": 10}}
    config = from_values({**settings, **quick, "calibrate": True})
    card = load_adapter(job.train_concept(config, config.concepts[0], quiet=True).path).card
    assert card.calibration == {}
    assert "is trained, but not calibrated (no room)" in caplog.text


def test_a_trained_adapters_card_is_calibrated(settings, monkeypatch) -> None:
    """On few prompts: what it costs is per prompt."""
    prompts = job.calibration_prompts
    for name in ("calibration_prompts", "text_calibration_prompts"):
        monkeypatch.setattr(job, name, lambda *given: (prompts(*given)[0][:1], prompts(*given)[1][:8]))
    quick = {"calibrate": True, "kept": [""], "recipe": {**settings["recipe"], "iterations": 2}}
    config = from_values({**settings, **quick})
    card = load_adapter(train_concept(config, config.concepts[0], quiet=True).path).card
    calibration = Calibration.from_card(card.calibration)
    assert calibration is not None
    assert calibration.model == card.base_hash
    assert calibration.levels["influence"][0].others.count == 8
    assert calibration.text is not None
    assert calibration.text.text.others.count == 8
