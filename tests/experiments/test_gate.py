"""The figures of the gate's table, from scores."""

import pytest

from experiments.diagram import draw, shares
from experiments.gate import STEPS, Score, figures, table_by_stage


def score(concept: str, kind: str, detected: bool, stage: str = "text", image: int = 0, prompt: str = "p") -> Score:
    return Score(concept, prompt, kind, "the gate", 0.0, detected, stage=stage, image=image)


SCORES = [
    score("cat", "name", True),
    score("cat", "synonym", False),
    score("cat", "in a scene", True, "trajectory"),
    *(score(concept, "scene", concept in ("cat", "dog"), image=0, prompt="q") for concept in ("cat", "dog", "ship")),
    *(score(concept, "scene", False, "trajectory", image=1, prompt="q") for concept in ("cat", "dog", "ship")),
]


def test_an_image_that_two_adapters_take_for_their_concepts_is_one_joint_false_positive():
    found = figures(SCORES)
    assert found["false_positives"] == pytest.approx(2 / 6, abs=1e-5)
    assert found["joint_false_positives"] == pytest.approx(1 / 2)


def test_recall_is_of_words_and_of_scenes():
    found = figures(SCORES)
    assert (found["recall_words"], found["recall_scenes"]) == (0.5, 1.0)


def test_an_unrelated_image_costs_a_probe_where_the_text_stage_left_it_open():
    found = figures(SCORES)
    assert found["unrelated_without_evaluation"] == 0.5
    assert found["mean_cost_unrelated"] == pytest.approx(1.0 + 0.5 / (2 * STEPS))


def test_the_table_of_stages_adds_up():
    row = next(line for line in table_by_stage(SCORES).splitlines() if line.startswith("| scene "))
    cells = [float(cell.strip(" %")) for cell in row.split("|")[2:-1]]
    assert cells == [pytest.approx(16.7), pytest.approx(33.3), 50.0, 0.0]


def test_the_diagram_shows_the_same_shares(tmp_path):
    rows = [vars(one) for one in SCORES]
    assert shares(rows, True, "trajectory", True) == pytest.approx(1 / 3)
    assert sum(shares(rows, False, stage, found) for stage in ("text", "trajectory") for found in (True, False)) == 1.0
    draw(rows, tmp_path / "cascade.png")
    assert (tmp_path / "cascade.png").read_bytes()[:4] == b"\x89PNG"
