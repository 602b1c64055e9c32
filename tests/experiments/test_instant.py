"""`python3 dev instant`: what is asked for, what is withheld, what it measures, and its table."""

from __future__ import annotations

import pytest

from demo.captions import CLASSES, SCENES, photo, words_for
from experiments import instant
from experiments.instant import HELD_OUT, Row
from experiments.studio import studio
from unguide_bench.scores import OTHER, SCENE, SYNONYM


def row(adapter: str, gated: bool, concept: str, shown: float) -> Row:
    gate = (100.0, 0.0) if gated else (None, None)
    return Row(adapter, gated, concept, 0.5, 0, shown, shown, shown, 99.0, 98.0, 97.0, 0.0, *gate)


@pytest.mark.parametrize("concept", CLASSES)
def test_what_is_withheld_is_asked_for_and_named_in_nothing_that_the_adapter_is_made_with(concept: str) -> None:
    half, ask = instant.known(concept), instant.asked(concept, True)
    seen = {concept, *half.synonyms, *half.scenes, *(word for other in half.others for word in words_for(other))}
    assert len(half.scenes) == 5
    assert len(half.others) in (4, 5)
    assert len([one for one in ask if one.kind == SYNONYM]) == 2
    assert {one.scene for one in ask if one.kind == SCENE} == set(SCENES) - set(half.scenes)
    assert {one.label for one in ask if one.kind == OTHER} == set(CLASSES) - {concept} - set(half.others)
    assert not any(word in one.prompt.split() for one in ask if one.kind in (SYNONYM, OTHER) for word in seen)


def test_the_table_is_means_over_concepts_alone_and_behind_the_gate() -> None:
    rows = [row("closed form", gated, concept, 2.0 * gated) for concept in ("cat", "dog") for gated in (False, True)]
    alone, gated = instant.table(rows).splitlines()[2:]
    assert alone == "| closed form | alone | 0 | 0.0 | 0.0 | 0.0 | 99.0 | 98.0 | 97.0 | - | - | 0.0 |"
    assert gated == "| closed form | behind the gate | 0 | 2.0 | 2.0 | 2.0 | 99.0 | 98.0 | 97.0 | 100.0 | 0.0 | 0.0 |"


@pytest.mark.host
def test_the_judge_of_scenes_knows_the_base_models_scenes() -> None:
    import torch

    with torch.inference_mode():
        _, images = instant.base_images(tuple(map(photo, SCENES)), (instant.FIRST_SEED, instant.FIRST_SEED + 1))
        seen = studio().scene_judge(images)
    right = [seen[2 * number + i] == scene for number, scene in enumerate(SCENES) for i in range(2)]
    assert sum(right) >= 0.9 * len(right)


@pytest.mark.host
def test_the_held_out_adapter_keeps_no_prompt_that_names_what_is_withheld() -> None:
    half = instant.known("cat")
    kept = instant.kept_of(half)
    withheld = {*SCENES, *(word for each in CLASSES for word in words_for(each))}
    withheld -= {*half.scenes, *(word for other in half.others for word in words_for(other))}
    assert len(kept) > 150
    assert not any(word in prompt.split() for prompt in kept for word in withheld)


@pytest.mark.host
def test_rows_are_measured_alone_and_behind_the_gate() -> None:
    alone, gated = instant.measured("cat", (HELD_OUT,), (instant.FIRST_SEED,))
    assert (alone.gated, gated.gated) == (False, True)
    assert (alone.evaluations, alone.detected, gated.false_positives) == (0, None, 0.0)
    assert alone.seconds is not None
    assert gated.acc_e == 0.0
    assert gated.differing == 0.0
    assert alone.differing == 100.0
