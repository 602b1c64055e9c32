"""The gate on the trained demo model: what it detects, what it leaves alone, when it decides, what that costs."""

from __future__ import annotations

import dataclasses
import gc
import json
import resource
import weakref
from typing import Any

import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras.nodes_perpneg import PerpNegGuider

import nodes as host
from tests.conftest import pack_module
from tests.host.conftest import CAT, LORA, UNRELATED, Demo, Observer, guided, ksampler, latent, load, without_text

SYNONYMS = ("a photo of the kitty", "a photo of the feline", "a photo of the housecat")
STEPS = 4
SHORT = {"steps": 8, "last_step": STEPS}
"""The first four steps of eight; the probe is in the second."""

steps_of = pack_module("unguide_comfy.gate.steps")


def run(demo: Demo, loras: Any, prompt: str, **options: Any) -> tuple[torch.Tensor, Observer]:
    """The image of a prompt behind a gate, and what the run reports; `options` of KSampler and of the settings."""
    sampling = {name: options.pop(name) for name in (*ksampler.__kwdefaults__, "image", "denoise") if name in options}
    observer = Observer()
    model = guided(demo.model, loras, observer=observer, **options)
    return ksampler(model, demo.encode(prompt), demo.encode(""), **{**SHORT, **sampling}), observer


def base(demo: Demo, prompt: str, **sampling: Any) -> torch.Tensor:
    """The base model's image."""
    return ksampler(demo.model, demo.encode(prompt), demo.encode(""), **{**SHORT, **sampling})


def probe(demo: Demo, loras: tuple[Any, ...], prompt: str) -> Any:
    """The outputs of Stability Probe."""
    node = pack_module("nodes.probe").StabilityProbe
    return node.execute(demo.model, loras, demo.encode(prompt), demo.encode(""), latent(), 4.0, 0).args


def sample_with(guider: Any, model: Any) -> torch.Tensor:
    """The same steps with a guider."""
    sigmas = custom.BasicScheduler.execute(model, "normal", SHORT["steps"], 1.0)[0][: STEPS + 1]
    sampler = custom.KSamplerSelect.execute("euler")[0]
    noise = custom.RandomNoise.execute(3)[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent())[0]["samples"]


# what it detects


@pytest.mark.parametrize("prompt", [CAT, *SYNONYMS])
def test_the_concept_and_its_synonyms_are_detected(prompt, demo, demo_lora):
    (decision,) = probe(demo, (demo_lora,), prompt)[0]
    assert decision.detected


def test_the_concept_in_a_scene_is_detected_by_its_influence(demo, demo_lora):
    for prompt in ("a cat in the forest", "a cat in the snow"):
        (decision,) = probe(demo, (demo_lora,), prompt)[0]
        assert decision.detected
        assert decision.statistic == "influence"


@pytest.mark.parametrize("prompt", UNRELATED)
def test_other_prompts_are_not_detected(prompt, demo, demo_lora):
    (decision,) = probe(demo, (demo_lora,), prompt)[0]
    assert not decision.detected


def test_the_node_and_the_gate_decide_alike_every_time(demo, demo_lora):
    for prompt in (CAT, UNRELATED[0]):
        (decision,) = probe(demo, (demo_lora,), prompt)[0]
        first, second = (run(demo, demo_lora, prompt, steps=1, decide="before sampling")[1] for _ in range(2))
        assert first.decision == second.decision
        assert (decision.detected, decision.statistic) == (first.decision.detected, first.decision.statistic)
        assert decision.score == pytest.approx(first.decision.score, abs=1e-5)


def test_the_concept_is_detected_among_other_conditionings(demo, demo_lora):
    (area,) = host.ConditioningSetArea().append(demo.encode(CAT), 32, 64, 0, 32, 1.0)
    late = [[text, {**options, "start_percent": 0.6}] for text, options in demo.encode(CAT)]
    for hidden in (demo.encode(CAT), area, late):
        observer = Observer()
        model = guided(demo.model, demo_lora, observer=observer)
        ksampler(model, demo.encode(UNRELATED[2]) + hidden, demo.encode(""), steps=2)
        assert observer.decision.detected


def test_the_concept_is_detected_in_a_guiders_second_prompt(demo, demo_lora):
    observer = Observer()
    model = guided(demo.model, demo_lora, observer=observer)
    prompts = demo.encode(UNRELATED[0]), demo.encode(CAT), demo.encode("")
    sample_with(custom.DualCFGGuider.execute(model, *prompts, 4.0, 2.0, "regular")[0], model)
    assert observer.decision.detected


# the negative prompt


@pytest.mark.parametrize("cfg", [0.0, 0.5])
def test_a_concept_in_the_negative_prompt_is_detected_where_guidance_pulls_towards_it(cfg, demo, demo_lora):
    observer = Observer()
    model = guided(demo.model, demo_lora, observer=observer)
    positive, negative = demo.encode(UNRELATED[0]), demo.encode(CAT)
    erased = ksampler(model, positive, negative, cfg=cfg, **SHORT)
    image = ksampler(demo.model, positive, negative, cfg=cfg, **SHORT)
    assert observer.decision.detected
    assert (erased - image).norm() > 0.1 * image.norm()


def test_the_same_holds_for_the_second_scale_of_a_dual_guider(demo, demo_lora):
    observer = Observer()
    model = guided(demo.model, demo_lora, observer=observer)
    prompts = demo.encode(UNRELATED[0]), demo.encode(""), demo.encode(CAT)
    sample_with(custom.DualCFGGuider.execute(model, *prompts, 1.0, 0.0, "regular")[0], model)
    assert observer.decision.detected


def test_a_concept_that_guidance_leads_away_from_is_not_detected(demo, demo_lora):
    observer = Observer()
    positive, cat, empty = demo.encode(UNRELATED[0]), demo.encode(CAT), demo.encode("")
    model = guided(demo.model, demo_lora, observer=observer)
    assert torch.equal(ksampler(model, positive, cat, **SHORT), ksampler(demo.model, positive, cat, **SHORT))
    sample_with(PerpNegGuider.execute(model, positive, empty, cat, 4.0, 1.0)[0], model)
    assert [verdicts[0].decision.detected for verdicts, _ in observer.runs] == [False, False]


@pytest.mark.skipif(not hasattr(custom, "DualModelGuider"), reason="this host has no DualModelGuider")
@pytest.mark.parametrize("cfg", [0.5, 4.0])
def test_with_a_second_model_for_the_negative_prompt_the_same_holds(cfg, demo, demo_lora):
    observer = Observer()
    model = guided(demo.model, demo_lora, observer=observer)
    for positive, negative in ((CAT, ""), (UNRELATED[0], CAT)):
        prompts = {"positive": demo.encode(positive), "negative": demo.encode(negative)}
        guider = custom.DualModelGuider.execute(model, cfg=cfg, model_negative=demo.model, **prompts)[0]
        sample_with(guider, model)
    detected = [verdicts[0].decision.detected for verdicts, _ in observer.runs]
    assert detected == [True, cfg < 1.0]


# what it leaves alone


@pytest.mark.parametrize(
    ("decide", "sampler", "batch"),
    [
        *(("during sampling", sampler, 1) for sampler in ("euler", "euler_ancestral", "heun")),
        *(("during sampling", sampler, 3) for sampler in ("euler", "euler_ancestral", "dpmpp_2m_sde", "euler_cfg_pp")),
        *(("before sampling", sampler, 3) for sampler in ("euler_ancestral", "dpmpp_2m_sde")),
    ],
)
def test_an_unrelated_image_is_the_base_models_bit_for_bit(decide, sampler, batch, demo, demo_lora):
    sampling = {"sampler_name": sampler, "batch": batch}
    image, observer = run(demo, demo_lora, UNRELATED[0], decide=decide, **sampling)
    assert torch.equal(image, base(demo, UNRELATED[0], **sampling))
    assert observer.cost.evaluations["adapted"] == 0
    assert len(observer.verdicts[0].decisions) == (batch if decide == "during sampling" else 1)


def test_samples_of_a_batch_are_decided_one_by_one(demo, demo_lora):
    """A batch of two prompts: the cat is erased, the dog beside it is the base model's, bit for bit."""
    ((cat, options),), ((dog, _),) = demo.encode(CAT), demo.encode(UNRELATED[0])
    positive = [[torch.cat([cat, dog]), {**options, "pooled_output": None}]]
    observer = Observer()
    model = guided(demo.model, demo_lora, observer=observer)
    erased, image = (ksampler(each, positive, demo.encode(""), batch=2, **SHORT) for each in (model, demo.model))
    assert [decision.detected for decision in observer.verdicts[0].decisions] == [True, False]
    assert observer.verdicts[0].weights == (0.0, 1.0)
    assert torch.equal(erased[1], image[1])
    assert (erased[0] - image[0]).norm() > 0.1 * image[0].norm()


def test_the_probe_leaves_the_global_random_numbers_alone(demo, demo_lora):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    probe(demo, (demo_lora,), CAT)
    assert torch.equal(torch.rand(3), expected)


# strength


@pytest.mark.parametrize("decide", ["during sampling", "before sampling"])
def test_strength_changes_what_is_erased_and_neither_the_score_nor_the_cost(decide, demo, demo_lora):
    strong = dataclasses.replace(demo_lora, strength=2.0)
    (weak_image, weak), (strong_image, observer) = (run(demo, lora, CAT, decide=decide) for lora in (demo_lora, strong))
    assert observer.decision == weak.decision
    assert observer.decision.detected
    assert (strong_image - weak_image).norm() > 0.05 * weak_image.norm()
    assert observer.cost.evaluations == weak.cost.evaluations


def test_strength_leaves_an_unrelated_image_alone(demo, demo_lora):
    strong = dataclasses.replace(demo_lora, strength=2.0)
    (_, weak), (image, observer) = (run(demo, lora, UNRELATED[0], batch=2) for lora in (demo_lora, strong))
    assert observer.verdicts[0].decisions == weak.verdicts[0].decisions
    assert torch.equal(image, base(demo, UNRELATED[0], batch=2))


def test_erasing_harder_than_the_adapter_takes_one_pass(demo, demo_lora):
    strong = dataclasses.replace(demo_lora, strength=2.0)
    _, observer = run(demo, strong, CAT, decide="always erase")
    assert observer.cost.total == observer.cost.plain == 2 * STEPS
    assert observer.cost.evaluations["adapted"] == 2 * STEPS


# every schedule decides


@pytest.mark.parametrize(
    "sampling",
    [
        {"steps": 1},
        {"steps": 3, "scheduler": "karras"},
        {"steps": 2, "scheduler": "exponential"},
        {"steps": 6, "denoise": 0.5},
        {"steps": 10, "last_step": 1},
        {"steps": 40, "last_step": 2},
    ],
    ids=lambda sampling: " ".join(map(str, sampling.values())),
)
def test_every_schedule_has_a_step_at_which_the_concept_is_detected(sampling, demo, demo_lora):
    """A partial schedule starts from an image of the concept, which is not read itself here: rollouts decide it."""
    if "denoise" in sampling:
        sampling = {**sampling, "image": {"samples": base(demo, CAT, steps=8)}}
    sampling = {"last_step": None, **sampling}
    image, observer = run(demo, demo_lora, CAT, check_image="never", **sampling)
    (decision,) = observer.verdicts[0].decisions
    assert decision.detected
    assert (decision.step is None) is ("denoise" in sampling)
    assert not torch.equal(image, base(demo, CAT, **sampling))


def test_few_steps_are_decided_by_the_calibration_too(demo, demo_lora):
    for prompt, detected in ((CAT, True), ("a cat in the forest", True), (UNRELATED[0], False)):
        _, observer = run(demo, demo_lora, prompt, steps=4, last_step=1)
        assert (observer.decision.detected, observer.decision.statistic) == (detected, "influence")


def test_both_halves_of_a_split_run_are_decided(demo, demo_lora):
    observer = Observer()
    model = guided(demo.model, demo_lora, observer=observer)
    node = host.KSamplerAdvanced()
    arguments = 3, 6, 4.0, "euler", "normal", demo.encode(CAT), demo.encode("")
    (half,) = node.sample(model, "enable", *arguments, latent(), 0, 2, "enable")
    node.sample(model, "disable", *arguments, half, 2, 6, "disable")
    (first,), (second,) = (verdicts[0].decisions for verdicts, _ in observer.runs)
    assert first.detected
    assert second.sigma < first.sigma


@pytest.mark.parametrize("scheduler", comfy.samplers.KSampler.SCHEDULERS)
def test_the_probes_step_is_one_of_the_runs_before_the_silhouette_is_settled(scheduler, demo):
    sampling = demo.model.get_model_object("model_sampling")
    own = comfy.samplers.calculate_sigmas(sampling, "normal", 20)
    for steps in (1, 2, 3, 4, 6, 10, 20, 50):
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
        step = steps_of.probing_step(sigmas, own, 2)
        assert 0 <= step < len(sigmas)
        assert step == 0 or not steps_of.is_settled(own, float(sigmas[step]))
        if steps >= 20:
            assert steps_of.progress(own, float(sigmas[step])) == pytest.approx(2 / 20, abs=1.1 / 20)


def split(model: Any, conds: Any, x: torch.Tensor, sigma: torch.Tensor, options: Any) -> list[torch.Tensor]:
    """Predicts as patches and guiders do that go round every wrapper of the host's batches."""
    return [
        torch.zeros_like(x) if cond is None else comfy.samplers._calc_cond_batch(model, [cond], x, sigma, options)[0]
        for cond in conds
    ]


@pytest.fixture
def patched(demo):
    """The demo with a model whose predictions do not pass by the gate."""
    model = demo.model.clone()
    names = "model", "conds", "input", "sigma", "model_options"
    model.set_model_sampler_calc_cond_batch_function(lambda args: split(*(args[name] for name in names)))
    return Demo(model, demo.clip, demo.vae)


@pytest.mark.parametrize("resist_adversarial", [False, True])
def test_a_run_that_does_not_pass_by_the_gate_is_decided_before_it_and_erased(resist_adversarial, patched, demo_lora):
    chosen = {"resist_adversarial": resist_adversarial}
    erased, observer = run(patched, demo_lora, CAT, **chosen)
    image = base(patched, CAT)
    assert observer.decision.detected
    assert observer.decision.step is None
    assert observer.cost.evaluations["probe"] >= 5  # two steps of a rollout, and what the statistics need
    assert (erased - image).norm() > 0.1 * image.norm()
    untouched, observer = run(patched, demo_lora, UNRELATED[0], **chosen)
    assert not observer.decision.detected
    assert torch.equal(untouched, base(patched, UNRELATED[0]))


class Around(comfy.samplers.CFGGuider):
    """A guider that predicts round every wrapper of the host's batches."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        conds = [self.conds["positive"], self.conds["negative"]]
        positive, negative = split(self.inner_model, conds, x, timestep, model_options)
        return negative + self.cfg * (positive - negative)


def around(demo: Demo, model: Any, prompt: str) -> torch.Tensor:
    guider = Around(model)
    guider.set_conds(demo.encode(prompt), demo.encode(""))
    guider.set_cfg(4.0)
    return sample_with(guider, model)


@pytest.mark.parametrize(("prompt", "weight_otherwise"), [(CAT, 1.0), (UNRELATED[0], 1.0), (UNRELATED[0], 2.0)])
def test_a_run_that_ends_undecided_is_decided_then_and_generated_again_if_need_be(
    prompt, weight_otherwise, demo, demo_lora
):
    observer = Observer()
    model = guided(demo.model, demo_lora, observer=observer, weight_otherwise=weight_otherwise)
    image = around(demo, model, prompt)
    decided = {True: 0.0, False: weight_otherwise}[prompt == CAT]
    fixed = guided(demo.model, demo_lora, decide="always erase", weight_detected=decided)
    assert observer.verdicts[0].weights == (decided,)
    assert torch.equal(image, around(demo, fixed, prompt))
    assert observer.cost.evaluations["wasted"] == (0 if decided == 1.0 else 2 * STEPS)


@pytest.mark.parametrize("decide", ["during sampling", "before sampling", "always erase"])
def test_a_guider_that_does_not_pass_by_the_gate_cannot_undo_the_resistance(decide, demo, demo_lora):
    model = guided(demo.model, demo_lora, decide=decide, resist_adversarial=True)
    image = around(demo, demo.model, CAT)
    assert (around(demo, model, CAT) - image).norm() > 0.1 * image.norm()


# on detection


def test_automatic_continues_where_the_decision_comes_early(demo, demo_lora):
    sampling = {"steps": 20, "last_step": 5}
    image, observer = run(demo, demo_lora, CAT, **sampling)
    continued, expected = run(demo, demo_lora, CAT, on_detection="continue", **sampling)
    assert torch.equal(image, continued)
    assert observer.cost.evaluations == expected.cost.evaluations
    assert observer.cost.evaluations["wasted"] == 0


def test_automatic_leaves_no_step_of_the_concept_in_a_run_of_six_steps(demo, demo_lora):
    sampling = {"steps": 6, "last_step": None}
    image, observer = run(demo, demo_lora, CAT, **sampling)
    assert observer.decision.detected
    assert torch.equal(image, run(demo, demo_lora, CAT, decide="always erase", **sampling)[0])


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m_sde"])
def test_restarting_gives_the_image_that_is_erased_from_its_first_step(sampler, demo, demo_lora):
    found, observer = run(demo, demo_lora, CAT, sampler_name=sampler, on_detection="restart")
    assert torch.equal(found, run(demo, demo_lora, CAT, sampler_name=sampler, decide="always erase")[0])
    assert observer.cost.evaluations["wasted"] > 0
    assert observer.cost.evaluations["adapted"] == 2 * STEPS


def test_continuing_erases_from_the_step_of_the_decision_on(demo, demo_lora):
    erased, observer = run(demo, demo_lora, CAT, on_detection="continue")
    image = base(demo, CAT)
    assert (erased - image).norm() > 0.1 * image.norm()
    assert observer.cost.evaluations["wasted"] == 0
    assert 0 < observer.cost.evaluations["adapted"] < 2 * STEPS


# probing again


def test_probing_an_unrelated_image_again_costs_one_evaluation_each_and_changes_nothing(demo, demo_lora):
    sampling = {"steps": 20, "last_step": 12}
    image, observer = run(demo, demo_lora, UNRELATED[0], recheck_every=4, **sampling)
    assert torch.equal(image, base(demo, UNRELATED[0], **sampling))
    assert observer.cost.evaluations == {"base": 24, "adapted": 0, "probe": 3, "wasted": 0}  # steps 3, 7, 11


def test_probing_again_detects_a_concept_that_comes_late(demo, demo_lora):
    """In a scene the cat appears after the scene: its influence passes this threshold after the first probe only."""
    chosen = {"statistic": "influence", "threshold": 0.94, "steps": 30, "last_step": 8}
    prompt, found = "a kitty in the snow", {}
    for every, on_detection in ((0, "automatic"), (3, "continue"), (3, "automatic")):
        image, observer = run(demo, demo_lora, prompt, recheck_every=every, on_detection=on_detection, **chosen)
        found[every, on_detection] = observer.decision.detected, observer.decision.step
    assert list(found.values()) == [(False, 3), (True, 6), (True, 6)]
    # by then the silhouette is settled, so that automatic restarts
    assert torch.equal(image, run(demo, demo_lora, prompt, steps=30, last_step=8, decide="always erase")[0])
    assert observer.cost.evaluations["wasted"] > 0


def test_every_image_of_a_batch_that_is_detected_late_is_generated_from_its_first_step_again(demo, demo_lora):
    """The second image is detected at step 3 and the first at step 6, so the run starts again twice."""
    chosen = {"statistic": "influence", "threshold": 0.94, "recheck_every": 3, "on_detection": "restart"}
    sampling = {"steps": 30, "last_step": 8, "batch": 2, "seed": 3}
    image, observer = run(demo, demo_lora, "a kitty in the snow", **chosen, **sampling)
    assert [decision.step for decision in observer.verdicts[0].decisions] == [6, 3]
    assert torch.equal(image, run(demo, demo_lora, "a kitty in the snow", decide="always erase", **sampling)[0])


# decisions on wires


def test_a_decision_is_used_instead_of_a_probe_whatever_the_strength(demo, demo_lora):
    decisions = probe(demo, (demo_lora,), CAT)[0]
    for strength in (1.0, 2.0):
        lora, observer = dataclasses.replace(demo_lora, strength=strength), Observer()
        model = guided(demo.model, lora, decisions, observer=observer)
        image = ksampler(model, demo.encode(CAT), demo.encode(""), **SHORT)
        assert observer.cost.evaluations["probe"] == 0
        assert torch.equal(image, run(demo, lora, CAT, decide="always erase")[0])


def test_a_decision_for_another_adapter_number_or_model_is_refused(demo, demo_lora):
    decisions = probe(demo, (demo_lora,), CAT)[0]
    other = load("paper", "cat", demo)
    with pytest.raises(ValueError, match=r"another erasure LoRA than 'unguide-demo/paper/cat\.safetensors'"):
        guided(demo.model, other, decisions)
    with pytest.raises(ValueError, match="1 decisions and 2 erasure LoRAs"):
        guided(demo.model, (demo_lora, other), decisions)
    with pytest.raises(ValueError, match="made for another model"):
        guided(demo.model, demo_lora, [dataclasses.replace(decisions[0], model_key="0123")])


# what it costs


@pytest.mark.parametrize(
    ("chosen", "prompt", "sampling", "probe"),
    [
        ({"decide": "before sampling"}, UNRELATED[0], 60, 12),
        ({"decide": "before sampling"}, CAT, 60, 12),
        ({}, UNRELATED[0], 60, 1),
        ({}, CAT, 62, 1),  # the step of the decision is computed twice
        ({"on_detection": "restart"}, CAT, 68, 1),
        ({"statistic": "alignment"}, UNRELATED[0], 60, 1),
        ({"decide": "always erase"}, CAT, 60, 0),
    ],
)
def test_the_documented_costs_of_thirty_steps(chosen, prompt, sampling, probe, demo, demo_lora):
    """The steps after the probe add what sampling itself takes, so most of them are left out."""
    left_out = 22
    _, observer = run(demo, demo_lora, prompt, steps=30, last_step=30 - left_out, **chosen)
    spent = observer.cost.evaluations
    assert (spent["base"] + spent["adapted"] + spent["wasted"], spent["probe"]) == (sampling - 2 * left_out, probe)
    assert observer.cost.plain == 60 - 2 * left_out


@pytest.mark.parametrize(("prompt", "base", "adapted"), [(UNRELATED[0], 2 * STEPS, 0), (CAT, 0, 2 * STEPS)])
def test_a_probe_before_sampling_is_counted_per_image(prompt, base, adapted, demo, demo_lora):
    _, observer = run(demo, demo_lora, prompt, batch=2, decide="before sampling", repeats=2, probe_steps=2)
    # per noise seed two steps of two conditionings; the prompt by the base model and by the adapter; for both images
    assert observer.cost.evaluations == {"base": base, "adapted": adapted, "probe": 2 * (2 * 2 + 2) / 2, "wasted": 0}
    assert observer.cost.plain == 2 * STEPS


def test_the_sampler_node_reports_its_run(demo, demo_lora):
    execute = pack_module("nodes.sampler").UnGuideSampler.execute
    arguments = demo.model, 3, 10, 4.0, "euler", "normal", demo.encode(UNRELATED[0]), demo.encode(""), latent()
    strong = dataclasses.replace(demo_lora, strength=2.0)
    out, plot, report, content = execute(*arguments, 1.0, (strong,)).args
    assert torch.equal(out["samples"], host.common_ksampler(*arguments)[0]["samples"])
    assert report.startswith(
        "Did not detect 'cat' at step 2 of 10 and left the image as it is; 1 extra model evaluation."
    )
    content = json.loads(content)
    (erasure,) = content["erasure"]
    assert (erasure["erasure_lora"], erasure["concept"], erasure["decide"]) == (LORA, CAT, "during sampling")
    assert (erasure["detected"], erasure["weight"], erasure["strength"], erasure["step"]) == (False, 1.0, 2.0, 2)
    assert erasure["sigma"] == pytest.approx(erasure["decision"]["sigma"], abs=1e-4)
    assert erasure["reason"].startswith("influence, the best that inputs and calibration allow")
    (sample,) = erasure["samples"]
    assert (sample["detected"], sample["weight"], sample["step"]) == (False, 1.0, 2)
    assert sample["score"] == erasure["decision"]["score"] < erasure["decision"]["threshold"]
    assert [len(row) for row in sample["map"]] == [8] * 8
    assert content["model_evaluations"] == {"base": 20, "adapted": 0, "probe": 1, "wasted": 0}
    assert (content["model_evaluations_plain"], content["model_evaluations_total"]) == (20, 21)
    assert content["model_evaluations_ratio"] == 1.05
    assert content["seconds"] > 0
    assert plot.shape[0] == 1


def test_a_prediction_that_is_not_a_number_is_an_error_and_not_a_decision(demo, demo_lora):
    """The adapter's own numbers are finite; what the network makes of them is not."""
    layers = {
        name: dataclasses.replace(layer, up=layer.up.float() * 1e36) for name, layer in demo_lora.adapter.layers.items()
    }
    broken = dataclasses.replace(demo_lora, adapter=dataclasses.replace(demo_lora.adapter, layers=layers))
    expected = base(demo, UNRELATED[0])
    with pytest.raises(ValueError, match="expected finite numbers"):
        run(demo, broken, UNRELATED[0], statistic="influence")
    assert torch.equal(base(demo, UNRELATED[0]), expected)


# several concepts


@pytest.fixture(scope="module")
def ten(demo):
    from demo.captions import CLASSES

    with torch.inference_mode():
        return tuple(load("selective", concept, demo) for concept in CLASSES)


def test_a_second_adapter_is_decided_on_the_base_model_beside_one_that_erases_already(demo, demo_lora):
    _, alone = run(demo, demo_lora, CAT, statistic="alignment")
    weak = dataclasses.replace(demo_lora, strength=0.01)
    beside = Observer()
    erasing = guided(demo.model, weak, decide="always erase")
    model = guided(erasing, demo_lora, observer=beside, statistic="alignment")
    ksampler(model, demo.encode(CAT), demo.encode(""), **SHORT)
    assert beside.decision.score == pytest.approx(alone.decision.score, abs=0.05)
    # the prompt, the neutral and the concept's prompt by the base model
    assert beside.cost.evaluations["probe"] == 3


def test_ten_adapters_that_detect_nothing_cost_one_evaluation_each_and_change_no_bit(ten, demo):
    image, observer = run(demo, tuple(map(without_text, ten)), UNRELATED[2])
    assert torch.equal(image, base(demo, UNRELATED[2]))
    spent = observer.cost.evaluations
    assert (spent["base"], spent["adapted"]) == (2 * STEPS, 0)
    assert spent["probe"] <= 11


def test_of_ten_adapters_only_the_one_that_is_meant_acts(ten, demo):
    _, observer = run(demo, ten, CAT, steps=20, last_step=4)
    assert [verdict.decision.detected for verdict in observer.verdicts] == [i == 3 for i in range(10)]


def test_two_concepts_in_two_prompts_are_both_detected_and_both_erased(ten, demo):
    from demo.captions import CLASSES
    from demo.classifier import classify

    positive, negative = demo.encode(CAT) + demo.encode("a photo of the ship"), demo.encode("")

    def shown(model: Any) -> str:
        label = int(classify(demo.vae.decode(ksampler(model, positive, negative, steps=20))).argmax())
        return (*CLASSES, "other")[label]

    observer = Observer()
    assert shown(demo.model) in ("cat", "ship")
    assert shown(guided(demo.model, ten, observer=observer)) not in ("cat", "ship")
    detected = [verdict.concept for verdict in observer.verdicts if verdict.decision.detected]
    assert detected == [CAT, "a photo of the ship"]


@pytest.mark.parametrize("chosen", [{}, {"on_detection": "restart"}, {"decide": "before sampling"}], ids=str)
def test_a_run_does_not_keep_the_model_alive(chosen, demo, demo_lora):
    """A reference cycle would: the host then takes the model for leaked, collects garbage and loads it again."""
    model = guided(demo.model, demo_lora, **chosen)
    alive = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        ksampler(model, demo.encode(CAT), demo.encode(""), **SHORT)
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_many_runs_decide_alike_and_keep_no_memory(demo, demo_lora):
    """Memory is what the process holds beside the host's caches."""
    positive, negative = demo.encode(UNRELATED[0]), demo.encode("")
    decisions, held = [], []

    def note(verdicts: Any, cost: Any) -> None:
        decisions.extend(one for one in verdicts[0].decisions if one not in decisions)

    model = guided(demo.model, demo_lora, observer=note)
    for number in range(30):
        ksampler(model, positive, negative, steps=2)
        if number in (9, 29):
            gc.collect()
            held.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, tensors()))
    assert len(decisions) == 1
    assert held[1][1] <= held[0][1]
    assert held[1][0] - held[0][0] < 16 * 1024  # KB


def tensors() -> int:
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
