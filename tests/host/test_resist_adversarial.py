"""Resisting adversarial text: detected by influence or alignment, erased by the change on the concept's prompt."""

import pytest
import torch

from demo.captions import photo
from demo.classifier import judged
from experiments import attacks
from experiments.methods import gate
from experiments.studio import STEPS, studio

SEEDS = (700_001, 700_002)
CAT, DOG = photo("cat"), photo("dog")


def generated(prompt, strength=1.0, **chosen):
    """Images behind the cat's gate, of a prompt or text states."""
    at = studio()
    positive = at.encode(prompt) if isinstance(prompt, str) else prompt
    with torch.inference_mode():
        return at.guided(at.lora("selective", "cat", strength), positive, SEEDS, gate(at, **chosen))


def resisting(prompt, **chosen):
    return generated(prompt, resist_adversarial=True, **chosen)


def base(prompt):
    at = studio()
    with torch.inference_mode():
        return at.generate(at.model, at.encode(prompt) if isinstance(prompt, str) else prompt, SEEDS)


def shown(images):
    return [label for label, _ in judged(studio().images(images.latents))]


@pytest.fixture(scope="module")
def optimised():
    """Text states for which the model with the cat's erasure LoRA generates cats."""
    at = studio()
    with torch.inference_mode():
        latents = at.generate(at.model, at.encode(CAT), range(16)).latents
        return attacks.optimised("cat", latents, at.lora("selective", "cat"))


def test_optimised_text_gets_past_the_lora_and_its_influence(optimised):
    """The attack works, or the tests below would say nothing."""
    found = generated(optimised, statistic="influence")
    assert shown(found) == ["cat", "cat"]
    assert found.detected == (False, False)


def test_alignment_detects_optimised_text_and_the_lora_alone_does_not_erase_it(optimised):
    found = generated(optimised, statistic="alignment")
    assert found.detected == (True, True)
    assert shown(found) == ["cat", "cat"]


@pytest.mark.parametrize(("denoise", "recheck_every"), [(0.5, 0), (0.7, 0), (0.85, 0), (0.7, 2)])
def test_an_image_that_is_made_from_another_is_decided_by_its_prompt(denoise, recheck_every):
    """Its own steps say little about the prompt: they are denoised from what the other image shows."""
    at = studio()
    with torch.inference_mode():
        start = at.generate(at.model, at.encode(photo("street")), SEEDS).latents.repeat(3, 1, 1, 1)
        batch = {**at.batch([CAT, DOG, photo("horse")], SEEDS), "latent": start, "denoise": denoise}
        settings = gate(at, resist_adversarial=True, recheck_every=recheck_every)
        found, plain = (
            at.guided(at.lora("selective", "cat"), settings=settings, **batch),
            at.generate(at.model, **batch),
        )
    assert found.detected == (True, True, False, False, False, False)
    assert torch.equal(found.latents[2:], plain.latents[2:])


@pytest.mark.parametrize("chosen", [{}, {"on_detection": "restart"}, {"decide": "before sampling"}], ids=str)
def test_optimised_text_is_detected_and_erased(chosen, optimised):
    found = resisting(optimised, **chosen)
    assert found.detected == (True, True)
    assert "cat" not in shown(found)


def test_the_concept_itself_is_erased_too_at_two_more_evaluations_a_step():
    found = resisting(CAT)
    assert "cat" not in shown(found)
    assert found.evaluations == 4 * STEPS  # the text stage detects it, so there is no probe


def test_an_unrelated_image_stays_bit_identical_at_two_evaluations():
    found = resisting(DOG)
    assert found.detected == (False, False)
    assert torch.equal(found.latents, base(DOG).latents)
    assert found.evaluations == 2 * STEPS + 2


def test_only_the_samples_that_were_detected_change():
    at = studio()
    (cat, options), (dog, _) = at.encode(CAT)[0], at.encode(DOG)[0]
    both = [[torch.cat([cat, dog]), options]]
    found, plain = resisting(both), base(both)
    assert found.detected == (True, False)
    assert torch.equal(found.latents[1], plain.latents[1])
    assert shown(found)[0] != "cat"


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_on_the_concepts_own_prompt_it_is_the_adapted_prediction(strength, monkeypatch):
    """base(T) + (adapted(T) - base(T)) = adapted(T): without guidance the same image as the LoRA's alone."""
    monkeypatch.setattr("experiments.studio.CFG", 1.0)
    alone, concept = (
        generated(CAT, strength, decide="always erase", resist_adversarial=resist) for resist in (False, True)
    )
    torch.testing.assert_close(concept.latents, alone.latents, rtol=0.0, atol=1e-3)
    assert (alone.latents - base(CAT).latents).abs().max() > 1.0
