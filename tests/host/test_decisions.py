"""How the demo's gate comes to a decision: which statistic, against which threshold, compared with what."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import comfy.hooks
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_pag import PerturbedAttentionGuidance

from experiments.studio import lora_patches
from tests.conftest import pack_module
from tests.host.conftest import (
    CAT,
    LORA,
    UNRELATED,
    Demo,
    Observer,
    guided,
    ksampler,
    latent,
    load,
    settings,
    without_text,
)

baseline, keys = pack_module("unguide_comfy.probe.baseline"), pack_module("unguide_comfy.model.key")
probe_node = pack_module("nodes.probe").StabilityProbe
verdict_line = pack_module("unguide_comfy.report.text").verdict_line
TO_THE_PROBE = {"steps": 20, "last_step": 3}
"""The steps of an image up to the probe."""


def decided(demo: Demo, lora: Any, prompt: str, negative: str = "", cfg: float = 4.0, **chosen: Any) -> Observer:
    """A run up to the probe; the settings are chosen."""
    observer = Observer()
    model = guided(demo.model, lora, observer=observer, **chosen)
    ksampler(model, demo.encode(prompt), demo.encode(negative), cfg=cfg, **TO_THE_PROBE)
    return observer


def decision(demo: Demo, lora: Any, prompt: str, *arguments: Any, **chosen: Any) -> Any:
    return decided(demo, lora, prompt, *arguments, **chosen).decision


def without_clip(lora: Any) -> Any:
    return dataclasses.replace(lora, concept=None, neutral=None)


def without_calibration(lora: Any) -> Any:
    card = dataclasses.replace(lora.adapter.card, calibration={})
    return dataclasses.replace(lora, adapter=dataclasses.replace(lora.adapter, card=card))


# which statistic


def test_a_calibrated_adapter_is_decided_by_influence_and_has_a_map(demo, demo_lora):
    found = decision(demo, demo_lora, CAT)
    assert [statistic.name for statistic in found.statistics] == ["influence"]
    assert 0.0 < found.threshold < 0.68
    assert found.influence_map.shape == (8, 8)
    # relative to the mean effect on the concept's own prompt
    assert 0.5 < float(found.influence_map.square().mean().sqrt()) < 1.5


def test_an_adapter_without_a_calibration_is_decided_by_alignment(demo, demo_lora):
    found = decision(demo, without_calibration(demo_lora), CAT)
    assert [statistic.name for statistic in found.statistics] == ["alignment"]
    assert found.threshold == 0.5
    assert found.detected
    assert found.influence_map is None
    assert "not calibrated" in found.reason


def test_alignment_decides_where_an_adapter_acts_on_other_prompts_as_well(demo):
    lora = load("paper", "airplane", demo)
    assert lora.adapter.card.calibration
    assert decision(demo, lora, "a photo of the airplane").statistic == "alignment"


def test_influence_decides_where_it_separates_badly_and_alignment_misses_more(demo):
    found = decision(demo, load("paper", "cat", demo), CAT)
    assert found.statistic == "influence"
    assert found.detected


def test_without_a_clip_the_calibration_decides(demo, demo_lora):
    for prompt, expected in ((CAT, True), (UNRELATED[2], False)):
        found = decision(demo, without_clip(demo_lora), prompt)
        assert found.statistic == "influence"
        assert found.detected is expected


def test_with_neither_the_papers_rule_decides_and_the_node_warns(demo, demo_lora, caplog):
    observer = decided(demo, without_calibration(without_clip(demo_lora)), CAT)
    assert observer.decision.statistic == "paper"
    assert "the negative prompt stands in for the neutral one" in observer.decision.reason
    assert "the concept's own prompt in Load Erasure LoRA: connect a CLIP to it" in observer.decision.reason
    assert verdict_line(observer.verdicts, finished=True).text == "weak gate: erased cat"
    (said,) = [record for record in caplog.records if "weak gate" in record.getMessage()]
    assert said.levelname == "WARNING"


def test_a_chosen_statistic_and_threshold_are_taken(demo, demo_lora):
    for statistic, threshold in (("alignment", 2.0), ("influence", 0.01)):
        found = decision(demo, demo_lora, CAT, statistic=statistic, threshold=threshold)
        assert (found.statistic, found.threshold) == (statistic, threshold)
        assert found.detected is (threshold < 1.0)
        assert f"{statistic}, as chosen" in found.reason


def test_a_threshold_of_zero_detects_every_prompt(demo, demo_lora):
    chosen = pack_module("nodes.settings").UnGuideSettings.execute(threshold="0", statistic="influence")[0]
    assert chosen == settings(threshold=0.0, statistic="influence")
    assert decision(demo, demo_lora, UNRELATED[2], statistic="influence", threshold=0.0).detected


def test_a_higher_false_positive_rate_lowers_the_threshold(demo, demo_lora):
    rates = (0.003, 0.01, 0.1)
    thresholds = [decision(demo, demo_lora, CAT, false_positive_rate=rate).threshold for rate in rates]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[0] > thresholds[-1]


def test_the_node_reports_every_statistic(demo, demo_lora):
    prompts = demo.encode(CAT), demo.encode("")
    decisions, weight, score, detected, plot, report, content = probe_node.execute(
        demo.model, (demo_lora,), *prompts, latent(), 4.0, 0
    ).args
    assert [statistic.name for statistic in decisions[0].statistics] == ["influence", "alignment", "paper"]
    assert (weight, detected) == (0.0, True)
    assert score == decisions[0].score
    assert plot.ndim == 4
    assert plot.shape[3] == 3
    assert 0.0 <= float(plot.min()) < float(plot.max()) <= 1.0
    assert report.startswith("Detected 'cat' before the first step; ")
    content = json.loads(content)
    (erasure,) = content["erasure"]
    assert (erasure["erasure_lora"], erasure["detected"], erasure["step"]) == (LORA, True, None)
    assert [statistic["name"] for statistic in erasure["decision"]["statistics"]] == ["influence", "alignment", "paper"]
    assert content["model_evaluations"]["probe"] > 0
    assert content["model_evaluations_ratio"] is None


# what the prompt is compared with


def test_a_baseline_is_measured_once_and_remembered(demo, demo_lora):
    baseline.memory.clear()
    lora = without_calibration(demo_lora)
    first, second = (decided(demo, lora, CAT, statistic="influence") for _ in range(2))
    assert first.cost.evaluations["probe"] > second.cost.evaluations["probe"] == 1
    assert first.decision == second.decision
    assert len(baseline.memory) == 1


def test_what_is_remembered_is_bounded_and_what_has_no_key_is_measured_each_time():
    memory, measured = baseline.Memory(size=2), []

    def value(number: int) -> tuple[float, ...]:
        measured.append(number)
        return (float(number),)

    for number in (0, 1, 2, 2, 0):
        assert memory.get((number,), lambda number=number: value(number)) == (float(number),)
    assert measured == [0, 1, 2, 0]
    assert len(memory) == 2
    for _ in range(2):
        memory.get(None, lambda: value(9))
    assert measured == [0, 1, 2, 0, 9, 9]


def test_a_decision_does_not_depend_on_what_ran_before(demo, demo_lora):
    """The baseline is measured under the run's own guidance: here at cfg 7.5, away from the concept."""
    lora = without_calibration(demo_lora)
    patched = Demo(PerturbedAttentionGuidance.execute(demo.model, 2.0)[0], demo.clip, demo.vae)

    def found(model: Demo = demo, **changed: Any) -> Any:
        return decision(model, lora, CAT, statistic="influence", **{"negative": CAT, "cfg": 7.5, **changed})

    baseline.memory.clear()
    fresh = found()
    baseline.memory.clear()
    other, *_ = found(negative=""), found(cfg=1.0), found(patched)
    assert found() == fresh
    assert fresh.statistics[0].concept != other.statistics[0].concept


def test_the_calibrated_baseline_is_what_a_measurement_gives(demo, demo_lora):
    calibrated = decision(demo, demo_lora, CAT, statistic="influence")
    chosen = {"statistic": "influence", "threshold": calibrated.threshold}
    measured = decision(demo, without_calibration(demo_lora), CAT, **chosen)
    assert len(calibrated.statistics[0].concept) == 1
    assert len(measured.statistics[0].concept) == baseline.REPEATS
    assert measured.score == pytest.approx(calibrated.score, rel=0.15)


def test_another_guidance_scale_keeps_the_threshold_and_measures_the_baseline(demo, demo_lora):
    found = decision(demo, demo_lora, CAT, cfg=5.0)
    assert found.statistic == "influence"
    assert found.detected
    assert found.threshold == decision(demo, demo_lora, CAT).threshold
    assert "the baseline is calibrated for cfg 4.0, and measured for 5.0" in found.reason
    assert len(found.statistics[0].concept) == baseline.REPEATS


def test_a_baseline_calibrated_for_another_size_is_not_used(demo, demo_lora):
    image = {"samples": torch.zeros(1, 4, 8, 16)}
    for lora, statistic in ((demo_lora, "influence"), (without_clip(demo_lora), "paper")):
        observer = Observer()
        model = guided(demo.model, lora, observer=observer)
        ksampler(model, demo.encode(CAT), demo.encode(""), image, **TO_THE_PROBE)
        assert observer.decision.statistic == statistic
        assert "calibrated for latent [4, 8, 8], and measured for [4, 8, 16]" in observer.decision.reason


# for which model a calibration holds


def with_a_lora(demo: Demo, strength: float = 0.01) -> Any:
    lora = without_text(load("selective", "ship", demo))
    return comfy.sd.load_lora_for_models(demo.model, None, lora_patches(lora.adapter), strength, 0.0)[0]


def with_a_wrapper(demo: Demo) -> Any:
    model = demo.model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", lambda executor, *args, **kw: executor(*args, **kw))
    return model


def with_a_wrapper_in_its_options(demo: Demo) -> Any:
    model = demo.model.clone()
    wrappers = {WrappersMP.DIFFUSION_MODEL: {"test": [lambda executor, *args, **kw: executor(*args, **kw)]}}
    model.model_options["transformer_options"]["wrappers"] = wrappers
    return model


def with_an_attention_patch(demo: Demo) -> Any:
    model = demo.model.clone()
    model.set_model_attn2_patch(lambda q, k, v, extra_options: (q, k, v))
    return model


def with_a_function_around_the_network(demo: Demo) -> Any:
    model = demo.model.clone()
    model.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    return model


def with_a_replaced_object(demo: Demo) -> Any:
    model = demo.model.clone()
    forward = model.model.diffusion_model.forward
    model.add_object_patch("diffusion_model.forward", lambda *args, **kw: forward(*args, **kw))
    return model


PATCHED = [
    with_a_lora,
    with_a_wrapper,
    with_a_wrapper_in_its_options,
    with_an_attention_patch,
    with_a_function_around_the_network,
    with_a_replaced_object,
]


@pytest.mark.parametrize("patched", PATCHED, ids=lambda patched: patched.__name__)
def test_a_calibration_is_not_used_for_a_patched_model_and_the_report_says_so(patched, demo, demo_lora):
    model = patched(demo)
    assert keys.model_key(model) != keys.model_key(demo.model)
    found = decision(Demo(model, demo.clip, demo.vae), demo_lora, CAT)
    assert found.statistic == "alignment"
    assert "the calibration is for another model" in found.reason


def test_a_model_that_a_calibration_names_by_its_weights_is_hashed_before_sampling(demo, demo_lora, monkeypatch):
    """Inside a step it would take long, without progress and deaf to Cancel."""
    card = demo_lora.adapter.card
    card = dataclasses.replace(card, calibration={**card.calibration, "model": keys.base_hash(demo.model)})
    lora = dataclasses.replace(demo_lora, adapter=dataclasses.replace(demo_lora.adapter, card=card))
    keys._hashes.pop(demo.model.model, None)
    observer = Observer()
    model = guided(demo.model, lora, observer=observer)
    monkeypatch.setattr(keys, "weights_hash", None)
    ksampler(model, demo.encode(CAT), demo.encode(""), **TO_THE_PROBE)
    assert observer.decision.statistic == "influence"


@pytest.mark.parametrize("hooked", ["positive", "negative"])
def test_a_calibration_is_not_used_where_hooks_change_the_model(hooked, demo, demo_lora):
    ship = without_text(load("selective", "ship", demo))
    hooks = comfy.hooks.create_hook_lora(lora_patches(ship.adapter), 1.0, 0.0)
    prompts = {"positive": demo.encode(CAT), "negative": demo.encode("")}
    prompts[hooked] = comfy.hooks.set_hooks_for_conditioning(prompts[hooked], hooks)
    observer = Observer()
    model = guided(demo.model, demo_lora, observer=observer)
    ksampler(model, **prompts, **TO_THE_PROBE)
    assert observer.decision.statistic == "alignment"
    assert "the calibration is for the model without the hooks on the conditioning" in observer.decision.reason


def test_a_models_key_survives_loading_and_tells_patches_and_their_strength_apart(demo):
    before = keys.model_key(demo.model)
    patched, stronger = with_a_lora(demo), with_a_lora(demo, strength=0.02)
    key = keys.model_key(patched)
    for model in (demo.model, patched):
        ksampler(model, demo.encode(CAT), demo.encode(""), steps=1)
    assert keys.model_key(demo.model) == before
    assert keys.model_key(patched) == key
    assert len({before, key, keys.model_key(stronger)}) == 3
    assert keys.model_key(guided(demo.model, load("selective", "cat", demo))) == before


def test_prompts_that_name_the_concept_of_a_file_without_metadata_do_not_count_as_others(demo, demo_lora):
    """Its word is known from the prompt in the loader alone."""
    calibrate = pack_module("unguide_comfy.probe.calibrate")
    card = dataclasses.replace(without_calibration(demo_lora).adapter.card, concept="", target="", synonyms=())
    lora = dataclasses.replace(demo_lora, adapter=dataclasses.replace(demo_lora.adapter, card=card))
    others = ("a cat on a sofa", "two cats", "a photo of the dog", "a photo of the sea")
    found = calibrate._encoded_prompts(list, lora, (), others)
    assert ["".join(prompt) for prompt in found.others] == ["", *others[2:]]
    with pytest.raises(ValueError, match="no prompt without the concept 'a photo of the cat'; add some"):
        calibrate._encoded_prompts(list, lora, (), others[:2])


def test_calibrating_an_adapter_gives_it_thresholds_that_work(demo, demo_lora):
    """A small calibration by the node, on few prompts: enough to tell the concept from them."""
    execute = pack_module("nodes.calibrate").CalibrateErasureLora.execute
    others = "a photo of the dog\na photo of the ship\na photo of the forest"
    bare = without_calibration(demo_lora)
    (lora,), text = execute(demo.model, demo.clip, (bare,), latent(), 4.0, "a photo of the kitty", others, 2, 0).args
    assert json.loads(text)[LORA]["model"] == keys.model_key(demo.model)
    assert lora.adapter.layers is bare.adapter.layers
    assert decision(demo, lora, CAT).statistic == "text"
    for prompt, expected in ((CAT, True), ("a photo of the bird", False)):
        whole, by_influence = decision(demo, lora, prompt), decision(demo, without_text(lora), prompt)
        assert by_influence.statistic == "influence"
        assert whole.detected is by_influence.detected is expected
