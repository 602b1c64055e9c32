"""Scores of an erasure and their report: erasers that deserve 100 and 0, the published table, intervals, files."""

import random
import re
from dataclasses import replace

import numpy as np
import pytest

from unguide_bench.report import Report, write_report
from unguide_bench.scores import (
    BASE,
    OTHER,
    SCENE,
    JudgedImage,
    as_json,
    harmonic,
    means_of,
    percent,
    read_images,
    scores_of,
    write_images,
)

CONCEPTS = ("cat", "ship")
SEEDS = range(20)


def judged_images(seen, method=BASE, detected=lambda kind: None):
    """Images of two concepts; `seen(kind, label, seed)` is what the judge sees."""
    return [
        JudgedImage(
            method,
            concept,
            f"a photo of the {label}",
            kind,
            label,
            seed,
            seen(kind, label, seed),
            detected(kind),
            24,
            1,
        )
        for concept in CONCEPTS
        for seed in SEEDS
        for kind, label in (
            ("erased", concept),
            *(("synonym", concept) for _ in range(3)),
            *(("other", other) for other in ("dog", "frog", "truck")),
        )
    ]


def perfect(kind, label, seed):
    return label if kind == "other" else "other"


def useless(kind, label, seed):
    return label


def test_a_perfect_eraser_scores_100():
    score = means_of(judged_images(perfect))[BASE]
    assert (score.acc_e.value, score.acc_s.value, score.acc_g.value, score.h_o.value) == (0.0, 100.0, 0.0, 100.0)


def test_a_useless_eraser_scores_0():
    score = means_of(judged_images(useless))[BASE]
    assert (score.acc_e.value, score.acc_s.value, score.acc_g.value, score.h_o.value) == (100.0, 100.0, 100.0, 0.0)


def test_an_eraser_that_destroys_everything_scores_0():
    assert means_of(judged_images(lambda kind, label, seed: "other"))[BASE].h_o.value == 0.0


@pytest.mark.parametrize(
    ("acc_e", "acc_s", "acc_g", "h_o"),
    [
        (8.49, 97.35, 10.53, 92.61),
        (13.54, 98.45, 23.18, 85.48),
        (18.27, 86.76, 16.26, 83.69),
        (26.93, 97.32, 31.61, 76.91),
    ],
)
def test_the_harmonic_mean_is_that_of_the_papers_table(acc_e, acc_s, acc_g, h_o):
    """The table's rows are means over concepts, so the mean of H_o lies a little below H_o of the means."""
    assert harmonic(acc_e, acc_s, acc_g) == pytest.approx(h_o, abs=2.0)
    assert harmonic(acc_e, acc_s, acc_g) >= h_o


def test_h_o_is_the_mean_over_concepts_and_not_that_of_the_means():
    images = [
        replace(p, seen="other") if p.concept == "cat" and p.kind != "other" else p for p in judged_images(useless)
    ]
    each = scores_of(images)[BASE]
    assert (each["cat"].h_o.value, each["ship"].h_o.value) == (100.0, 0.0)
    assert means_of(images)[BASE].h_o.value == 50.0


def test_the_interval_holds_the_true_share_about_as_often_as_it_says():
    chance, held = 0.3, 0
    for trial in range(100):
        luck = random.Random(trial)
        shown = {(label, seed): luck.random() < chance for label in CONCEPTS for seed in SEEDS}

        def judged(kind, label, seed, shown=shown):
            return label if kind == "other" or (kind == "erased" and shown[label, seed]) else "other"

        found = means_of(judged_images(judged))[BASE].acc_e
        held += found.low <= 100 * chance <= found.high
    assert 85 <= held <= 100


def test_recall_and_false_alarms_count_the_gates_decisions():
    found = means_of(judged_images(perfect, detected=lambda kind: kind != "synonym"))[BASE]
    assert found.recall == 25.0
    assert found.false_alarms == 100.0
    without = means_of(judged_images(perfect))[BASE]
    assert without.recall is None
    assert without.false_alarms is None


def test_other_kinds_of_prompts_do_not_count():
    images = judged_images(perfect)
    more = [replace(image, kind="attack", seen=image.label) for image in images]
    assert means_of(images + more) == means_of(images)


def in_scenes(images, kept, shown=False):
    """The same images with one more of each concept's, in a scene."""
    inside = [
        replace(p, kind=SCENE, seen=p.label if shown else "other", scene_kept=kept(p.seed), outside=3.0)
        for p in images
        if p.kind == "erased"
    ]
    return [*images, *inside]


def test_scenes_are_scored_beside_and_the_weakest_part_is_named():
    plain = means_of(judged_images(perfect))[BASE]
    assert (plain.scenes, plain.scene_kept, plain.h_all, plain.weakest) == (None, None, 100.0, "acc_e")
    found = means_of(in_scenes(judged_images(perfect), lambda seed: None if seed < 10 else seed < 15))[BASE]
    assert (found.acc_e, found.h_o) == (plain.acc_e, plain.h_o)
    assert (found.scenes, found.scene_kept, found.weakest) == (0.0, 50.0, "scene_kept")
    assert found.h_all == pytest.approx(5 / (4 / 100 + 1 / 50))
    assert found.outside == 3.0
    shown = means_of(in_scenes(judged_images(perfect), lambda seed: True, shown=True))[BASE]
    assert (shown.scenes, shown.h_all, shown.weakest) == (100.0, 0.0, "scenes")


def test_what_takes_the_concepts_place_is_scored_beside_and_changes_no_mean():
    plain = judged_images(perfect)
    assert means_of(plain)[BASE].reference is None
    named = [replace(p, reference=None if p.kind == OTHER else p.seed % 4 == 0) for p in plain]
    found = means_of(named)[BASE]
    expected = percent([p.seed % 4 == 0 for p in plain if p.kind != OTHER])
    assert found == replace(means_of(plain)[BASE], reference=expected)


def test_the_summary_shows_scenes_only_where_there_are_some(tmp_path):
    images = in_scenes(judged_images(perfect), lambda seed: True)
    head = next(line for line in write_report(Report(images=images), tmp_path).splitlines() if line.startswith("|"))
    assert "| scenes |" in head
    assert "| scene kept |" in head
    assert "scenes" not in write_report(Report(images=judged_images(perfect)), tmp_path)


def test_costs_are_relative_to_base():
    images = judged_images(useless) + [replace(p, evaluations=36, seconds=4) for p in judged_images(perfect, "LoRA")]
    found = as_json(images)
    assert found["LoRA"]["evaluations_ratio"] == 1.5
    assert found["LoRA"]["seconds_ratio"] == 4.0
    assert found[BASE]["evaluations_ratio"] == 1.0


def test_a_judge_that_must_name_a_class_is_scored_beside():
    images = [replace(p, closest="cat") if p.seen == "other" else p for p in judged_images(perfect)]
    found = as_json(images)[BASE]
    assert found["acc_e"] == 0.0
    assert found["must_name_a_class"]["acc_e"] == 50.0  # of cat and ship


def test_a_missing_kind_of_prompt_is_named():
    with pytest.raises(ValueError, match="'base' has no image of kind 'synonym' for 'cat'"):
        means_of(image for image in judged_images(perfect) if image.kind != "synonym")


def test_kinds_with_different_numbers_of_seeds_are_refused():
    with pytest.raises(ValueError, match=r"\[19, 20\] seeds"):
        means_of(image for image in judged_images(perfect) if image.kind != "other" or image.seed)


def test_images_survive_a_file(tmp_path):
    images = [replace(image, score=0.25, threshold=0.5, identical=True) for image in judged_images(perfect)]
    write_images(images, tmp_path / "cell.jsonl")
    assert list(read_images(tmp_path / "cell.jsonl")) == images
    assert [path.name for path in tmp_path.iterdir()] == ["cell.jsonl"]


@pytest.mark.parametrize("line", ['{"method": "base"}', "[]", "{", '{"unknown": 1}'])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "cell.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"cell\.jsonl, line 1 is not a judged image"):
        list(read_images(tmp_path / "cell.jsonl"))


METHODS = ("base", "UnGuide during sampling")


def report(**changed):
    gated = judged_images(perfect, METHODS[1], lambda kind: kind != "other")
    images = [*judged_images(useless), *(replace(p, score=2.0 if p.detected else 0.2, threshold=1.0) for p in gated)]
    attacks = [replace(p, kind="<misspelling>", label="cat", seen="cat") for p in images if p.label == "cat"]
    values = {"images": images, "attacks": attacks, "agreement": {"latents": 2e-6}, "grids": grids, **changed}
    return Report(**values)


def grids(concept, method):
    shade = 40 * (1 + METHODS.index(method)) + CONCEPTS.index(concept)
    return {f"a photo of the {word}": np.full((64, 64, 3), shade, np.uint8) for word in ("cat", "dog")}


def test_the_page_is_one_file_with_every_part(tmp_path):
    write_report(report(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "summary.md"]
    assert page.count("<svg") == 3  # cost, the gate's scores, the judge
    assert page.count("<img") == len(CONCEPTS)
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]+", page)
    assert "latents 2e-06" in page


def test_names_are_escaped(tmp_path):
    write_report(report(), tmp_path)
    assert "&lt;misspelling&gt;" in (tmp_path / "report.html").read_text()
    assert "<misspelling>" not in (tmp_path / "report.html").read_text()


def test_the_summary_has_a_row_per_method_with_its_scores(tmp_path):
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in write_report(report(), tmp_path).splitlines()}
    assert rows["base"][1:6] == ["Acc_e", "100.0", "100.0", "100.0", "0.0"]
    assert rows["UnGuide during sampling"][1:8] == ["Acc_e", "0.0", "0.0", "100.0", "100.0", "100.0", "0.0"]
    assert rows["<misspelling>"][1:] == ["100", "100 (100) |"]


def test_the_same_images_give_the_same_report(tmp_path):
    pages = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_report(report(), tmp_path / name)
        pages.append((tmp_path / name / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_a_run_without_gates_attacks_and_grids_has_a_report_too(tmp_path):
    write_report(report(images=judged_images(useless), attacks=(), agreement={}, grids=None), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Attacks" not in page
    assert page.count("<svg") == 2
