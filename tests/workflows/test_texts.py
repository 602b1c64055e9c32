"""What a person reads on the page: tooltips, help pages, translations."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dev.server import Server
from tests.conftest import ROOT

DOCS = ROOT / "web" / "docs"


def specifications(info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A node's inputs by name, with their options."""
    return {
        name: options[0] if options else {}
        for section in ("required", "optional")
        for name, (_, *options) in info["input"].get(section, {}).items()
    }


def test_every_node_has_a_description_and_every_slot_a_tooltip(our_nodes: dict[str, Any]) -> None:
    for node, info in our_nodes.items():
        assert info["display_name"], node
        assert info["description"], node
        for name, options in specifications(info).items():
            assert options.get("tooltip"), f"{node}.{name}"
        assert len(info["output_tooltips"]) == len(info["output_name"]), node
        assert all(info["output_tooltips"]), node


def test_the_english_texts_are_the_schemas(server: Server, our_nodes: dict[str, Any]) -> None:
    english = server.api.get("/i18n")["en"]["nodeDefs"]
    assert sorted(english) == sorted(our_nodes)
    for node, info in our_nodes.items():
        inputs = {
            name: {"name": options.get("display_name", name), "tooltip": options["tooltip"]}
            for name, options in specifications(info).items()
        }
        outputs = {
            str(slot): {"name": name, "tooltip": tooltip}
            for slot, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
        }
        expected = {"display_name": info["display_name"], "description": info["description"]}
        assert english[node] == {**expected, "inputs": inputs, "outputs": outputs}, node


def test_no_text_has_characters_that_translations_take_for_syntax(server: Server) -> None:
    """The page's translation library reads braces, pipes and at signs as its own."""
    english = server.api.get("/i18n")["en"]["nodeDefs"]
    assert not re.findall(r"[{}|@]", " ".join(_texts(english)))


def test_the_category_and_the_wires_have_names(server: Server, our_nodes: dict[str, Any]) -> None:
    english = server.api.get("/i18n")["en"]
    assert english["nodeCategories"] == {"UnGuide": "UnGuide"}
    outputs = {kind for info in our_nodes.values() for kind in info["output"]}
    ours = outputs & {"ERASURE_LORA", "UNGUIDE_SETTINGS", "UNGUIDE_DECISION"}
    assert set(english["dataTypes"]) == ours


def test_every_node_has_a_help_page_that_names_each_of_its_slots(server: Server, our_nodes: dict[str, Any]) -> None:
    pack = next(iter(our_nodes.values()))["python_module"].rpartition(".")[2]
    assert sorted(path.stem for path in DOCS.glob("*.md")) == sorted(our_nodes)
    for node, info in our_nodes.items():
        page = server.api.request(f"/extensions/{pack}/docs/{node}.md").decode()
        assert page.startswith(f"# {info['display_name']}\n")
        rows = re.findall(r"^\| (\*\*.*?) \|", page, re.MULTILINE)
        slots = [*specifications(info), *info["output_name"]]
        named = [name for row in rows for name in re.findall(r"\*\*(.+?)\*\*", row)]
        assert sorted(named) == sorted(slots), node


def test_every_help_page_has_a_small_picture_that_is_served_beside_it(
    server: Server, our_nodes: dict[str, Any]
) -> None:
    pack = next(iter(our_nodes.values()))["python_module"].rpartition(".")[2]
    pages = [(DOCS / f"{node}.md").read_text(encoding="utf-8") for node in our_nodes]
    shown = [name for page in pages for _, name in re.findall(r"!\[(.+?)\]\((.+?)\)", page)]
    assert sorted(shown) == sorted(path.name for path in DOCS.glob("*.jpg"))
    assert {name.removesuffix(".jpg") for name in shown} == set(our_nodes)
    for name in shown:
        assert (DOCS / name).stat().st_size < 60_000
        assert server.api.request(f"/extensions/{pack}/docs/{name}") == (DOCS / name).read_bytes()
    assert sum(path.stat().st_size for path in DOCS.iterdir()) < 1_000_000


@pytest.mark.parametrize("name", ["decide", "on_detection", "statistic"])
def test_the_help_page_of_the_settings_explains_every_choice(our_nodes: dict[str, Any], name: str) -> None:
    page = (DOCS / "UnGuideSettings.md").read_text(encoding="utf-8")
    choices = our_nodes["UnGuideSettings"]["input"]["required"][name][1]["options"]
    assert len(choices) >= 3
    for choice in choices:
        assert choice in page, choice


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [text for inner in value.values() for text in _texts(inner)]
