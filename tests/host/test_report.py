"""What a person reads of a run: one line that fits the node, and a report that starts with what happened."""

from __future__ import annotations

import dataclasses
import re

import pytest

from tests.conftest import pack_module
from tests.host.conftest import CAT, UNRELATED, Observer, guided, ksampler, latent, load

text = pack_module("unguide_comfy.report.text")
records = pack_module("unguide_comfy.report.records")
FITS = 40
"""Characters of a badge on a node of the usual width."""


@pytest.fixture(scope="module")
def runs(demo, demo_lora):
    """Runs of four steps of eight, by the prompt: the first image's step of decision is the second."""
    observers = {CAT: Observer(), UNRELATED[0]: Observer()}
    for prompt, observer in observers.items():
        model = guided(demo.model, demo_lora, observer=observer)
        ksampler(model, demo.encode(prompt), demo.encode(""), steps=8, last_step=4)
    return observers


def line(verdicts, **options):
    said = text.verdict_line(verdicts, **options)
    assert len(said.text) <= FITS
    return said.kind, said.text


def test_the_line_says_the_outcome_first_and_fits(runs):
    detected, other = runs[CAT].verdicts, runs[UNRELATED[0]].verdicts
    assert line(detected) == ("erased", "erasing: cat")
    assert line(detected, finished=True) == ("erased", "erased: cat")
    assert line(detected, sampling=False) == ("erased", "detected: cat")
    assert line(other) == ("untouched", "not detected")
    assert line(other, finished=True) == ("untouched", "untouched")
    assert line([*other, *detected], finished=True) == ("erased", "erased: cat")


def test_the_line_says_when_a_decision_is_awaited_missing_or_not_asked_for(runs):
    waiting = dataclasses.replace(runs[CAT].verdicts[0], decisions=())
    assert line([waiting]) == ("waiting", "waiting for the first steps")
    assert line([waiting], finished=True) == ("unsure", "not decided: nothing erased")
    always = dataclasses.replace(waiting, decide="always erase")
    assert line([always], finished=True) == ("erased", "erased: cat")


def test_the_line_counts_the_images_of_a_batch_and_shortens_a_long_concept(runs):
    (one,), (other,) = runs[CAT].verdicts, runs[UNRELATED[0]].verdicts
    batch = dataclasses.replace(one, decisions=(*one.decisions, *other.decisions), weights=(0.0, 1.0))
    assert line([batch], finished=True) == ("erased", "erased: cat in 1 of 2")
    long = dataclasses.replace(one, lora=dataclasses.replace(one.lora, concept_prompt="x" * 200))
    assert line([long], finished=True) == ("erased", f"erased: {'x' * 21}...")


def test_an_image_that_a_weight_changed_without_a_detection_is_not_called_untouched(runs):
    changed = dataclasses.replace(runs[UNRELATED[0]].verdicts[0], weights=(2.0,))
    assert line([changed], finished=True) == ("unsure", "not detected, weight 2")


def test_an_adapter_without_a_calibration_is_said_to_have_none(demo):
    lora = load("selective", "cat", demo)
    card = dataclasses.replace(lora.adapter.card, calibration={})
    bare = dataclasses.replace(lora, adapter=dataclasses.replace(lora.adapter, card=card))
    observer = Observer()
    ksampler(guided(demo.model, bare, observer=observer), demo.encode(CAT), demo.encode(""), steps=8, last_step=2)
    assert line(observer.verdicts, finished=True) == ("unsure", "not calibrated: erased cat")
    assert "not calibrated: use Calibrate Erasure LoRA" in text.report_text(observer.verdicts, observer.cost)
    chosen = Observer()
    model = guided(demo.model, bare, observer=chosen, statistic="alignment")
    ksampler(model, demo.encode(CAT), demo.encode(""), steps=8, last_step=2)
    assert line(chosen.verdicts, finished=True) == ("erased", "erased: cat")


def test_the_report_starts_with_what_happened_and_ends_with_the_keys(runs):
    observer = runs[CAT]
    first, *sections = text.report_text(observer.verdicts, observer.cost).split("\n\n")
    extra = round(observer.cost.total - observer.cost.plain)
    assert extra == 3
    assert first == f"Detected 'cat' at step 2 of 4 and erased it; {extra} extra model evaluations."
    assert sections[-1].startswith("Keys\ncat: model ")
    decision = observer.decision
    assert not [key for key in (decision.model_key, decision.adapter_key) if key in "\n".join(sections[:-1])]
    numbers = re.findall(r"\d+\.(\d+)", "\n".join(sections[:-1]))
    assert numbers
    assert max(map(len, numbers)) <= 2


def test_a_decision_by_the_prompts_text_is_said_to_be_made_in_the_prompt(demo, text_lora):
    observer = Observer()
    ksampler(guided(demo.model, text_lora, observer=observer), demo.encode(CAT), demo.encode(""), steps=1)
    first = text.report_text(observer.verdicts, observer.cost).split("\n\n")[0]
    assert first == ("Detected 'cat' in the prompt, before the first step, and erased it; 0 extra model evaluations.")


def test_the_report_of_several_adapters_has_one_sentence(runs):
    observer = runs[CAT]
    verdicts = [*observer.verdicts, *runs[UNRELATED[0]].verdicts]
    first = text.report_text(verdicts, observer.cost).split("\n\n")[0]
    assert first == (
        "Detected 'cat' at step 2 of 4 and erased it; did not detect 'cat' at step 2 of 4 and left the image as it "
        "is; 3 extra model evaluations."
    )


def test_a_probe_before_the_first_step_has_no_step_and_no_image(demo, demo_lora):
    probe = pack_module("nodes.probe").StabilityProbe
    out = probe.execute(demo.model, (demo_lora,), demo.encode(CAT), demo.encode(""), latent(), 4.0, 0)
    assert re.match(r"Detected 'cat' before the first step; \d+ model evaluations\.\n", out.args[5])
    assert out.ui["unguide_verdict"] == [{"kind": "erased", "text": "detected: cat"}]
    assert len(out.ui["images"]) == 1


def test_a_concept_is_named_by_its_word_or_else_by_the_file(demo_lora):
    def word(prompt, card):
        adapter = dataclasses.replace(demo_lora.adapter, card=card)
        lora = dataclasses.replace(demo_lora, name="folder/file.safetensors", concept_prompt=prompt, adapter=adapter)
        return records.Verdict(lora, "always erase", (), (0.0,)).word

    card = demo_lora.adapter.card
    assert word(card.concept_prompt, card) == "cat"
    assert word("a photo of the kitty", card) == "kitty"
    empty = dataclasses.replace(card, concept="", target="")
    assert word("", empty) == "file"
