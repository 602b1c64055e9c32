"""From a description to a workflow file: places, links, values, the view, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from dev.layout import Blueprint, Column, Group, Node, Output, Template, blueprint, workflow
from dev.report import DevError
from dev.workflow import to_api

INFO: dict[str, Any] = {
    "Load": {
        "display_name": "Load",
        "input_order": {"required": ["name"]},
        "input": {"required": {"name": [["first", "second"], {}]}},
        "output": ["MODEL"],
        "output_name": ["model"],
    },
    "Sample": {
        "display_name": "Sample",
        "input_order": {"required": ["seed", "model"], "optional": ["cfg"]},
        "input": {
            "required": {"seed": ["INT", {"default": 0, "control_after_generate": True}], "model": ["MODEL", {}]},
            "optional": {"cfg": ["FLOAT", {"default": 7.5}]},
        },
        "output": ["LATENT"],
        "output_name": ["latent"],
    },
}


def template(height: int = 100, **inputs: Any) -> Template:
    load = Node("load", "Load", 60, own_first=True)
    sample = Node("sample", "Sample", height, {"model": Output("load", "model"), "seed": 3, **inputs})
    groups = (Group("Load", (load,)), Group("Sample", (sample,)))
    return Template("test", (Column(300, groups),), ((("sample", "seed"),), ("sample",)))


def test_a_node_has_its_links_its_values_and_what_becomes_of_a_seed() -> None:
    made = workflow(template(), INFO)
    load, sample = made["nodes"]
    assert made["links"] == [[1, 1, 0, 2, 0, "MODEL"]]
    assert [slot["name"] for slot in sample["inputs"]] == ["model", "seed", "cfg"]
    assert sample["widgets_values"] == [3, "fixed", 7.5]
    assert "widgets_values" not in load
    graph = to_api(made, INFO)
    assert graph["1"]["inputs"] == {"name": "first"}
    assert graph["2"]["inputs"] == {"seed": 3, "cfg": 7.5, "model": ["1", 0]}
    assert made["extra"]["linearData"] == {"inputs": [[2, "seed"]], "outputs": [2]}


def test_groups_stand_below_one_another_around_their_nodes() -> None:
    made = workflow(template(), INFO)
    for group, node in zip(made["groups"], made["nodes"], strict=True):
        (left, top, width, height), (x, y), (w, h) = group["bounding"], node["pos"], node["size"]
        assert left < x < x + w < left + width
        assert top < y - 30 < y + h < top + height
    one, other = (group["bounding"] for group in made["groups"])
    assert one[1] + one[3] < other[1]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (template(height=2000), "least that is legible is 0.6"),
        (template(strength=1), "Sample has no input strength"),
        (template(model=Output("load", "clip")), "Load has no output 'clip'; it has model"),
        (Template("test", (Column(300, (Group("", (Node("x", "Gone", 60),)),)),)), "no node 'Gone'"),
        (Template("test", (Column(300, (Group("", (Node("x", "Load", 60),) * 2),)),)), "two nodes have one name"),
    ],
)
def test_what_cannot_be_laid_out_is_one_sentence(changed: Template, words: str) -> None:
    with pytest.raises(DevError, match=words):
        workflow(changed, INFO)


def test_a_blueprint_leads_its_inputs_to_the_nodes_inside_and_makes_widgets_of_widgets() -> None:
    wanted = Blueprint(
        "Test", "A test.", template().columns, {"seed": (("sample", "seed"),)}, {"out": Output("sample", "latent")}
    )
    made = blueprint(wanted, INFO)
    (shown,), (inside,) = made["nodes"], made["definitions"]["subgraphs"]
    assert shown["type"] == inside["id"]
    assert shown["inputs"] == [{"name": "seed", "type": "INT", "link": None, "widget": {"name": "seed"}}]
    ends = [(link["origin_id"], link["target_id"]) for link in inside["links"]]
    assert ends == [(1, 2), (-10, 2), (2, -20)]
