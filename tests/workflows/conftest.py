"""What the workflow tests share: one server for all of them, and images as pixels. Nothing of the host is mocked."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from PIL import Image

from dev.api import Graph
from dev.server import Server
from tests.conftest import ROOT

WORKFLOWS = ROOT / "workflows"
TWINS = ROOT / "tests" / "fixtures" / "workflows"
STEMS = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
CAT, DOG = "a photo of the cat", "a photo of the dog"
GUIDED = ("UnGuideModel", "UnGuideSampler", "UnGuideProbe")
REPORT_AS_JSON = {"UnGuideSampler": 3, "UnGuideProbe": 6}
"""The output that holds what the report says, for programs."""
SETTINGS = "UnGuideSettings"


@pytest.fixture(scope="session")
def object_info(server: Server) -> dict[str, Any]:
    return server.api.get("/object_info")


@pytest.fixture(scope="session")
def our_nodes(object_info: dict[str, Any]) -> dict[str, Any]:
    """The pack's own nodes of /object_info."""
    ours = {name: info for name, info in object_info.items() if info["category"] == "UnGuide"}
    assert len(ours) >= 4
    return ours


def twin(stem: str, settings: dict[str, Any] | None = None, **inputs: Any) -> Graph:
    """The API-format twin of a workflow, changed; where it shows a report, it shows it as JSON.

    Args:
        settings: of an UnGuide Settings node to which all guided nodes are connected that have none of their own; what
            is not named has its default.
        inputs: replace those of the same name that hold a value, everywhere; `prompt` is the positive prompt's text.
    """
    graph = _read(stem)
    prompt = inputs.pop("prompt", None)
    for node in graph.values():
        if prompt is not None and node["_meta"]["title"] == "Prompt":
            node["inputs"]["text"] = prompt
        for name, value in inputs.items():
            if name in node["inputs"] and not isinstance(node["inputs"][name], list):
                node["inputs"][name] = value
        if node["class_type"] == "PreviewAny" and graph[node["inputs"]["source"][0]]["class_type"] in REPORT_AS_JSON:
            source = node["inputs"]["source"][0]
            node["inputs"]["source"] = [source, REPORT_AS_JSON[graph[source]["class_type"]]]
    if settings is not None:
        (defaults,) = [node for node in _read("4_custom_sampling").values() if node["class_type"] == SETTINGS]
        for node in graph.values():
            if node["class_type"] in GUIDED and "settings" not in node["inputs"]:
                node["inputs"]["settings"] = ["settings", 0]
        graph["settings"] = {**defaults, "inputs": {**defaults["inputs"], **settings}}
    return graph


def _read(stem: str) -> Graph:
    return dict(json.loads((TWINS / f"{stem}.json").read_text(encoding="utf-8")))


def pixels(png: bytes) -> tuple[tuple[int, int], bytes]:
    """Size and pixels of an image, without the metadata in its file."""
    opened = Image.open(io.BytesIO(png))
    return opened.size, opened.convert("RGB").tobytes()


def image(server: Server, entry: dict[str, Any], graph: Graph, title: str) -> tuple[tuple[int, int], bytes]:
    """The one image of the node with that title."""
    (node,) = [key for key, value in graph.items() if value["_meta"]["title"] == title]
    (png,) = server.api.images(entry)[node]
    return pixels(png)


def report(entry: dict[str, Any]) -> dict[str, Any]:
    """The report that a workflow shows."""
    (text,) = [output["text"][0] for output in entry["outputs"].values() if "text" in output]
    return json.loads(text)
