"""The image stage: a concept that no prompt names is seen in the image itself, and the image is generated again."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from demo.captions import photo
from demo.classifier import judged
from experiments import attacks
from experiments.studio import CFG, SAMPLER, SCHEDULER, STEPS, studio
from tests.conftest import pack_module
from tests.host.conftest import Observer

SEEDS = (710_001, 710_002)
CAT, DOG, SCENE = photo("cat"), photo("dog"), photo("forest")
STAGE, STEPS_OF = pack_module("unguide_comfy.gate.image"), pack_module("unguide_comfy.gate.steps")


@dataclass(frozen=True)
class Ran:
    """A run behind gates."""

    latents: torch.Tensor
    verdict: Any
    cost: Any

    @property
    def detected(self):
        return tuple(decision.detected for decision in self.verdict.decisions)


def run(prompt, *, seeds=SEEDS, loras=None, chosen=None, **options):
    """Images behind gates, the cat's if no other; `options` are those of `Studio.generate`."""
    at, observer = studio(), Observer()
    attach = pack_module("unguide_comfy.gate.attach")
    loras = loras or [at.lora("selective", "cat")]
    model = attach.guided(at.model, loras, reading(**(chosen or {})), observer=observer)
    generated = at.generate(model, at.encode(prompt), seeds, **options)
    return Ran(generated.latents, observer.verdicts[0], observer.cost)


def reading(**chosen):
    """Settings of a gate that reads images."""
    return studio().settings(**{"check_image": "automatic", **chosen})


def base(prompt, **options):
    at = studio()
    return at.generate(at.model, at.encode(prompt), options.pop("seeds", SEEDS), **options).latents


def shown(latents):
    return [label for label, _ in judged(studio().images(latents))]


@pytest.fixture(scope="module")
def cats():
    with torch.inference_mode():
        return base(CAT, seeds=(710_011, 710_012))


@pytest.fixture(scope="module")
def dogs():
    with torch.inference_mode():
        return base(DOG, seeds=(710_013, 710_014))


def test_an_unrelated_image_is_read_for_nothing_and_stays_bit_identical():
    ran = run(DOG)
    (check,) = ran.verdict.images
    assert (check.start, check.shown, check.again) == (False, (False, False), (False, False))
    assert torch.equal(ran.latents, base(DOG))
    assert ran.cost.total == ran.cost.plain == 2 * STEPS
    assert ran.verdict.image_note == ""


@pytest.mark.parametrize("denoise", [0.3, 0.75])
def test_a_start_image_of_the_concept_is_erased_whatever_the_prompt_says(denoise, cats):
    options = {"latent": cats, "denoise": denoise}
    ran = run(SCENE, **options)
    assert ran.detected == (True, True)
    assert ran.verdict.decision.stage == "image"
    assert ran.verdict.images[0].start
    assert "cat" not in shown(ran.latents)
    if denoise < 0.5:
        assert "cat" in shown(base(SCENE, **options))


def test_another_start_image_costs_one_evaluation_and_stays_bit_identical(dogs):
    options = {"latent": dogs, "denoise": 0.5}
    ran = run(SCENE, **options)
    assert torch.equal(ran.latents, base(SCENE, **options))
    assert ran.detected == (False, False)
    assert [check.start for check in ran.verdict.images] == [True, False]
    assert ran.cost.total == ran.cost.plain + 1


def test_of_a_batch_only_the_images_that_show_the_concept_change(cats, dogs):
    options = {"latent": torch.cat([cats[:1], dogs[:1]]), "denoise": 0.5}
    ran = run(SCENE, **options)
    assert ran.detected == (True, False)
    assert torch.equal(ran.latents[1], base(SCENE, **options)[1])
    assert shown(ran.latents)[0] != "cat"
    assert ran.verdict.weights == (0.0, 1.0)


def test_an_image_that_was_good_stays_whatever_the_run_for_another_one_shows(cats):
    """The second image's noise generates a cat from more noise, which only the first image needs."""
    at = studio()
    noise = torch.cat([at.noise(SEEDS[:1]), attacks.inverted(at, cats[:1], at.encode(CAT))])
    options = {"latent": torch.cat([cats[:1], base(SCENE)[:1]]), "denoise": 0.3, "noise": noise}
    assert shown(base("", **{**options, "latent": base(SCENE), "denoise": 0.8}))[1] == "cat"
    ran = run("", **options)
    assert ran.detected == (True, False)
    assert torch.equal(ran.latents[1], base("", **options)[1])
    again = ran.verdict.images[-1]
    assert again.again == (True, False)
    assert again.scores[1] is None
    assert ran.verdict.caveat == ""


@pytest.mark.parametrize("negative", ["", "a photo of the sea"])
def test_an_image_that_still_shows_the_concept_is_reported(negative, cats):
    """Generated again with an adapter of no strength; read on the way, or after the run."""
    at = studio()
    lora = replace(at.lora("selective", "cat"), strength=0.0)
    options = {"latent": cats, "denoise": 0.3, "negative": at.encode(negative)}
    ran = run(CAT, loras=[lora], chosen={"check_image": "always"}, **options)
    assert ran.verdict.images[-1].shown == ran.verdict.images[-1].again == (True, True)
    assert ran.verdict.caveat == "still shown"
    text = pack_module("unguide_comfy.report.text")
    said = text.report_text([ran.verdict], ran.cost)
    assert "  the start image shows the concept: score" in said
    assert "  the image, generated again" in said
    assert text.verdict_line([ran.verdict], finished=True).text == "still shown: erased cat"


def test_a_run_that_is_not_read_says_why(cats):
    assert "noise level at which images can be read" in run(DOG, steps=1).verdict.image_note
    unfinished = run(DOG, chosen={"check_image": "always"}, last_step=STEPS // 2)
    assert "leaves noise for another" in unfinished.verdict.image_note
    assert unfinished.verdict.images == ()


def test_an_image_is_read_where_a_decision_on_the_prompt_is_connected(cats):
    at = studio()
    lora = at.lora("selective", "cat")
    probe = pack_module("nodes.probe").StabilityProbe
    decisions = probe.execute(at.model, (lora,), at.encode(SCENE), at.encode(""), {"samples": cats}, CFG, 0).args[0]
    assert not decisions[0].detected
    model = pack_module("unguide_comfy.gate.attach").guided(at.model, [lora], reading(), decisions)
    assert "cat" not in shown(at.generate(model, at.encode(SCENE), SEEDS, latent=cats, denoise=0.3).latents)


def test_a_mask_is_honoured_when_the_image_is_generated_again(cats):
    """What the mask keeps is the start image's, and the rest is another than the base model's."""
    import comfy.sample

    at, observer, mask = studio(), Observer(), torch.zeros(1, 8, 8)
    mask[:, :, 4:] = 1.0
    model = pack_module("unguide_comfy.gate.attach").guided(
        at.model, [at.lora("selective", "cat")], reading(), observer=observer
    )

    def inpainted(model):
        return comfy.sample.sample(
            model, at.noise(SEEDS), STEPS, CFG, SAMPLER, SCHEDULER, at.encode(SCENE), at.encode(""), cats,
            denoise=0.5, noise_mask=mask, disable_pbar=True, seed=SEEDS[0],
        )  # fmt: skip

    erased, plain = inpainted(model), inpainted(at.model)
    assert all(observer.verdicts[0].images[0].shown)
    torch.testing.assert_close(erased[..., :4], cats[..., :4], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(erased[..., 4:], plain[..., 4:], atol=1e-2)


def test_noise_that_was_chosen_to_show_the_concept_is_seen_late_and_erased(cats):
    noise = attacks.inverted(studio(), cats, studio().encode(CAT))
    assert shown(base("", noise=noise)) == ["cat", "cat"]
    ran = run("", noise=noise)
    assert ran.detected == (True, True)
    assert "cat" not in shown(ran.latents)
    late, again = ran.verdict.images
    assert late.step is not None
    assert late.sigma is not None
    assert not late.start
    assert again.again == (True, True)
    assert ran.cost.plain == 2 * STEPS
    assert ran.cost.evaluations["wasted"] <= 2 * STEPS  # given up at the late step
    assert ran.cost.total <= 6 * STEPS


def test_a_gate_that_never_checks_images_sees_nothing(cats):
    options = {"latent": cats, "denoise": 0.3}
    ran = run(SCENE, chosen={"check_image": "never"}, **options)
    assert ran.verdict.images == ()
    assert torch.equal(ran.latents, base(SCENE, **options))


def test_resisting_adversarial_text_reads_the_image_whatever_else_is_chosen(cats):
    ran = run(SCENE, chosen={"check_image": "never", "resist_adversarial": True}, latent=cats, denoise=0.3)
    assert ran.verdict.images[0].shown == (True, True)
    assert "cat" not in shown(ran.latents)


def test_without_a_row_for_the_empty_prompt_the_image_is_read_only_if_asked_for(cats):
    at = studio()
    noise = attacks.inverted(at, cats, at.encode(CAT))
    options = {"noise": noise, "negative": at.encode("a photo of the sea")}
    silent, asked = (run("desert", chosen={"check_image": check}, **options) for check in ("automatic", "always"))
    assert silent.verdict.images == ()
    assert "no row for the empty prompt" in silent.verdict.image_note
    assert silent.cost.total == silent.cost.plain
    assert asked.verdict.images[0].step is None
    assert asked.cost.evaluations["probe"] >= 1


def test_several_gates_share_one_reading_and_only_the_concept_that_is_shown_is_erased(dogs):
    at = studio()
    loras = [at.lora("selective", concept) for concept in ("cat", "dog", "ship")]
    observer = Observer()
    model = pack_module("unguide_comfy.gate.attach").guided(at.model, loras, reading(), observer=observer)
    generated = at.generate(model, at.encode(SCENE), SEEDS, latent=dogs, denoise=0.4)
    seen = [verdict.images[0].shown for verdict in observer.verdicts]
    assert seen == [(False, False), (True, True), (False, False)]
    assert observer.cost.evaluations["probe"] == 1
    assert "dog" not in shown(generated.latents)


def test_the_same_inputs_give_the_same_image_whatever_ran_before(cats):
    options = {"latent": cats, "denoise": 0.5}
    first = run(SCENE, **options)
    run(DOG)
    assert torch.equal(run(SCENE, **options).latents, first.latents)
    assert torch.equal(base(DOG), run(DOG).latents)


def test_a_card_without_a_probe_says_so():
    at = studio()
    lora = at.lora("selective", "cat")
    content = {**lora.adapter.card.calibration, "image": None}
    card = replace(lora.adapter.card, calibration=content)
    ran = run(DOG, loras=[replace(lora, adapter=replace(lora.adapter, card=card))])
    assert ran.verdict.images == ()
    assert "no image probe" in ran.verdict.image_note


def test_other_networks_have_no_block_that_is_read():
    class Transformer:
        diffusion_model = torch.nn.Linear(1, 1)

    features = pack_module("unguide_comfy.blend.features")
    assert not features.is_readable(Transformer())
    assert features.is_readable(studio().model.model)


@pytest.mark.parametrize(("steps", "scheduler"), [(1, "normal"), (4, "karras"), (10, "normal"), (30, "normal")])
def test_the_image_is_read_near_the_end_or_not_at_all(steps, scheduler):
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(studio().model.get_model_object("model_sampling"), scheduler, steps)
    step = STEPS_OF.reading_step(sigmas)
    if steps == 1:
        assert step is None
    else:
        low, high = STEPS_OF.IMAGE_SIGMAS
        assert low <= float(sigmas[step]) <= high
        assert step >= steps // 2


def test_more_noise_is_put_before_a_partial_schedule_alone():
    import comfy.samplers

    sampling = studio().model.get_model_object("model_sampling")

    def schedule(steps):
        return comfy.samplers.calculate_sigmas(sampling, "normal", steps)

    partial = schedule(20)[-11:]
    longer = STEPS_OF.from_more_noise(partial, schedule)
    assert torch.equal(longer[-11:], partial)
    assert bool((longer.diff() < 0).all())
    assert STEPS_OF.progress(schedule(100), float(longer[0])) == pytest.approx(0.2, abs=0.02)
    assert len(longer) <= 11 + 20
    for whole in (schedule(20), schedule(20)[-17:]):
        assert STEPS_OF.from_more_noise(whole, schedule) is whole


@pytest.mark.parametrize("fitted", [True, False])
def test_a_probe_is_fitted_to_images_of_the_base_model(fitted, monkeypatch, cats, dogs):
    """It ranks other images of the concept above those of another thing; too few images are refused."""
    at, image = studio(), pack_module("unguide_comfy.probe.image")
    monkeypatch.setattr(image, "CONCEPT_IMAGES", 9)
    monkeypatch.setattr(image, "OTHER_IMAGES", 18 if fitted else 4)
    monkeypatch.setattr(image, "STEPS", 8)
    calibrate = pack_module("unguide_comfy.probe.calibrate")
    words = ("dog", "bird", "ship", "truck", "deer", "forest", "sea", "sky")
    prompts = calibrate.CalibrationPrompts(
        at.encode(CAT),
        [at.encode(photo("kitty"))],
        [at.encode(""), *(at.encode(photo(word)) for word in words)],
    )
    asked = [at.lora("selective", "cat")], [prompts], at.encode(""), torch.zeros(1, 4, 8, 8)
    settings = calibrate.CalibrationSettings(CFG, seed=3)
    if not fitted:
        with pytest.raises(ValueError, match="4 images of other things; expected at least 8"):
            calibrate.image_probes(at.model, *asked, settings)
        return
    (probe,) = calibrate.image_probes(at.model, *asked, settings)
    assert probe.images == (9, 18)
    content = {**asked[0][0].adapter.card.calibration, "image": probe.to_card()}
    card = replace(asked[0][0].adapter.card, calibration=content)
    lora = replace(asked[0][0], adapter=replace(asked[0][0].adapter, card=card))
    of_cats, of_dogs = (run(SCENE, loras=[lora], latent=images, denoise=0.3) for images in (cats, dogs))
    assert min(of_cats.verdict.images[0].scores) > max(of_dogs.verdict.images[0].scores)
