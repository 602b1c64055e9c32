"""The demonstration: what it runs and reports on the real server, and what counts as a failure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from demo.captions import CLASSES
from dev import demo, workflow
from dev.api import Graph
from dev.commands.demo import run
from dev.host import Host
from dev.report import DevError, Progress
from dev.server import Server
from tests.workflows.conftest import CAT, DOG

REPORTED = {
    *("prompt", "column", "detected", "weight", "score"),
    *("model_evaluations", "seconds", "class_probabilities"),
}


STEPS = 6
"""Fewer than the demonstration takes; nothing below depends on it."""


class Short(demo.Demo):
    def graph(self, stem: str, prompt: str) -> Graph:
        graph = super().graph(stem, prompt)
        for node in graph.values():
            node["inputs"] |= {"steps": STEPS} if "steps" in node["inputs"] else {}
        return graph


@pytest.fixture(scope="module")
def rows(server: Server) -> dict[str, list[demo.Cell]]:
    running = Short(server, "cat", 7, Progress())
    return {prompt: list(running.row(demo.Row(prompt, demo.FREE))) for prompt in (CAT, DOG)}


def test_a_row_has_an_image_per_column_and_the_gates_numbers_under_unguide(rows: dict[str, list[demo.Cell]]) -> None:
    for cells in rows.values():
        base, lora_only, _ = cells
        assert [cell.column for cell in cells] == list(demo.COLUMNS)
        assert base.png != lora_only.png
        # the text decides: two evaluations for each step, and none for the gate
        assert {cell.model_evaluations for cell in cells} == {2 * STEPS}
        assert base.detected is lora_only.detected is None
        assert all(cell.seconds > 0 for cell in cells)
    cat, dog = rows[CAT][2], rows[DOG][2]
    assert (cat.detected, cat.weight) == (True, 0)
    assert (dog.detected, dog.weight) == (False, 1)


def test_the_grid_and_the_judges_opinions_are_made_in_the_hosts_python(
    rows: dict[str, list[demo.Cell]], tmp_path: Path
) -> None:
    cells = [cell for row in rows.values() for cell in row]
    asked = [demo.Row(CAT, demo.ERASED), demo.Row(DOG, demo.KEPT)]
    demo.judge_and_show(Host.from_environment(), "cat", asked, cells, tmp_path)
    assert Image.open(tmp_path / "grid.png").width > 900
    assert len(list((tmp_path / "images").glob("*.png"))) == 6
    for cell in cells:
        entry = json.loads(json.dumps(cell.entry()))
        assert set(entry) == REPORTED
        assert set(entry["class_probabilities"]) == {*CLASSES, "other"}
        assert sum(entry["class_probabilities"].values()) == pytest.approx(1, abs=0.01)
    assert rows[DOG][0].shown == "dog"
    assert demo.table(cells).count("\n") == 6


def test_the_concept_still_shown_or_an_unrelated_image_changed_is_a_failure() -> None:
    def row(prompt: str, shown: str, png: bytes) -> list[demo.Cell]:
        made = [demo.Cell(prompt, column, b"base", 1.0) for column in demo.COLUMNS]
        made[2].png = png
        for cell in made:
            cell.class_probabilities = {shown: 0.9, "other": 0.1}
        return made

    asked = [demo.Row("a cat", demo.ERASED), demo.Row("a dog", demo.KEPT), demo.Row("mine", demo.FREE)]
    fine = [*row("a cat", "other", b"erased"), *row("a dog", "dog", b"base"), *row("mine", "cat", b"any")]
    assert demo.failures("cat", asked, fine) == []
    wrong = [*row("a cat", "cat", b"erased"), *row("a dog", "dog", b"bass"), *row("mine", "cat", b"any")]
    assert demo.failures("cat", asked, wrong) == [
        "'a cat' still shows a cat",
        "'a dog' differs from the base model's image",
    ]


@pytest.mark.parametrize("concept", CLASSES)
def test_the_rows_are_the_concept_a_synonym_three_others_a_scene_and_the_users_own(concept: str) -> None:
    rows = demo.rows_for(concept, ["a red thing"])
    assert [row.expected for row in rows] == ["erased"] * 2 + ["kept"] * 4 + ["free"]
    assert len({row.prompt for row in rows}) == 7
    assert rows[0].prompt == f"a photo of the {concept}"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"concept": "elephant"}, "choose from airplane"),
        ({"seed": -1}, "choose one from 0 to"),
        ({"output": "/proc/nothing"}, "choose a folder with --output"),
    ],
)
def test_a_wrong_argument_is_one_sentence_before_anything_is_set_up(changed: dict[str, Any], words: str) -> None:
    arguments = argparse.Namespace(**{"concept": "cat", "seed": 7, "output": "demo_output", "prompt": [], **changed})
    with pytest.raises(DevError, match=words) as caught:
        run(arguments, [], Progress())
    assert caught.value.code == 2


def test_only_the_images_seed_is_changed_not_the_probes() -> None:
    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}

    graph: Graph = {
        "1": node("KSampler", seed=1),
        "2": node("UnGuideProbe", seed=1),
        "3": node("KSampler", seed=["4", 0]),
        "4": node("PrimitiveInt", value=1),
        "5": node("LoraLoaderModelOnly", lora_name="old"),
    }
    changed = demo.prepared(graph, "x", 9, "new")
    assert [changed[key]["inputs"] for key in "12345"] == [
        {"seed": 9},
        {"seed": 1},
        {"seed": ["4", 0]},
        {"value": 9},
        {"lora_name": "new"},
    ]
    assert graph["1"]["inputs"] == {"seed": 1}


INFO = {
    "Sampler": {
        "display_name": "A Sampler",
        "input_order": {"required": ["model", "seed", "name"], "optional": ["strength"]},
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"control_after_generate": True}],
                "name": [["a", "b"]],
            },
            "optional": {"strength": ["FLOAT", {}]},
        },
    }
}


def opened(**changed: Any) -> dict[str, Any]:
    node = {
        "id": 3,
        "type": "Sampler",
        "inputs": [{"name": "model", "link": 8}],
        "widgets_values": [5, "fixed", "b", 0.5],
    }
    return {"nodes": [{**node, **changed}, {"id": 4, "type": "Note"}], "links": [[8, 1, 0, 3, 0, "MODEL"]]}


def test_widget_values_find_their_names_and_notes_are_left_out() -> None:
    inputs = {"seed": 5, "name": "b", "strength": 0.5, "model": ["1", 0]}
    expected = {"inputs": inputs, "class_type": "Sampler", "_meta": {"title": "A Sampler"}}
    assert workflow.to_api(opened(), INFO) == {"3": expected}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"type": "Gone"}, "does not have"),
        ({"mode": 4}, "muted or bypassed"),
        ({"widgets_values": [5, "fixed", "b"]}, "none for 'strength'"),
        ({"widgets_values": [5, "fixed", "b", 0.5, 1]}, "left over"),
    ],
)
def test_a_workflow_that_cannot_be_converted_is_one_sentence(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(DevError, match=words):
        workflow.to_api(opened(**changed), INFO)


def test_upstream_keeps_what_a_node_needs_and_nothing_else() -> None:
    def node(*links: str) -> dict[str, Any]:
        return {"class_type": "X", "inputs": {f"i{n}": [link, 0] for n, link in enumerate(links)}}

    graph: Graph = {"1": node(), "2": node("1"), "3": node("1"), "4": node("3", "1")}
    assert list(workflow.upstream(graph, ("4",))) == ["1", "3", "4"]
