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
    "0_erase_a_word",
    "1_quick_start",
    "2_probe_then_sample",
    "3_compare_base_lora_unguide",
    "4_custom_sampling",
    "5_train_erasure_lora",
    "6_train_on_your_checkpoint",
]
OWN_CHECKPOINT = {"6_train_on_your_checkpoint"}
BLUEPRINTS = ["Compare with and without UnGuide", "Erase one word"]


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
    """`python3 dev templates` writes both. Hosts differ in the titles of their own nodes."""
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


def test_only_what_starts_from_a_users_checkpoint_needs_a_file_of_his(stem: str, workflow: dict[str, Any]) -> None:
    """His first checkpoint is chosen: the file names none, and the page then takes the list's first entry."""
    loaders = [node for node in workflow["nodes"] if node["type"] == "CheckpointLoaderSimple"]
    assert len(loaders) == (stem in OWN_CHECKPOINT)
    assert all("widgets_values" not in node for node in loaders)
    assert sum(node["type"] == "UnGuideDemoModel" for node in workflow["nodes"]) == (stem not in OWN_CHECKPOINT)


def test_the_saved_view_shows_everything_legibly_in_a_window_of_1600_by_1000(workflow: dict[str, Any]) -> None:
    scale, (x, y) = workflow["extra"]["ds"]["scale"], workflow["extra"]["ds"]["offset"]
    assert 0.6 <= scale <= 1
    for node in workflow["nodes"]:
        (left, top), (width, height) = node["pos"], node["size"]
        assert (left + x) * scale >= 60
        assert (top - 30 + y) * scale >= 40
        assert (left + width + x) * scale <= 1600
        assert (top + height + y) * scale <= 1000


def test_the_quick_start_is_an_app_with_the_prompt_and_shows_image_and_report() -> None:
    """The report's own widget is made by the page."""
    workflow = json.loads((WORKFLOWS / "1_quick_start.json").read_text(encoding="utf-8"))
    app, nodes = workflow["extra"]["linearData"], {node["id"]: node for node in workflow["nodes"]}
    prompt = nodes[app["inputs"][0][0]]
    assert (prompt["title"], app["inputs"][0][1]) == ("Prompt", "text")
    *filled, (report, text) = app["inputs"]
    assert (nodes[report]["title"], text) == ("Report", "preview_text")
    for node, widget in filled:
        assert any(slot["name"] == widget and "widget" in slot for slot in nodes[node]["inputs"])
    assert [nodes[node]["type"] for node in app["outputs"]] == ["PreviewImage", "UnGuideSampler", "PreviewAny"]


def test_the_blueprints_are_offered_and_their_links_agree_with_the_slots_at_both_ends(
    server: Server, object_info: dict[str, Any]
) -> None:
    listed = server.api.get("/global_subgraphs")
    ours = {each["name"]: key for key, each in listed.items() if each["source"] == "custom_node"}
    assert sorted(ours) == BLUEPRINTS
    for key in ours.values():
        (graph,) = json.loads(server.api.get(f"/global_subgraphs/{key}")["data"])["definitions"]["subgraphs"]
        nodes = {node["id"]: node for node in graph["nodes"]}
        assert {node["type"] for node in graph["nodes"]} <= set(object_info)
        for link in graph["links"]:
            outer = {-10: graph["inputs"], -20: graph["outputs"]}
            source = outer.get(link["origin_id"]) or nodes[link["origin_id"]]["outputs"]
            sink = outer.get(link["target_id"]) or nodes[link["target_id"]]["inputs"]
            one, other = source[link["origin_slot"]], sink[link["target_slot"]]
            assert link["id"] in one.get("linkIds", one.get("links"))
            assert link["id"] in other.get("linkIds", [other.get("link")])
            assert link["type"] == one["type"] == other["type"]


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
    """Nodes 2.0 draws inline code in a note blue on blue, so there is none."""
    (note,) = [node for node in workflow["nodes"] if node["type"] in NOTES]
    assert note["widgets_values"][0].startswith("## ")
    assert "`" not in note["widgets_values"][0]
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
