"""The gate on the trained demo model: what it finds, what it leaves alone, what it reports."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom

import nodes as host
from tests.conftest import pack_module
from tests.host.conftest import LORA, Demo

CONCEPT, SYNONYMS = "a photo of the cat", ("a photo of the kitty", "a photo of the feline", "a photo of the housecat")
UNRELATED = ("a photo of the dog", "a photo of the ship", "a photo of the forest", "")
STEPS = 4

gating, deciding, outcomes = (pack_module(f"unguide_comfy.{name}") for name in ("gating", "deciding", "outcomes"))


def latent(batch: int = 1) -> dict[str, Any]:
    return {"samples": torch.zeros(batch, 4, 8, 8)}


def ksampler(
    model: Any, positive: Any, negative: Any, batch: int = 1, sampler: str = "euler", seed: int = 3
) -> torch.Tensor:
    (out,) = host.common_ksampler(model, seed, STEPS, 4.0, sampler, "normal", positive, negative, latent(batch))
    return out["samples"]


def gated(demo: Demo, lora: Any, reports: list[Any] | None = None, **settings: Any) -> Any:
    gate = gating.Gate(gating.PROBE, deciding.ProbeSettings(**settings))
    return gating.guided(demo.model, (lora,), gate, observer=None if reports is None else reports.append)


def decision_for(demo: Demo, lora: Any, positive: Any, **settings: Any) -> Any:
    reports: list[Any] = []
    ksampler(gated(demo, lora, reports, **settings), positive, demo.encode(""))
    return reports[0].outcomes[0].decision


def probe_node(demo: Demo, loras: tuple[Any, ...], prompt: str, cfg: float = 4.0, **options: Any) -> Any:
    return pack_module("nodes.probe").StabilityProbe.execute(
        demo.model, loras, demo.encode(prompt), demo.encode(""), latent(), cfg, 0, 0.0, 1.0, **options
    )


@pytest.mark.parametrize("prompt", [CONCEPT, *SYNONYMS])
def test_the_concept_and_its_synonyms_are_found(prompt, demo, demo_lora):
    assert decision_for(demo, demo_lora, demo.encode(prompt)).detected


def test_the_concept_in_a_scene_is_found_by_its_influence(demo, demo_lora):
    for prompt in ("a cat in the forest", "a cat in the snow"):
        decision = decision_for(demo, demo_lora, demo.encode(prompt))
        assert decision.detected
        assert decision.statistic == "influence"


def test_a_calibrated_card_lets_influence_decide_and_the_patch_stands_beside_it(demo, demo_lora):
    decision = decision_for(demo, demo_lora, demo.encode(CONCEPT))
    assert [statistic.name for statistic in decision.statistics] == ["influence", "patch"]
    assert 0.0 < decision.threshold < 0.68
    assert decision.confidence == 1.0


def test_a_card_without_a_calibration_leaves_the_decision_to_alignment(demo, demo_lora):
    decision = decision_for(demo, without_calibration(demo_lora), demo.encode(CONCEPT))
    assert [statistic.name for statistic in decision.statistics] == ["alignment"]


@pytest.mark.parametrize("prompt", UNRELATED)
def test_other_prompts_are_not(prompt, demo, demo_lora):
    assert not decision_for(demo, demo_lora, demo.encode(prompt)).detected


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m_sde"])
def test_an_unrelated_picture_is_the_base_models_bit_for_bit(sampler, batch, demo, demo_lora):
    positive, negative = demo.encode(UNRELATED[0]), demo.encode("")
    expected = ksampler(demo.model, positive, negative, batch, sampler)
    assert torch.equal(ksampler(gated(demo, demo_lora), positive, negative, batch, sampler), expected)


def test_a_picture_of_the_concept_changes(demo, demo_lora):
    positive, negative = demo.encode(CONCEPT), demo.encode("")
    base, erased = ksampler(demo.model, positive, negative), ksampler(gated(demo, demo_lora), positive, negative)
    assert (erased - base).norm() > 0.1 * base.norm()


def test_the_probe_leaves_the_global_random_numbers_alone(demo, demo_lora):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    probe_node(demo, (demo_lora,), CONCEPT)
    assert torch.equal(torch.rand(3), expected)


def test_the_same_prompt_gets_the_same_decision(demo, demo_lora):
    first, second = (decision_for(demo, demo_lora, demo.encode(CONCEPT)) for _ in range(2))
    assert first == second


def test_the_node_and_the_gate_decide_alike(demo, demo_lora):
    for prompt in (CONCEPT, UNRELATED[0]):
        (decision,) = probe_node(demo, (demo_lora,), prompt)[0]
        found = decision_for(demo, demo_lora, demo.encode(prompt))
        assert (decision.detected, decision.statistic) == (found.detected, found.statistic)
        assert decision.score == pytest.approx(found.score, abs=1e-5)


def test_the_concept_is_found_among_other_conditionings(demo, demo_lora):
    (area,) = host.ConditioningSetArea().append(demo.encode(CONCEPT), 32, 64, 0, 32, 1.0)
    late = [[text, {**options, "start_percent": 0.6}] for text, options in demo.encode(CONCEPT)]
    for hidden in (demo.encode(CONCEPT), area, late):
        assert decision_for(demo, demo_lora, demo.encode(UNRELATED[2]) + hidden).detected


def test_the_concept_is_found_in_a_guiders_second_prompt(demo, demo_lora):
    reports: list[Any] = []
    model = gated(demo, demo_lora, reports)
    guider = custom.DualCFGGuider.execute(
        model, demo.encode(UNRELATED[0]), demo.encode(CONCEPT), demo.encode(""), 4.0, 2.0, "regular"
    )[0]
    sigmas = custom.BasicScheduler.execute(model, "normal", STEPS, 1.0)[0]
    sampler = custom.KSamplerSelect.execute("euler")[0]
    custom.SamplerCustomAdvanced.execute(custom.RandomNoise.execute(3)[0], guider, sampler, sigmas, latent())
    assert reports[0].outcomes[0].decision.detected


# which statistic


def load(kind: str, concept: str, demo: Demo) -> Any:
    erasure = pack_module("unguide_comfy.erasure")
    return erasure.load_erasure_lora(f"unguide-demo/{kind}/{concept}.safetensors", 1.0, demo.clip)


def without_clip(lora: Any) -> Any:
    return dataclasses.replace(lora, concept=None, neutral=None)


def without_calibration(lora: Any) -> Any:
    card = dataclasses.replace(lora.adapter.card, calibration={})
    return dataclasses.replace(lora, adapter=dataclasses.replace(lora.adapter, card=card))


def test_alignment_decides_where_an_adapter_acts_on_other_prompts_as_well(demo):
    lora = load("paper", "cat", demo)
    assert lora.adapter.card.calibration
    assert decision_for(demo, lora, demo.encode(CONCEPT)).statistic == "alignment"


def test_influence_decides_where_it_separates_badly_and_alignment_misses_more(demo):
    lora = load("paper", "deer", demo)
    decision = decision_for(demo, lora, demo.encode("a photo of the deer"))
    assert decision.statistic == "influence"
    assert decision.detected


def test_without_a_clip_the_cards_calibration_decides(demo, demo_lora):
    for prompt, expected in ((CONCEPT, True), (UNRELATED[2], False)):
        decision = decision_for(demo, without_clip(demo_lora), demo.encode(prompt))
        assert decision.statistic == "influence"
        assert decision.detected is expected


def test_with_neither_the_papers_rule_decides_and_says_so(demo, demo_lora, caplog):
    decision = decision_for(demo, without_calibration(without_clip(demo_lora)), demo.encode(CONCEPT))
    assert decision.statistic == "paper"
    assert "negative prompt stood in" in decision.reason
    assert "no neutral prompt" in caplog.text


def test_a_calibration_for_another_size_is_not_used(demo, demo_lora):
    lora = without_clip(demo_lora)
    reports: list[Any] = []
    model = gated(demo, lora, reports)
    host.common_ksampler(
        model,
        3,
        1,
        4.0,
        "euler",
        "normal",
        demo.encode(CONCEPT),
        demo.encode(""),
        {"samples": torch.zeros(1, 4, 8, 16)},
    )
    assert reports[0].outcomes[0].decision.statistic == "paper"


def test_the_node_reports_every_statistic(demo, demo_lora):
    decisions, weight, score, detected, plot, report = probe_node(demo, (demo_lora,), CONCEPT).args
    assert {statistic.name for statistic in decisions[0].statistics} == {"patch", "influence", "alignment", "paper"}
    assert (weight, detected) == (0.0, True)
    assert score == decisions[0].score
    assert plot.ndim == 4
    assert plot.shape[3] == 3
    assert 0.0 <= float(plot.min()) < float(plot.max()) <= 1.0
    content = json.loads(report)["erasure"][0]
    assert content["decision"]["detected"] is True
    assert content["erasure_lora"] == LORA


# decisions on wires


def test_a_decision_is_used_instead_of_a_probe(demo, demo_lora):
    decisions = probe_node(demo, (demo_lora,), CONCEPT)[0]
    reports: list[Any] = []
    gate = gating.Gate(gating.PROBE, deciding.ProbeSettings())
    model = gating.guided(demo.model, (demo_lora,), gate, decisions, observer=reports.append)
    given = ksampler(model, demo.encode(CONCEPT), demo.encode(""))
    assert reports[0].evaluations["probe"] == 0
    assert torch.equal(given, ksampler(gated(demo, demo_lora), demo.encode(CONCEPT), demo.encode("")))


def test_a_decision_for_another_adapter_strength_number_or_model_is_refused(demo, demo_lora, golden_model):
    gate = gating.Gate()
    decisions = probe_node(demo, (demo_lora,), CONCEPT)[0]
    stronger = dataclasses.replace(demo_lora, strength=1.5)
    with pytest.raises(ValueError, match=r"another erasure LoRA than 'unguide-demo/selective/cat\.safetensors'"):
        gating.guided(demo.model, (stronger,), gate, decisions)
    with pytest.raises(ValueError, match="1 decisions and 2 erasure LoRAs"):
        gating.guided(demo.model, (demo_lora, stronger), gate, decisions)
    other = [dataclasses.replace(decisions[0], model_key="0123")]
    with pytest.raises(ValueError, match="made for another model"):
        gating.guided(demo.model, (demo_lora,), gate, other)


def test_a_models_key_survives_loading_and_tells_patches_apart(demo, demo_lora):
    import comfy.sd

    identity = pack_module("unguide_comfy.identity")
    before = identity.model_key(demo.model)
    ksampler(demo.model, demo.encode(CONCEPT), demo.encode(""))
    assert identity.model_key(demo.model) == before
    (name, layer), *_ = demo_lora.adapter.layers.items()
    patches = {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up}
    patched, _ = comfy.sd.load_lora_for_models(demo.model, None, patches, 1.0, 0.0)
    key = identity.model_key(patched)
    assert key != before
    ksampler(patched, demo.encode(CONCEPT), demo.encode(""))
    assert identity.model_key(patched) == key
    assert identity.model_key(demo.model) == before


# what it costs


@pytest.mark.parametrize(("prompt", "base", "adapted"), [(UNRELATED[0], 2 * STEPS, 0), (CONCEPT, 0, 2 * STEPS)])
def test_evaluations_are_counted(prompt, base, adapted, demo, demo_lora):
    reports: list[Any] = []
    ksampler(gated(demo, demo_lora, reports, repeats=2, probe_steps=2), demo.encode(prompt), demo.encode(""))
    # per noise seed: two steps of two conditionings; the prompt by the base model and by the adapter
    assert reports[0].evaluations == {"base": base, "adapted": adapted, "probe": 2 * (2 * 2 + 2), "wasted": 0}
    assert reports[0].plain == 2 * STEPS


@pytest.mark.parametrize(
    ("mode", "on_detection", "prompt", "sampling", "probe"),
    [
        ("probe", "continue", UNRELATED[0], 60, 12),
        ("probe", "continue", CONCEPT, 60, 12),
        ("trajectory", "continue", UNRELATED[0], 60, 1),
        ("trajectory", "continue", CONCEPT, 62, 1),  # the step of the decision is computed twice
        ("trajectory", "restart", CONCEPT, 68, 1),
    ],
)
def test_the_documented_costs_of_thirty_steps(mode, on_detection, prompt, sampling, probe, demo, demo_lora):
    reports: list[Any] = []
    gate = gating.Gate(mode, deciding.ProbeSettings(), None, on_detection)
    model = gating.guided(demo.model, (demo_lora,), gate, observer=reports.append)
    host.common_ksampler(model, 3, 30, 4.0, "euler", "normal", demo.encode(prompt), demo.encode(""), latent())
    spent = reports[0].evaluations
    assert (spent["base"] + spent["adapted"] + spent["wasted"], spent["probe"]) == (sampling, probe)


def test_the_sampler_node_reports_its_run(demo, demo_lora):
    execute = pack_module("nodes.sampler").UnGuideSampler.execute
    arguments = (
        demo.model,
        3,
        10,
        4.0,
        "euler",
        "normal",
        demo.encode(UNRELATED[0]),
        demo.encode(""),
        latent(),
    )
    out, plot, report = execute(*arguments, 1.0, (demo_lora,), "trajectory", -1.0, 1.0).args
    assert torch.equal(out["samples"], host.common_ksampler(*arguments)[0]["samples"])
    content = json.loads(report)
    (erasure,) = content["erasure"]
    assert erasure["weight"] == 1.0
    assert erasure["step"] == 2
    assert erasure["sigma"] > 0.0
    assert erasure["why"]
    assert 0.0 < erasure["decision"]["confidence"] <= 1.0
    assert [len(row) for row in erasure["samples"][0]["map"]] == [8] * 8
    assert content["unet_evaluations_total"] == content["unet_evaluations_plain"] + 1
    assert plot.shape[0] == 1


# the trajectory as the probe


def watched(demo: Demo, lora: Any, reports: list[Any] | None = None, on_detection: str = "continue", **settings: Any):
    gate = gating.Gate(gating.TRAJECTORY, deciding.ProbeSettings(**settings), None, on_detection)
    loras = lora if isinstance(lora, tuple) else (lora,)
    return gating.guided(demo.model, loras, gate, observer=None if reports is None else reports.append)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m_sde", "heun", "euler_cfg_pp"])
def test_a_watched_unrelated_picture_is_the_base_models_bit_for_bit(sampler, batch, demo, demo_lora):
    positive, negative = demo.encode(UNRELATED[0]), demo.encode("")
    expected = ksampler(demo.model, positive, negative, batch, sampler)
    reports: list[Any] = []
    assert torch.equal(ksampler(watched(demo, demo_lora, reports), positive, negative, batch, sampler), expected)
    assert reports[0].evaluations["adapted"] == 0
    assert [len(outcome.decisions) for outcome in reports[0].outcomes] == [batch]


@pytest.mark.parametrize(
    ("statistic", "steps", "cost"), [("alignment", 30, 1), ("influence", 30, 1), ("auto", 30, 1), ("auto", STEPS, 1)]
)
def test_watching_an_unrelated_picture_costs_one_evaluation(statistic, steps, cost, demo, demo_lora):
    reports: list[Any] = []
    model = watched(demo, demo_lora, reports, statistic=statistic)
    host.common_ksampler(model, 3, steps, 4.0, "euler", "normal", demo.encode(UNRELATED[0]), demo.encode(""), latent())
    assert reports[0].evaluations == {"base": 2 * steps, "adapted": 0, "probe": cost, "wasted": 0}


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m_sde"])
def test_restarting_gives_the_picture_that_is_erased_from_the_start(sampler, demo, demo_lora):
    positive, negative = demo.encode(CONCEPT), demo.encode("")
    reports: list[Any] = []
    found = ksampler(watched(demo, demo_lora, reports, "restart"), positive, negative, sampler=sampler)
    fixed = gating.Gate(gating.FIXED, deciding.ProbeSettings(weight_detected=0.0))
    assert torch.equal(
        found, ksampler(gating.guided(demo.model, (demo_lora,), fixed), positive, negative, sampler=sampler)
    )
    assert reports[0].evaluations["wasted"] > 0
    assert reports[0].evaluations["adapted"] == 2 * STEPS


def test_continuing_erases_from_the_step_of_the_decision_on(demo, demo_lora):
    reports: list[Any] = []
    base = ksampler(demo.model, demo.encode(CONCEPT), demo.encode(""))
    erased = ksampler(watched(demo, demo_lora, reports), demo.encode(CONCEPT), demo.encode(""))
    assert (erased - base).norm() > 0.1 * base.norm()
    evaluations = reports[0].evaluations
    assert evaluations["wasted"] == 0
    assert 0 < evaluations["adapted"] < 2 * STEPS


def test_samples_of_a_batch_are_decided_one_by_one(demo, demo_lora):
    """A batch of two prompts: the cat is erased, the dog beside it is the base model's, bit for bit."""
    ((cat, options),), ((dog, _),) = demo.encode(CONCEPT), demo.encode(UNRELATED[0])
    positive = [[torch.cat([cat, dog]), {**options, "pooled_output": None}]]
    negative = demo.encode("")
    reports: list[Any] = []
    found = ksampler(watched(demo, demo_lora, reports), positive, negative, batch=2)
    base = ksampler(demo.model, positive, negative, batch=2)
    assert [decision.detected for decision in reports[0].outcomes[0].decisions] == [True, False]
    assert torch.equal(found[1], base[1])
    assert not torch.equal(found[0], base[0])


def test_a_watched_adapter_is_decided_on_the_base_model_beside_one_that_blends_already(demo, demo_lora):
    alone: list[Any] = []
    ksampler(watched(demo, demo_lora, alone, statistic="alignment"), demo.encode(CONCEPT), demo.encode(""))
    beside: list[Any] = []
    gate = gating.Gate(gating.TRAJECTORY, deciding.ProbeSettings(statistic="alignment"))
    blending = gating.guided(demo.model, (dataclasses.replace(demo_lora, strength=0.01),), gating.Gate(gating.FIXED))
    ksampler(gating.guided(blending, (demo_lora,), gate, observer=beside.append), demo.encode(CONCEPT), demo.encode(""))
    scores = [reports[0].outcomes[-1].decision.score for reports in (alone, beside)]
    assert scores[1] == pytest.approx(scores[0], abs=0.05)
    assert beside[0].evaluations["probe"] == 3  # the prompt, the neutral and the concept's prompt by the base model


def test_a_partial_schedule_is_watched_from_its_first_step(demo, demo_lora):
    reports: list[Any] = []
    noise = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))}
    host.common_ksampler(
        watched(demo, demo_lora, reports), 3, STEPS, 4.0, "euler", "normal", demo.encode(CONCEPT), demo.encode(""),
        noise, denoise=0.5,
    )  # fmt: skip
    assert len(reports[0].outcomes[0].decisions) == 1


def test_a_run_that_ends_before_the_decision_says_so(demo, demo_lora):
    reports: list[Any] = []
    model = watched(demo, demo_lora, reports)
    node = host.KSamplerAdvanced()
    node.sample(
        model, "enable", 3, 40, 4.0, "euler", "normal", demo.encode(CONCEPT), demo.encode(""), latent(), 0, 2, "enable"
    )
    assert reports[0].outcomes[0].decisions == ()
    assert "no decision" in outcomes.summary(reports[0].outcomes[0], finished=True)


def test_looking_again_finds_nothing_new_in_an_unrelated_picture_and_costs_one_evaluation_each(demo, demo_lora):
    reports: list[Any] = []
    gate = gating.Gate(gating.TRAJECTORY, look_again=4)
    model = gating.guided(demo.model, (without_calibration(demo_lora),), gate, observer=reports.append)
    positive, negative = demo.encode(UNRELATED[0]), demo.encode("")
    (found,) = host.common_ksampler(model, 3, 20, 4.0, "euler", "normal", positive, negative, latent())
    (base,) = host.common_ksampler(demo.model, 3, 20, 4.0, "euler", "normal", positive, negative, latent())
    assert torch.equal(found["samples"], base["samples"])
    assert reports[0].evaluations == {"base": 40, "adapted": 0, "probe": 5, "wasted": 0}  # steps 3, 7, 11, 15, 19


def test_looking_again_finds_a_concept_that_comes_late(demo, demo_lora):
    """In a scene the cat is drawn after the scene: its influence passes this threshold after the first look only."""
    found = []
    for look_again in (0, 3):
        reports: list[Any] = []
        settings = deciding.ProbeSettings(statistic="influence", threshold=0.82)
        gate = gating.Gate(gating.TRAJECTORY, settings, look_again=look_again)
        model = gating.guided(demo.model, (demo_lora,), gate, observer=reports.append)
        positive, negative = demo.encode("a cat in the forest"), demo.encode("")
        host.common_ksampler(model, 3, 30, 4.0, "euler", "normal", positive, negative, latent())
        found.append((reports[0].outcomes[0].decision.detected, reports[0].outcomes[0].step))
    assert found == [(False, 3), (True, 6)]


def test_a_smooth_policy_takes_a_weight_between_the_two(demo, demo_lora):
    binary = decision_for(demo, demo_lora, demo.encode(CONCEPT), threshold=0.9)
    smooth = decision_for(demo, demo_lora, demo.encode(CONCEPT), threshold=0.9, policy="smooth")
    assert binary.weight == 0.0
    assert smooth.score == binary.score
    assert smooth.weight == pytest.approx(1.0 - smooth.confidence)


def test_a_higher_false_alarm_rate_lowers_the_threshold(demo, demo_lora):
    rates = (0.003, 0.01, 0.1)
    thresholds = [
        decision_for(demo, demo_lora, demo.encode(CONCEPT), false_alarm_rate=rate).threshold for rate in rates
    ]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[0] > thresholds[-1]


def test_a_prediction_that_is_no_number_is_an_error_and_no_decision(demo, demo_lora):
    """The adapter's own numbers are finite; what the network makes of them is not."""
    layers = {
        name: dataclasses.replace(layer, up=layer.up.float() * 1e36) for name, layer in demo_lora.adapter.layers.items()
    }
    broken = dataclasses.replace(demo_lora, adapter=dataclasses.replace(demo_lora.adapter, layers=layers))
    positive, negative = demo.encode(UNRELATED[0]), demo.encode("")
    expected = ksampler(demo.model, positive, negative)
    with pytest.raises(ValueError, match="expected finite numbers"):
        ksampler(watched(demo, broken, statistic="influence"), positive, negative)
    assert torch.equal(ksampler(demo.model, positive, negative), expected)


# what a prompt is compared with

baselines = pack_module("unguide_comfy.baselines")


def test_a_baseline_is_measured_once_and_remembered(demo, demo_lora):
    baselines.memory.clear()
    lora, spent = without_calibration(demo_lora), []
    for _ in range(2):
        reports: list[Any] = []
        ksampler(watched(demo, lora, reports, statistic="influence"), demo.encode(CONCEPT), demo.encode(""))
        spent.append(reports[0].evaluations["probe"])
    assert spent[0] > spent[1] == 1
    assert len(baselines.memory) == 1


def test_what_is_remembered_is_bounded():
    memory = baselines.Memory(size=2)
    for number in range(3):
        memory.put((number,), baselines.Baseline((float(number),), (1.0,)))
    assert len(memory) == 2
    assert memory.get((0,)) is None
    assert memory.get((2,)) is not None


def test_the_cards_baseline_is_what_a_measurement_gives(demo, demo_lora):
    card = decision_for(demo, demo_lora, demo.encode(CONCEPT), statistic="influence")
    lora = without_calibration(demo_lora)
    measured = decision_for(demo, lora, demo.encode(CONCEPT), statistic="influence", threshold=card.threshold)
    assert len(card.concept) == 1
    assert len(measured.concept) == baselines.REPEATS
    assert measured.score == pytest.approx(card.score, rel=0.15)


def test_a_calibration_of_another_model_is_not_used_and_the_report_says_so(demo, demo_lora):
    (name, layer), *_ = demo_lora.adapter.layers.items()
    import comfy.sd

    patches = {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up}
    patched, _ = comfy.sd.load_lora_for_models(demo.model, None, patches, 0.01, 0.0)
    reports: list[Any] = []
    gate = gating.Gate(gating.PROBE)
    ksampler(gating.guided(patched, (demo_lora,), gate, observer=reports.append), demo.encode(CONCEPT), demo.encode(""))
    decision = reports[0].outcomes[0].decision
    assert decision.statistic == "alignment"
    assert "calibration is for another model" in decision.reason


def test_another_guidance_scale_keeps_the_threshold_and_measures_the_baseline(demo, demo_lora):
    reports: list[Any] = []
    model = watched(demo, demo_lora, reports)
    host.common_ksampler(model, 3, 20, 5.0, "euler", "normal", demo.encode(CONCEPT), demo.encode(""), latent())
    decision = reports[0].outcomes[0].decision
    assert decision.statistic == "influence"
    assert decision.detected
    assert "measured anew for 5.0" in decision.reason
    assert len(decision.concept) == baselines.REPEATS


def test_calibrating_an_adapter_gives_its_card_thresholds_that_work(demo, demo_lora):
    """A small calibration by the node, on few prompts: enough to tell the concept from them."""
    execute = pack_module("nodes.calibrate").CalibrateErasureLora.execute
    others = "a photo of the dog\na photo of the ship\na photo of the forest"
    bare = without_calibration(demo_lora)
    (lora,), text = execute(demo.model, demo.clip, (bare,), latent(), 4.0, "a photo of the kitty", others, 2, 0).args
    assert json.loads(text)[LORA]["model"] == pack_module("unguide_comfy.identity").model_key(demo.model)
    assert lora.adapter.layers is bare.adapter.layers
    for prompt, expected in ((CONCEPT, True), ("a photo of the truck", False)):
        decision = decision_for(demo, lora, demo.encode(prompt))
        assert decision.statistic == "influence"
        assert decision.detected is expected


# several concepts


@pytest.fixture(scope="module")
def ten(demo):
    from demo.captions import CLASSES

    with torch.inference_mode():
        return tuple(load("selective", concept, demo) for concept in CLASSES)


def test_ten_adapters_that_find_nothing_cost_one_evaluation_each_and_change_no_bit(ten, demo):
    positive, negative = demo.encode("a photo of the forest"), demo.encode("")
    expected = ksampler(demo.model, positive, negative)
    reports: list[Any] = []
    assert torch.equal(ksampler(watched(demo, ten, reports), positive, negative), expected)
    spent = reports[0].evaluations
    assert (spent["base"], spent["adapted"]) == (2 * STEPS, 0)
    assert spent["probe"] <= 11


def test_of_ten_adapters_only_the_one_that_is_meant_acts(ten, demo):
    reports: list[Any] = []
    host.common_ksampler(
        watched(demo, ten, reports), 3, 20, 4.0, "euler", "normal", demo.encode(CONCEPT), demo.encode(""), latent()
    )
    assert [outcome.decision.detected for outcome in reports[0].outcomes] == [i == 3 for i in range(10)]


def test_two_concepts_in_two_prompts_are_both_found_and_both_gone(ten, demo):
    from demo.captions import CLASSES
    from demo.classifier import classify

    def shown(model: Any) -> str:
        (out,) = host.common_ksampler(model, 3, 20, 4.0, "euler", "normal", positive, negative, latent())
        label = int(classify(demo.vae.decode(out["samples"])).argmax())
        return (*CLASSES, "other")[label]

    reports: list[Any] = []
    positive = demo.encode(CONCEPT) + demo.encode("a photo of the ship")
    negative = demo.encode("")
    assert shown(demo.model) in ("cat", "ship")
    assert shown(watched(demo, ten, reports)) not in ("cat", "ship")
    found = [outcome.concept for outcome in reports[0].outcomes if outcome.decision.detected]
    assert found == [CONCEPT, "a photo of the ship"]


def test_a_hundred_runs_decide_alike_and_keep_no_memory(demo, demo_lora):
    """Two steps each: the look is in the second. Memory is what the process holds beside the host's caches."""
    import gc
    import resource

    positive, negative = demo.encode(UNRELATED[0]), demo.encode("")
    decisions, held = [], []
    gate = gating.Gate(gating.TRAJECTORY)
    model = gating.guided(
        demo.model, (demo_lora,), gate, observer=lambda report: decisions.append(report.outcomes[0].decisions)
    )
    for number in range(100):
        host.common_ksampler(model, 3, 2, 4.0, "euler", "normal", positive, negative, latent())
        if number in (9, 99):
            gc.collect()
            held.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, tensors()))
    assert len(set(decisions)) == 1
    assert held[1][1] <= held[0][1]
    assert held[1][0] - held[0][0] < 32 * 1024  # KB


def tensors() -> int:
    import gc

    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
