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

gating, looking = pack_module("unguide_comfy.gating"), pack_module("unguide_comfy.looking")


def latent(batch: int = 1) -> dict[str, Any]:
    return {"samples": torch.zeros(batch, 4, 8, 8)}


def ksampler(
    model: Any, positive: Any, negative: Any, batch: int = 1, sampler: str = "euler", seed: int = 3
) -> torch.Tensor:
    (out,) = host.common_ksampler(model, seed, STEPS, 4.0, sampler, "normal", positive, negative, latent(batch))
    return out["samples"]


def gated(demo: Demo, lora: Any, reports: list[Any] | None = None, **settings: Any) -> Any:
    gate = gating.Gate(gating.PROBE, looking.ProbeSettings(**settings))
    return gating.guided(demo.model, (lora,), gate, observer=None if reports is None else reports.append)


def decision_for(demo: Demo, lora: Any, positive: Any, **settings: Any) -> Any:
    reports: list[Any] = []
    ksampler(gated(demo, lora, reports, **settings), positive, demo.encode(""))
    return reports[0].outcomes[0].decision


def probe_node(demo: Demo, loras: tuple[Any, ...], prompt: str, cfg: float = 4.0, **options: Any) -> Any:
    settings = {"statistic": "auto", "threshold": 0.0, "repeats": 2, "probe_steps": 2, "schedule_steps": 20, **options}
    return pack_module("nodes.probe").StabilityProbe.execute(
        demo.model, loras, demo.encode(prompt), demo.encode(""), latent(), cfg, 0, 0.0, 1.0, **settings
    )


@pytest.mark.parametrize("prompt", [CONCEPT, *SYNONYMS])
def test_the_concept_and_its_synonyms_are_found(prompt, demo, demo_lora):
    assert decision_for(demo, demo_lora, demo.encode(prompt)).detected


def test_the_concept_in_a_scene_is_found_by_its_influence(demo, demo_lora):
    for prompt in ("a cat in the forest", "a cat in the snow"):
        decision = decision_for(demo, demo_lora, demo.encode(prompt))
        assert decision.detected
        assert decision.statistic == "influence"


def test_either_statistic_suffices(demo, demo_lora):
    decision = decision_for(demo, demo_lora, demo.encode(CONCEPT))
    assert {statistic.name for statistic in decision.statistics} == {"alignment", "influence"}
    assert "alignment or influence" in decision.reason


def test_a_card_without_a_threshold_leaves_influence_out(demo, demo_lora):
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


def without_clip(lora: Any) -> Any:
    return dataclasses.replace(lora, concept=None, neutral=None)


def without_calibration(lora: Any) -> Any:
    card = dataclasses.replace(lora.adapter.card, calibration={})
    return dataclasses.replace(lora, adapter=dataclasses.replace(lora.adapter, card=card))


def test_alignment_decides_where_the_concepts_prompt_is_known(demo, demo_lora):
    assert decision_for(demo, demo_lora, demo.encode(CONCEPT)).statistic == "alignment"


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
    assert {statistic.name for statistic in decisions[0].statistics} == {"alignment", "influence", "paper"}
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
    gate = gating.Gate(gating.PROBE, looking.ProbeSettings())
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
    # per noise seed: two steps of two conditionings; the prompt, the neutral and the concept's; the adapted prompt
    assert reports[0].evaluations == {"base": base, "adapted": adapted, "probe": 2 * (2 * 2 + 4), "wasted": 0}


@pytest.mark.parametrize(
    ("mode", "on_detection", "prompt", "sampling", "probe"),
    [
        ("probe", "continue", UNRELATED[0], 60, 16),
        ("probe", "continue", CONCEPT, 60, 16),
        ("trajectory", "continue", UNRELATED[0], 60, 2),
        ("trajectory", "continue", CONCEPT, 60, 2),
        ("trajectory", "restart", CONCEPT, 68, 2),
    ],
)
def test_the_documented_costs_of_thirty_steps(mode, on_detection, prompt, sampling, probe, demo, demo_lora):
    reports: list[Any] = []
    gate = gating.Gate(mode, looking.ProbeSettings(), None, on_detection)
    model = gating.guided(demo.model, (demo_lora,), gate, observer=reports.append)
    host.common_ksampler(model, 3, 30, 4.0, "euler", "normal", demo.encode(prompt), demo.encode(""), latent())
    spent = reports[0].evaluations
    assert (spent["base"] + spent["adapted"] + spent["wasted"], spent["probe"]) == (sampling, probe)


def test_the_sampler_node_reports_its_run(demo, demo_lora):
    execute = pack_module("nodes.sampler").UnGuideSampler.execute
    arguments = (
        demo.model,
        3,
        STEPS,
        4.0,
        "euler",
        "normal",
        demo.encode(UNRELATED[0]),
        demo.encode(""),
        latent(),
        1.0,
    )
    out, plot, report = execute(*arguments, (demo_lora,), "probe", -1.0, 1.0).args
    assert torch.equal(out["samples"], ksampler(demo.model, demo.encode(UNRELATED[0]), demo.encode("")))
    assert json.loads(report)["erasure"][0]["weight"] == 1.0
    assert plot.shape[0] == 1


# the trajectory as the probe


def watched(demo: Demo, lora: Any, reports: list[Any] | None = None, on_detection: str = "continue", **settings: Any):
    gate = gating.Gate(gating.TRAJECTORY, looking.ProbeSettings(**settings), None, on_detection)
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
    ("statistic", "steps", "cost"), [("alignment", 30, 1), ("influence", 30, 1), ("auto", 30, 2), ("auto", STEPS, 1)]
)
def test_watching_an_unrelated_picture_costs_one_evaluation_for_each_statistic(statistic, steps, cost, demo, demo_lora):
    """Four steps have none near the noise level that the card was calibrated at; there alignment decides alone."""
    reports: list[Any] = []
    model = watched(demo, demo_lora, reports, statistic=statistic)
    host.common_ksampler(model, 3, steps, 4.0, "euler", "normal", demo.encode(UNRELATED[0]), demo.encode(""), latent())
    assert reports[0].evaluations == {"base": 2 * steps, "adapted": 0, "probe": cost, "wasted": 0}


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m_sde"])
def test_restarting_gives_the_picture_that_is_erased_from_the_start(sampler, demo, demo_lora):
    positive, negative = demo.encode(CONCEPT), demo.encode("")
    reports: list[Any] = []
    found = ksampler(watched(demo, demo_lora, reports, "restart"), positive, negative, sampler=sampler)
    fixed = gating.Gate(gating.FIXED, looking.ProbeSettings(weight_detected=0.0))
    assert torch.equal(
        found, ksampler(gating.guided(demo.model, (demo_lora,), fixed), positive, negative, sampler=sampler)
    )
    assert reports[0].evaluations["wasted"] > 0
    assert reports[0].evaluations["adapted"] == 2 * STEPS


def test_continuing_erases_from_the_next_step_on(demo, demo_lora):
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
    gate = gating.Gate(gating.TRAJECTORY, looking.ProbeSettings(statistic="alignment"))
    blending = gating.guided(demo.model, (dataclasses.replace(demo_lora, strength=0.01),), gating.Gate(gating.FIXED))
    ksampler(gating.guided(blending, (demo_lora,), gate, observer=beside.append), demo.encode(CONCEPT), demo.encode(""))
    scores = [reports[0].outcomes[-1].decision.score for reports in (alone, beside)]
    assert scores[1] == pytest.approx(scores[0], abs=0.05)
    assert beside[0].evaluations["probe"] == 3


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
    assert "no decision" in gating.summary(reports[0].outcomes[0])
