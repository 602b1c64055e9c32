"""`python3 dev few-steps`: what it asks for, what it measures, and its table."""

from __future__ import annotations

import re

import pytest

from demo.captions import CLASSES
from experiments import few_steps
from experiments.few_steps import ON_DETECTION, Row


def row(scheduler: str, steps: int, concept: str, shown: float) -> Row:
    same = dict.fromkeys(ON_DETECTION, shown)
    return Row(scheduler, steps, concept, 100.0, 3.0, same, 90.0, 1.0, 99.0, dict.fromkeys(ON_DETECTION, 1.1), 1.05)


def test_unrelated_prompts_never_name_the_concept_and_are_a_different_pair_for_each() -> None:
    pairs = {concept: few_steps.unrelated(concept) for concept in CLASSES}
    assert all(concept not in " ".join(pair) for concept, pair in pairs.items())
    assert len({tuple(pair) for pair in pairs.values()}) == len(CLASSES)


def test_the_tables_are_means_over_concepts_one_per_scheduler() -> None:
    rows = [row("normal", 4, "cat", 0.0), row("normal", 4, "dog", 5.0), row("karras", 4, "cat", 1.0)]
    normal, karras = few_steps.tables(rows).split("\n\nScheduler `karras`:")
    expected = "| 4 | 100.0 | 3.0 | 2.5 / 2.5 / 2.5 | 90.0 | 1.0 | 99.0 | 1.10 / 1.10 / 1.10 | 1.05 |"
    assert normal.splitlines()[-1] == expected
    assert karras.splitlines()[-1].startswith("| 4 | 100.0 | 3.0 | 1.0 / 1.0 / 1.0 ")


@pytest.mark.host
def test_a_row_is_what_the_gate_does_in_that_schedule() -> None:
    (found,) = few_steps.measured("cat", ("normal",), (10,), (800_000,))
    assert (found.base, found.misjudged, found.detected) == (100.0, 0.0, 100.0)
    assert (found.false_positives, found.identical) == (0.0, 100.0)
    assert set(found.shown.values()) == {0.0}
    assert found.ratio["restart"] > found.ratio["continue"] > 1.0
    assert found.ratio["automatic"] in (found.ratio["continue"], found.ratio["restart"])
    assert found.ratio_unrelated == pytest.approx(1.05)


@pytest.mark.host
def test_images_of_a_single_step_are_shown_beside_the_base_models() -> None:
    caption, images = few_steps.fewest_steps("cat", "normal", 1, (800_000, 800_001), 2)
    assert re.fullmatch("cat; judged: [a-z]+", caption)
    assert list(images) == ["base model", "erased", "base model, the scene"]
    assert {image.shape for image in images.values()} == {(64, 64, 3)}
    assert (images["erased"] != images["base model"]).any()
