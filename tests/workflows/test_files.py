"""The shipped workflow files: what the page exports of them, and what a newcomer sees on opening one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dev.server import Server
from dev.workflow import NOTES, to_api
from tests.conftest import ROOT
from tests.workflows.conftest import STEMS, TWINS, WORKFLOWS

EXPECTED = [
    "1_quick_start",
    "2_probe_then_sample",
    "3_compare_base_lora_unguide",
    "4_custom_sampling",
    "5_train_erasure_lora",
]


@pytest.fixture(params=STEMS)
def stem(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def workflow(stem: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{stem}.json").read_text(encoding="utf-8"))


def test_every_workflow_has_a_twin_and_a_thumbnail() -> None:
    assert STEMS == EXPECTED
    assert sorted(path.stem for path in TWINS.glob("*.json")) == STEMS
    for stem in STEMS:
        assert 0 < (WORKFLOWS / f"{stem}.jpg").stat().st_size < 200_000


def test_the_file_in_api_format_is_its_twin(stem: str, workflow: dict[str, Any], object_info: dict[str, Any]) -> None:
    """The twins were exported by ComfyUI's own page from these files. Hosts differ in the titles of their own nodes."""
    twin = json.loads((TWINS / f"{stem}.json").read_text(encoding="utf-8"))
    for nodes in (found := to_api(workflow, object_info), twin):
        for node in nodes.values():
            if not node["class_type"].startswith("UnGuide"):
                del node["_meta"]
    assert found == twin


def test_no_workflow_changes_an_advanced_input_of_our_nodes(stem: str, our_nodes: dict[str, Any]) -> None:
    for node in json.loads((TWINS / f"{stem}.json").read_text(encoding="utf-8")).values():
        known = our_nodes.get(node["class_type"], {"input": {}})["input"]
        for name, (_, *options) in {**known.get("required", {}), **known.get("optional", {})}.items():
            if options and options[0].get("advanced") and name in node["inputs"]:
                assert node["inputs"][name] == options[0]["default"], f"{node['class_type']}.{name}"


def test_links_agree_with_the_slots_at_both_ends(workflow: dict[str, Any]) -> None:
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    assert workflow["last_node_id"] >= max(nodes)
    assert workflow["last_link_id"] >= max(link[0] for link in workflow["links"])
    used = set()
    for link, origin, out_slot, target, in_slot, kind in workflow["links"]:
        source, sink = nodes[origin]["outputs"][out_slot], nodes[target]["inputs"][in_slot]
        assert link in source["links"]
        assert sink["link"] == link
        assert kind == source["type"]
        used.add(link)
    assert used == {slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"] is not None}


def test_every_chosen_file_and_option_exists(stem: str, object_info: dict[str, Any]) -> None:
    for node in json.loads((TWINS / f"{stem}.json").read_text(encoding="utf-8")).values():
        known = object_info[node["class_type"]]["input"]
        specifications = {**known["required"], **known.get("optional", {})}
        for name, value in node["inputs"].items():
            kind, *options = specifications[name]
            choices = kind if isinstance(kind, list) else options[0].get("options") if options else None
            if choices is not None:
                assert value in choices, f"{node['class_type']}.{name}"


def test_a_note_explains_and_nothing_overlaps(workflow: dict[str, Any]) -> None:
    assert sum(node["type"] in NOTES for node in workflow["nodes"]) == 1
    title_bar = 30
    boxes = [
        (node["pos"][0], node["pos"][1] - title_bar, node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1])
        for node in workflow["nodes"]
    ]
    for i, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[i + 1 :]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    groups = [group["bounding"] for group in workflow["groups"]]
    for (left, top, right, bottom), node in zip(boxes, workflow["nodes"], strict=True):
        inside = any(x <= left and y <= top and right <= x + w and bottom <= y + h for x, y, w, h in groups)
        assert inside or node["type"] in NOTES, node["type"]


def test_workflows_and_thumbnails_are_in_the_template_browser(server: Server) -> None:
    (pack,) = server.api.get("/workflow_templates").items()
    assert sorted(pack[1]) == STEMS
    for stem in STEMS:
        for suffix in ("json", "jpg"):
            served = server.api.request(f"/api/workflow_templates/{pack[0]}/{stem}.{suffix}")
            assert served == (ROOT / "workflows" / f"{stem}.{suffix}").read_bytes()
