"""The displacement on the concept's own prompt, and the decision by influence or alignment: against optimised text."""

from dataclasses import replace

import pytest
import torch

from demo.erasure import photo
from dev.benchmark import attacks, cells
from dev.benchmark.methods import gate
from dev.benchmark.studio import STEPS, judged, studio

SEEDS = (700_001, 700_002)
CAT, DOG = photo("cat"), photo("dog")


def guarded(**changed):
    """The gate with both, in the mode "trajectory"."""
    return replace(cells.guarded(gate(studio(), "trajectory")), **changed)


def drawn(prompt, chosen, seeds=SEEDS):
    at = studio()
    positive = at.encode(prompt) if isinstance(prompt, str) else prompt
    with torch.inference_mode():
        return at.guided(at.lora("selective", "cat"), positive, seeds, chosen)


def base(prompt, seeds=SEEDS):
    at = studio()
    with torch.inference_mode():
        return at.draw(at.model, at.encode(prompt), seeds)


def seen(drawing):
    return [label for label, _ in judged(studio().pictures(drawing.latents))]


@pytest.fixture(scope="module")
def optimised():
    """Text states for which the model with the cat's erasure LoRA draws cats."""
    at = studio()
    with torch.inference_mode():
        latents = at.draw(at.model, at.encode(CAT), range(16)).latents
        return attacks.optimised("cat", latents, at.lora("selective", "cat"))


def test_optimised_text_gets_past_the_lora_and_its_influence(optimised):
    """The attack works, or the tests below would say nothing."""
    found = drawn(optimised, gate(studio(), "trajectory"))
    assert seen(found) == ["cat", "cat"]
    assert found.detected == (False, False)


def test_alignment_finds_optimised_text_and_the_prompts_own_displacement_does_not_erase_it(optimised):
    found = drawn(optimised, guarded(displacement="prompt"))
    assert found.detected == (True, True)
    assert seen(found) == ["cat", "cat"]


def test_the_displacement_on_the_concepts_prompt_erases_optimised_text(optimised):
    found = drawn(optimised, guarded())
    assert found.detected == (True, True)
    assert "cat" not in seen(found)


def test_the_concept_itself_is_erased_too():
    assert "cat" not in seen(drawn(CAT, guarded()))


def test_an_unrelated_picture_stays_bit_identical_at_two_evaluations():
    found = drawn(DOG, guarded())
    assert found.detected == (False, False)
    assert torch.equal(found.latents, base(DOG).latents)
    assert found.rows == 2 * STEPS + 2


def test_a_found_concept_takes_two_more_evaluations_a_step():
    found = drawn(CAT, guarded())
    after = STEPS - 1  # the look is in the second step, which is erased already
    assert found.rows == 2 * STEPS + 2 + 2 * after


def test_only_the_samples_that_were_found_are_displaced():
    at = studio()
    cat, dog = at.encode(CAT)[0], at.encode(DOG)[0]
    both = [[torch.cat([cat[0], dog[0]]), cat[1]]]
    found = drawn(both, guarded())
    assert found.detected == (True, False)
    with torch.inference_mode():
        plain = at.draw(at.model, both, SEEDS)
    assert torch.equal(found.latents[1], plain.latents[1])
    assert not torch.equal(found.latents[0], plain.latents[0])
    assert seen(found)[0] != "cat"


def test_on_the_concepts_own_prompt_it_is_the_adapted_prediction(monkeypatch):
    """base(T) + (adapted(T) - base(T)) = adapted(T): without guidance the same picture as the LoRA alone."""
    monkeypatch.setattr("dev.benchmark.studio.CFG", 1.0)
    fixed = replace(gate(studio(), "trajectory"), mode="fixed")
    own, concept = drawn(CAT, fixed), drawn(CAT, replace(fixed, displacement="concept"))
    assert torch.allclose(own.latents, concept.latents, atol=1e-3)
    assert (own.latents - base(CAT).latents).abs().max() > 1.0


def test_it_restarts_and_probes_before_sampling_too():
    for chosen in (guarded(on_detection="restart"), guarded(mode="probe")):
        found = drawn(CAT, chosen)
        assert "cat" not in seen(found)


def test_without_the_concepts_prompt_it_is_refused():
    at = studio()
    with pytest.raises(ValueError, match="connect a CLIP to Load Erasure LoRA"):
        at.gating.guided(at.model, [replace(at.lora("selective", "cat"), concept=None)], guarded())


def test_the_official_mode_refuses_it():
    with pytest.raises(ValueError, match="'official' knows no displacement on the concept's prompt"):
        guarded(mode="official")


def test_an_unknown_displacement_is_refused():
    with pytest.raises(ValueError, match="unknown displacement 'nowhere'; expected one of prompt, concept"):
        guarded(displacement="nowhere")
