"""The text stage of the gate: decided by the prompt's text before the first step, at no evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import nodes as host
from tests.conftest import pack_module
from tests.host.conftest import CAT, UNRELATED, Demo, Observer, guided, ksampler, latent, load, settings, without_text

calibrate, stages = pack_module("unguide_comfy.probe.calibrate"), pack_module("unguide_comfy.gate.stages")
probe_node = pack_module("nodes.probe").StabilityProbe
STEPS = 2
BIRD = "a photo of the bird"


@pytest.fixture
def bird_lora(demo: Demo) -> Any:
    """An erasure LoRA of whose concept the norm of the text tells."""
    return load("selective", "bird", demo)


def sampled(model: Any, positive: Any, demo: Demo, **sampling: Any) -> torch.Tensor:
    return ksampler(model, positive, demo.encode(""), **{"steps": STEPS, **sampling})


def run(demo: Demo, lora: Any, positive: Any, settings: dict[str, Any] | None = None, **sampling: Any):
    """An image behind the gate, and the observer of its run."""
    observer = Observer()
    model = guided(demo.model, lora, observer=observer, **(settings or {}))
    positive = demo.encode(positive) if isinstance(positive, str) else positive
    return sampled(model, positive, demo, **sampling), observer


def with_scores(lora: Any, lower: float, upper: float) -> Any:
    """An erasure LoRA whose text stage has other thresholds."""
    calibration = lora.adapter.card.calibration
    spread = {"mean": 0.0, "std": 0.0, "count": 9}
    weakest = upper / 0.75
    strongest = (lower / weakest**0.25) ** (4 / 3)
    others, concept = ({**spread, "tail": [value] * 6} for value in (strongest, weakest))
    text = {**calibration["text"], "text": {"concept": concept, "others": others}}
    card = replace(lora.adapter.card, calibration={**calibration, "text": text})
    return replace(lora, adapter=replace(lora.adapter, card=card))


@pytest.mark.parametrize("prompt", UNRELATED[:2])
def test_a_prompt_without_the_concept_is_plain_sampling_bit_for_bit_and_evaluation_for_evaluation(
    prompt, demo, text_lora
):
    image, observer = run(demo, text_lora, prompt, batch=2)
    assert torch.equal(image, sampled(demo.model, demo.encode(prompt), demo, batch=2))
    assert observer.cost.evaluations == {"base": 2 * STEPS, "adapted": 0, "probe": 0, "wasted": 0}
    assert [decision.stage for decision in observer.verdicts[0].decisions] == ["text", "text"]
    assert (observer.decision.detected, observer.decision.step) == (False, None)


@pytest.mark.parametrize("prompt", [CAT, "a photo of the kitty", "a cat in the forest"])
def test_the_concept_is_erased_from_the_first_step_at_no_more_than_plain_sampling(prompt, demo, text_lora):
    image, observer = run(demo, text_lora, prompt)
    erased, _ = run(demo, text_lora, prompt, {"decide": "always erase"})
    assert torch.equal(image, erased)
    assert observer.cost.evaluations == {"base": 0, "adapted": 2 * STEPS, "probe": 0, "wasted": 0}
    assert observer.decision.statistic == "text"


def test_a_single_step_is_decided_before_it(demo, text_lora):
    image, observer = run(demo, text_lora, CAT, steps=1)
    assert torch.equal(image, run(demo, text_lora, CAT, {"decide": "always erase"}, steps=1)[0])
    assert observer.cost.total == observer.cost.plain


def test_a_prompt_between_the_thresholds_is_decided_by_the_trajectory_as_without_a_text_stage(demo, text_lora):
    between = with_scores(text_lora, 0.03, 9.0)
    for prompt in (CAT, UNRELATED[0]):
        image, observer = run(demo, between, prompt)
        expected, without = run(demo, without_text(text_lora), prompt)
        assert torch.equal(image, expected)
        assert observer.cost.evaluations == without.cost.evaluations
        assert [one.name for one in observer.decision.statistics] == ["influence", "text"]
        assert observer.decision.statistics[0] == without.decision.statistics[0]


@pytest.mark.parametrize("decide", ["during sampling", "before sampling"])
def test_the_concept_in_any_entry_of_the_conditioning_counts(decide, demo, text_lora):
    other = demo.encode(UNRELATED[2])
    (area,) = host.ConditioningSetArea().append(demo.encode(CAT), 32, 64, 0, 32, 1.0)
    late = [[text, {**options, "start_percent": 0.6}] for text, options in demo.encode(CAT)]
    weak = [[text, {**options, "strength": 0.2}] for text, options in demo.encode(CAT)]
    for positive in (other + area, late + other, other + weak, host.ConditioningCombine().combine(other, late)[0]):
        _, observer = run(demo, text_lora, positive, {"decide": decide}, steps=1)
        assert (observer.decision.detected, observer.decision.stage) == (True, "text")
        assert observer.cost.evaluations["probe"] == 0


def test_the_negative_prompt_counts_where_guidance_pulls_towards_it(demo, text_lora):
    for cfg, detected in ((0.5, True), (4.0, False)):
        observer = Observer()
        model = guided(demo.model, text_lora, observer=observer)
        ksampler(model, demo.encode(UNRELATED[0]), demo.encode(CAT), steps=1, cfg=cfg)
        assert (observer.decision.detected, observer.decision.stage) == (detected, "text")


def test_samples_of_a_batch_are_decided_one_by_one(demo, text_lora):
    ((cat, options),), ((dog, _),) = demo.encode(CAT), demo.encode(UNRELATED[0])
    positive = [[torch.cat([cat, dog]), {**options, "pooled_output": None}]]
    erased, observer = run(demo, text_lora, positive, batch=2)
    image = sampled(demo.model, positive, demo, batch=2)
    assert observer.verdicts[0].weights == (0.0, 1.0)
    assert torch.equal(erased[1], image[1])
    assert (erased[0] - image[0]).norm() > 0.1 * image[0].norm()


def test_a_batch_whose_samples_different_stages_decide_keeps_the_text_stages_decisions(demo, text_lora):
    """The cat's score is between the thresholds, the dog's below the lower one."""
    ((cat, options),), ((dog, _),) = demo.encode(CAT), demo.encode(UNRELATED[0])
    positive = [[torch.cat([cat, dog]), {**options, "pooled_output": None}]]
    erased, observer = run(demo, with_scores(text_lora, 0.9, 9.0), positive, batch=2)
    assert [decision.stage for decision in observer.verdicts[0].decisions] == ["trajectory", "text"]
    assert observer.verdicts[0].weights == (0.0, 1.0)
    assert torch.equal(erased[1], sampled(demo.model, positive, demo, batch=2)[1])


def test_each_of_several_adapters_is_decided_by_the_first_stage_that_can(demo, text_lora):
    dog = with_scores(load("selective", "dog", demo), 0.03, 9.0)
    _, observer = run(demo, (text_lora, dog, load("selective", "ship", demo)), UNRELATED[0])
    assert [verdict.decision.stage for verdict in observer.verdicts] == ["text", "trajectory", "text"]
    assert [verdict.decision.detected for verdict in observer.verdicts] == [False, True, False]


def test_ten_idle_adapters_cost_nothing(demo):
    loras = tuple(load("selective", concept, demo) for concept in pack_module("demo.captions").CLASSES)
    image, observer = run(demo, loras, "a photo of the forest")
    assert torch.equal(image, sampled(demo.model, demo.encode("a photo of the forest"), demo))
    assert observer.cost.total == observer.cost.plain
    assert not any(verdict.decision.detected for verdict in observer.verdicts)


@pytest.mark.parametrize(
    "chosen",
    [{"statistic": "influence"}, {"threshold": 0.4}, {"decide": "always erase"}],
    ids=lambda chosen: next(iter(chosen)),
)
def test_another_statistic_threshold_or_way_to_decide_takes_its_place(chosen, demo, text_lora):
    _, observer = run(demo, text_lora, CAT, chosen, steps=1)
    assert not any(one.name == "text" for decision in observer.verdicts[0].decisions for one in decision.statistics)


def test_probing_again_asks_the_trajectory_where_the_text_has_not_detected(demo, text_lora):
    _, observer = run(demo, text_lora, UNRELATED[0], {"recheck_every": 2})
    assert observer.cost.evaluations["probe"] > 0
    assert run(demo, text_lora, CAT, {"recheck_every": 2})[1].cost.evaluations["probe"] == 0


def test_resistance_detects_by_the_texts_norm_too_and_lets_no_text_clear_a_prompt(demo, bird_lora):
    resisting = {"resist_adversarial": True}
    _, observer = run(demo, bird_lora, UNRELATED[2], resisting)
    assert (observer.decision.stage, observer.decision.detected) == ("trajectory", False)
    assert observer.cost.evaluations["probe"] > 0
    _, observer = run(demo, bird_lora, BIRD, resisting)
    assert (observer.decision.stage, observer.decision.detected) == ("text", True)
    assert {one.name for one in observer.decision.statistics} == {"text", "text norm"}


def test_text_that_turns_away_from_the_concepts_direction_is_detected_by_its_norm(demo, bird_lora):
    text_probe = pack_module("unguide_comfy.probe.text")
    match = pack_module("unguide_comfy.lora.match").match
    ((states, options),) = demo.encode(BIRD)
    seen = text_probe.text_map_of(demo.model, match(bird_lora.adapter, demo.model.model, "bird").layers)
    turned = states - 2.0 * (states @ seen.T) @ torch.linalg.pinv(seen).T
    _, observer = run(demo, bird_lora, [[turned, options]], {"resist_adversarial": True}, steps=1)
    assert (observer.decision.statistic, observer.decision.detected) == ("text norm", True)
    assert not run(demo, bird_lora, [[turned, options]], steps=1)[1].decision.detected


def test_an_adapter_with_a_layer_that_reads_more_than_text_has_no_text_stage(demo, text_lora):
    layers = dict(text_lora.adapter.layers)
    path = next(name for name in layers if name.endswith("attn2.to_k")).replace("to_k", "to_q")
    core = pack_module("unguide_core.adapter")
    width = layers[path.replace("to_q", "to_k")].up.shape[0]
    layers[path] = core.LowRank(torch.zeros(1, width), torch.zeros(width, 1))
    lora = replace(text_lora, adapter=replace(text_lora.adapter, layers=layers))
    assert calibrate.calibrate_text(demo.model, demo.clip, lora) is lora


def test_the_text_stage_is_calibrated_without_an_evaluation_and_keeps_what_is_known(demo, text_lora):
    bare = replace(text_lora, adapter=replace(text_lora.adapter, card=replace(text_lora.adapter.card, calibration={})))
    alone = calibrate.calibrate_text(demo.model, demo.clip, bare)
    for prompt, detected in ((CAT, True), (UNRELATED[2], False)):
        _, observer = run(demo, alone, prompt, steps=1)
        assert (observer.decision.stage, observer.decision.detected) == ("text", detected)
    own, other = ([demo.encode(text) for text in texts] for texts in ((CAT, "a cat"), UNRELATED))
    prompts = pack_module("unguide_core.probe.calibration").CalibrationPrompts(own[0], own[1:], other)
    again = calibrate.with_text_calibration(demo.model, without_text(text_lora), prompts).adapter.card.calibration
    shipped = text_lora.adapter.card.calibration
    assert json.loads(json.dumps(again["levels"])) == shipped["levels"]
    assert again["text"]["direction"] == pytest.approx(shipped["text"]["direction"], rel=1e-3, abs=1e-6)


def test_a_calibration_of_another_adapter_or_model_is_not_used(demo, text_lora):
    for key in ("adapter", "model"):
        calibration = {**text_lora.adapter.card.calibration, key: "another"}
        card = replace(text_lora.adapter.card, calibration=calibration)
        lora = replace(text_lora, adapter=replace(text_lora.adapter, card=card))
        assert run(demo, lora, CAT, steps=1)[1].decision.stage == "trajectory"


def test_the_stability_probe_decides_by_text_and_shows_every_statistic(demo, text_lora):
    for prompt, detected in ((CAT, True), (UNRELATED[0], False)):
        out = probe_node.execute(demo.model, (text_lora,), demo.encode(prompt), demo.encode(""), latent(), 4.0, 0).args
        ((decision,), weight, _, found, _, _, report) = out
        assert (decision.stage, found, weight) == ("text", detected, float(not detected))
        assert [one.name for one in decision.statistics] == ["text", "influence", "alignment", "paper"]
        (erasure,) = json.loads(report)["erasure"]
        assert (erasure["decision"]["stage"], erasure["detected"]) == ("text", detected)
        assert erasure["decision"]["statistics"][0]["lower"] == decision.statistics[0].lower


def test_the_same_prompt_gives_the_same_decision_whatever_ran_before(demo, text_lora):
    first = run(demo, text_lora, CAT)[1].decision
    run(demo, text_lora, UNRELATED[0])
    assert run(demo, text_lora, CAT)[1].decision == first
    assert run(demo, text_lora, CAT, seed=99)[1].decision == first


def test_the_rate_is_for_the_image_however_many_adapters_are_on_the_model(demo, text_lora):
    others = tuple(load("selective", concept, demo) for concept in ("dog", "ship", "frog"))
    for lora, name, bound in ((text_lora, "text", "lower"), (without_text(text_lora), "influence", "threshold")):
        alone, together = (
            run(demo, loras, CAT, steps=1)[1].verdicts[0].decision.statistics[0] for loras in ((lora,), (lora, *others))
        )
        assert (alone.name, together.name) == (name, name)
        assert getattr(together, bound) > getattr(alone, bound)


def test_settings_offer_no_text_statistic_because_it_decides_first_wherever_it_is_calibrated():
    with pytest.raises(ValueError, match="statistic is 'text'; expected one of automatic"):
        settings(statistic="text")


def test_the_cascade_asks_the_text_before_the_trajectory():
    assert [stage.name for stage in stages.STAGES] == ["text", "trajectory"]
