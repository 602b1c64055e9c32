"""What a policy does with sampling runs of the narrow demo model in this process."""

from __future__ import annotations

import traceback
from typing import Any

import comfy.hooks
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from comfy_extras.nodes_perpneg import PerpNeg, PerpNegGuider
from comfy_extras.nodes_train import TrainSampler

from demo.classifier import judged
from experiments.studio import counted, lora_patches
from tests.conftest import ROOT, pack_module
from tests.host.conftest import Observer, guided
from tests.policy.conftest import SEED

CAT, SHIP = "a photo of the cat", "a photo of the ship"
REFUSED = "this server does not generate this image"


@pytest.fixture
def with_guider(paint):
    """A function that samples with a guider as SamplerCustomAdvanced does, with a callback if given."""
    import comfy.sample

    def sampled(guider: Any, callback: Any = None) -> torch.Tensor:
        noise = paint.noise([SEED])
        sigmas = comfy.samplers.calculate_sigmas(paint.model.get_model_object("model_sampling"), "normal", 10)
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, callback=callback, seed=SEED)

    return sampled


def cfg_guider(paint: Any, positive: str, negative: str = "", cfg: float = 4.0) -> Any:
    guider = comfy.samplers.CFGGuider(paint.model)
    guider.set_conds(paint.encode(positive), paint.encode(negative))
    guider.set_cfg(cfg)
    return guider


def shows(paint: Any, latents: torch.Tensor) -> str:
    ((label, _),) = judged(paint.images(latents))
    return label


# images


def test_the_concept_is_erased_and_written_down(arm, paint, generate):
    assert shows(paint, generate(CAT)) == "cat"
    armed = arm()
    assert shows(paint, generate(CAT)) != "cat"
    (line,) = armed.lines()
    (adapter,) = line["adapters"]
    assert (line["model"], line["images"], line["action"]) == ("demo", 1, "erase")
    assert (adapter["adapter"], adapter["concept"], adapter["detected"]) == ("cat", CAT, [True])
    assert adapter["score"] > adapter["threshold"]


def test_an_unrelated_image_is_the_same_to_the_bit_for_at_most_one_evaluation(arm, paint, generate):
    with counted(paint.model) as plain:
        image = generate(SHIP)
    armed = arm()
    with counted(paint.model) as spent:
        assert torch.equal(generate(SHIP), image)
    assert spent.count <= plain.count + 1
    (line,) = armed.lines()
    assert line["action"] == "none"
    assert line["evaluations"] == spent.count
    assert line["plain"] == plain.count


def test_a_blank_image_has_no_content_and_neither_has_its_last_prediction(arm, paint, with_guider):
    armed = arm({"on_detection": "blank"})
    seen = []
    image = with_guider(cfg_guider(paint, CAT), lambda step, x0, x, total: seen.append(x0))
    assert not image.any()
    assert not any(x0.any() for x0 in seen)
    assert armed.lines()[0]["action"] == "blank"
    assert with_guider(cfg_guider(paint, SHIP)).any()


def test_before_the_decision_no_step_is_shown(arm, paint, with_guider):
    steps: dict[str, list[int]] = {}
    predictions: dict[str, torch.Tensor] = {}
    for name in ("without", "with"):
        if name == "with":
            arm()

        def callback(step, x0, x, total, name=name):
            steps.setdefault(name, []).append(step)
            predictions.setdefault(name, x0)

        with_guider(cfg_guider(paint, CAT), callback)
    assert steps["without"] == list(range(10))
    assert steps["with"][-1] == 9
    assert not torch.equal(predictions["with"], predictions["without"])


def test_the_last_prediction_of_an_unrelated_image_is_handed_over_unchanged(arm, paint, with_guider):
    last = []
    for _ in range(2):
        with_guider(cfg_guider(paint, SHIP), lambda step, x0, x, total: last.append((step, x0)))
        arm()
    ends = [x0 for step, x0 in last if step == 9]
    assert len(ends) == 2
    assert torch.equal(*ends)


# the client's own UnGuide


def test_the_clients_own_unguide_changes_nothing_and_its_report_is_true(arm, paint, cat, generate):
    armed = arm()
    image = generate(CAT)
    observer = Observer()
    own = guided(paint.model, cat, observer=observer, weight_detected=1.0, decide="always erase")
    assert torch.equal(generate(CAT, own), image)
    first, second = armed.lines()
    assert second["evaluations"] == first["evaluations"]
    assert observer.verdicts[0].lora.name == cat.name
    assert observer.decision.detected
    assert observer.verdicts[0].weights == (0.0,)
    assert observer.cost.total == second["evaluations"]


def test_another_erasure_lora_of_the_client_is_a_patch(arm, paint, generate):
    arm()
    other = guided(paint.model, paint.lora("selective", "dog"))
    with pytest.raises(RuntimeError, match=REFUSED):
        generate(SHIP, other)


def test_where_patches_are_allowed_the_clients_other_erasure_lora_acts_as_well(arm, paint, generate):
    armed = arm(patched="decide")
    observer = Observer()
    generate("a photo of the dog", guided(paint.model, paint.lora("selective", "dog"), observer=observer))
    assert [verdict.decision.detected for verdict in observer.verdicts] == [True]
    assert armed.lines()[0]["adapters"][0]["detected"] == [False]


# refusals


def test_a_refusal_is_short_and_shows_no_file_of_the_pack(arm, generate):
    armed = arm({"on_detection": "refuse"})
    with pytest.raises(RuntimeError, match=f"^{REFUSED}$") as refused:
        generate(CAT)
    frames = "".join(traceback.format_tb(refused.value.__traceback__))
    assert str(ROOT / "unguide_policy") not in frames
    assert str(ROOT / "unguide_comfy") not in frames
    assert type(refused.value).__module__ == "builtins"
    assert armed.lines()[0]["action"] == "refuse"
    assert generate(SHIP).any()


def test_clients_are_told_why_where_the_policy_says_so(arm, generate):
    arm({"on_detection": "refuse"}, tell_clients=True)
    with pytest.raises(RuntimeError, match="policy refuses an image with 'a photo of the cat'"):
        generate(CAT)


def patched_model(paint: Any, cat: Any, how: str) -> Any:
    model = paint.model.clone()
    if how == "lora":
        return paint.merged(cat)
    if how == "object":
        model.add_object_patch("manual_cast_dtype", torch.bfloat16)
    if how == "attention":
        model.set_model_attn2_patch(lambda q, k, v, options: (q, k, v))
    if how == "wrapper":
        model.add_wrapper("predict_noise", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    return model


@pytest.mark.parametrize("how", ["lora", "object", "attention", "wrapper"])
def test_a_patched_model_is_refused(how, arm, paint, cat, generate):
    armed = arm()
    with pytest.raises(RuntimeError, match=REFUSED):
        generate(SHIP, patched_model(paint, cat, how))
    assert "with" in armed.lines()[0]["reason"]


def test_a_patched_model_is_erased_in_every_image_where_the_policy_says_so(arm, paint, cat, generate):
    armed = arm(patched="erase")
    generate(SHIP, patched_model(paint, cat, "attention"))
    assert armed.lines()[0]["action"] == "erase"


def test_a_hook_on_a_conditioning_is_refused(arm, paint, cat, generate):
    arm()
    hook = comfy.hooks.create_hook_lora(lora_patches(cat.adapter), -1.0, 0.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(paint.encode(CAT), hook)
    with pytest.raises(RuntimeError, match=REFUSED):
        paint.generate(paint.model, hooked, [SEED])


@pytest.mark.parametrize("action", ["refuse", "pass"])
def test_a_model_that_is_not_listed_does_as_the_policy_says(action, arm, paint, generate, monkeypatch):
    image = generate(CAT)
    armed = arm(other_models=action)
    monkeypatch.setattr(pack_module("unguide_policy.guard"), "base_hash", lambda patcher: "0" * 64)
    if action == "refuse":
        with pytest.raises(RuntimeError, match=REFUSED):
            generate(CAT)
    else:
        assert torch.equal(generate(CAT), image)
    assert armed.lines()[0]["action"] == action


def test_a_prediction_outside_a_sampling_run_is_refused(arm, paint):
    arm()
    x, sigma = torch.zeros(1, 4, 8, 8), torch.ones(1)
    with pytest.raises(RuntimeError, match=REFUSED):
        paint.model.model.apply_model(x, sigma, c_crossattn=paint.encode(CAT)[0][0])


def test_a_run_past_the_first_hook_is_refused_by_the_second(arm, generate):
    armed = arm()
    comfy.samplers.CFGGuider.sample = comfy.samplers.CFGGuider.sample.__wrapped__
    with pytest.raises(RuntimeError, match=REFUSED):
        generate(SHIP)
    assert "outside" in armed.lines()[0]["reason"]


def test_training_is_refused(arm, paint, with_guider):
    armed = arm()
    guider = cfg_guider(paint, CAT)
    with pytest.raises(RuntimeError, match=REFUSED):
        guider.sample(
            torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), TrainSampler.__new__(TrainSampler), torch.ones(2)
        )
    task = pack_module("unguide_comfy.model.task")
    with pytest.raises(RuntimeError, match=REFUSED):
        task.run_on_model(guider, torch.zeros(1, 4, 8, 8), 0, lambda *arguments: None, trains=True)
    assert [line["reason"] for line in armed.lines()] == ["training", "training"]


def test_a_probe_without_an_image_passes(arm, paint, cat):
    armed = arm()
    before = pack_module("unguide_comfy.gate.before")
    settings = pack_module("unguide_comfy.probe.settings").Settings()

    def guider(model: Any) -> Any:
        made = cfg_guider(paint, CAT)
        made.model_patcher, made.model_options = model, model.model_options
        return made

    (decision,), _, _ = before.probe_prompt(paint.model, [cat], settings, guider, torch.zeros(1, 4, 8, 8))
    assert decision.detected
    assert armed.lines() == []


def test_a_prompt_that_only_a_patch_knows_is_refused(arm, paint, generate):
    arm()
    (model,) = PerpNeg.execute(paint.model, paint.encode(CAT), 1.0).result
    with pytest.raises(RuntimeError, match=REFUSED):
        generate(SHIP, model)


# the negative prompt


def test_a_concept_in_the_negative_prompt_is_erased_where_guidance_may_lead_to_it(arm, paint, with_guider):
    armed = arm()
    with_guider(cfg_guider(paint, SHIP, CAT, 0.5))
    dual = custom.DualCFGGuider.execute(paint.model, *map(paint.encode, (SHIP, "", CAT)), 1.0, 0.0, "regular")[0]
    with_guider(dual)
    assert [line["action"] for line in armed.lines()] == ["erase", "erase"]


def test_a_concept_in_the_negative_prompt_alone_changes_nothing(arm, paint, with_guider):
    image = with_guider(cfg_guider(paint, SHIP, CAT))
    arm()
    assert torch.equal(with_guider(cfg_guider(paint, SHIP, CAT)), image)


def test_a_scale_below_zero_is_refused_or_erased(arm, paint, with_guider):
    guider = PerpNegGuider.execute(paint.model, *map(paint.encode, (SHIP, CAT, "")), 4.0, -6.0)[0]
    arm()
    with pytest.raises(RuntimeError, match=REFUSED):
        with_guider(guider)


def test_what_cannot_be_decided_is_erased_where_the_policy_says_so(arm, paint, with_guider):
    armed = arm(undecidable="erase")
    with_guider(PerpNegGuider.execute(paint.model, *map(paint.encode, (SHIP, CAT, "")), 4.0, -6.0)[0])
    (line,) = armed.lines()
    assert (line["action"], line["adapters"][0]["mode"]) == ("erase", "always erase")


# what it leaves behind


def test_a_guider_is_as_it_was_after_a_run_and_after_a_refusal(arm, paint, with_guider):
    arm({"on_detection": "refuse"})
    for prompt in (SHIP, CAT):
        guider = cfg_guider(paint, prompt)
        before = guider.model_patcher, guider.model_options, dict(guider.model_options["transformer_options"])
        try:
            with_guider(guider)
        except RuntimeError:
            assert prompt == CAT
        after = guider.model_patcher, guider.model_options, dict(guider.model_options["transformer_options"])
        assert after[0] is before[0]
        assert after[1] is before[1]
        assert after[2] == before[2]


def test_a_log_that_cannot_be_written_refuses_the_image(arm, generate):
    armed = arm()
    armed.file.unlink()
    armed.file.mkdir()
    with pytest.raises(OSError, match="directory"):
        generate(SHIP)
