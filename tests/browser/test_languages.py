"""The page in another language: the nodes have their names in it, and the search finds them by these."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from dev.page import Canvas
from tests.conftest import ROOT

NOT_OFFERED = {"de"}
"""Languages that the tested page does not offer."""
LANGUAGES = sorted({path.parent.name for path in (ROOT / "locales").glob("*/nodeDefs.json")} - NOT_OFFERED - {"en"})
NAMES = """kinds => kinds.map(kind => {
  const node = LiteGraph.createNode(kind);
  return [kind, node.title, Object.fromEntries([...node.inputs, ...(node.widgets ?? [])].map(
    each => [each.name, each.localized_name ?? each.label ?? each.name]))];
})"""

BUTTON = """() => app.graph.nodes.find(node => node.type === "UnGuideSettings").widgets.find(
  widget => widget.name === "show_advanced").label"""


@pytest.fixture(
    params=[pytest.param(each, marks=() if each == "zh" else pytest.mark.lengthy) for each in LANGUAGES], scope="module"
)
def translated(request: pytest.FixtureRequest, session_canvas: Canvas) -> Iterator[tuple[Canvas, dict[str, Any]]]:
    """The page in a language, and what the pack's file says in it."""
    session_canvas.clear()
    session_canvas.speak(request.param)
    session_canvas.nodes_2(False)
    session_canvas.clear()
    texts = json.loads((ROOT / "locales" / request.param / "nodeDefs.json").read_text(encoding="utf-8"))
    yield session_canvas, texts
    session_canvas.speak("en")


def test_the_nodes_and_their_inputs_have_their_names_in_it(translated: tuple[Canvas, dict[str, Any]]) -> None:
    canvas, texts = translated
    found = canvas.page.evaluate(NAMES, sorted(texts))
    assert {kind: title for kind, title, _ in found} == {kind: text["display_name"] for kind, text in texts.items()}
    for kind, _, inputs in found:
        wanted = {name: text["name"] for name, text in texts[kind]["inputs"].items() if "name" in text}
        assert wanted.items() <= inputs.items(), kind


def test_the_button_for_advanced_inputs_is_in_it(translated: tuple[Canvas, dict[str, Any]]) -> None:
    canvas, _ = translated
    canvas.add("UnGuideSettings")
    words = json.loads((ROOT / "locales" / canvas.language / "main.json").read_text(encoding="utf-8"))["unguide"]
    assert canvas.page.evaluate(BUTTON) == words["showAdvanced"]


def test_the_search_finds_a_node_by_its_name_in_it(translated: tuple[Canvas, dict[str, Any]]) -> None:
    canvas, texts = translated
    name = texts["UnGuideTrainErasureLora"]["display_name"]
    assert name in canvas.search(name)


def test_the_help_is_in_it_where_it_was_translated_and_shows_its_picture(
    translated: tuple[Canvas, dict[str, Any]],
) -> None:
    canvas, texts = translated
    page = ROOT / "web" / "docs" / "UnGuideSampler" / f"{canvas.language}.md"
    wanted = texts["UnGuideSampler"]["display_name"] if page.is_file() else "UnGuide Sampler"
    text, widths = canvas.help_of("UnGuideSampler")
    assert text.lstrip().startswith(wanted)
    assert min(widths) > 100
