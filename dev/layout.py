"""From a short description of a workflow to the file that a person opens: nodes in columns, links, groups, a view.

Blueprints are made the same way. It does not know which workflows there are, nor files and servers: the node types
come in as the server's /object_info.
Sizes are such that a node needs no more room in the classic canvas, in Nodes 2.0 or after a run, which
`tests/browser` checks. The view shows the whole workflow in a window of 1600 x 1000.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dev.report import DevError
from dev.workflow import default, is_widget, specified

TITLE_BAR, GROUP_BAR, PADDING, GAP = 30, 50, 20, 40
WINDOW = (1600, 1000)
CHROME = (70, 100, 20, 40)
"""What the page covers of the window: left, top, right, bottom."""
LEGIBLE = 0.6
"""Below this scale the classic canvas draws no text."""
NOTE = "MarkdownNote"
NODE_WIDTH = 340
COLOURS = {
    "ours": ("#223", "#335"),
    "positive": ("#232", "#353"),
    "negative": ("#322", "#533"),
    "note": ("#432", "#653"),
}
GROUP_COLOURS = ("#3f789e", "#8a6d3b", "#4a7a4a", "#6b5b8a", "#7a4a4a")


@dataclass(frozen=True)
class Output:
    """Another node's output, by the node's name in the description and the output's on the node."""

    node: str
    name: str


@dataclass(frozen=True)
class Node:
    """A node of the description.

    Args:
        inputs: by name, a value of a widget or an Output; what is not named keeps its default.
        height: in the canvas' units, without the title bar.
        own_first: leave the widgets to the page, which then takes each list's first entry: the user's own first file.
    """

    name: str
    kind: str
    height: int
    inputs: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""
    colour: str = ""
    own_first: bool = False


@dataclass(frozen=True)
class Group:
    """Nodes below one another, under a title; without one they stand free, as notes do."""

    title: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Column:
    """Groups below one another, of one width."""

    width: int
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Template:
    """A workflow.

    Args:
        app: what the App of it shows: (node, widget) pairs to fill in, and nodes whose results are shown; () for none.
    """

    stem: str
    columns: tuple[Column, ...]
    app: tuple[tuple[tuple[str, str], ...], tuple[str, ...]] | tuple[()] = ()


@dataclass(frozen=True)
class Blueprint:
    """A subgraph that the page offers as a node.

    Args:
        inputs: by name on the node, the (node, input) pairs inside that it leads to; a widget's becomes a widget.
        outputs: by name on the node, the output inside.
    """

    name: str
    description: str
    columns: tuple[Column, ...]
    inputs: Mapping[str, tuple[tuple[str, str], ...]]
    outputs: Mapping[str, Output]


def workflow(template: Template, object_info: Mapping[str, Any]) -> dict[str, Any]:
    """The workflow in the format of the page (version 0.4).

    Raises: DevError for a node type, an input or an output that the server does not have, and for a workflow too
        large to be read in the window.
    """
    entries, links, groups = _graph(template.columns, object_info)
    numbers = {name: entry["id"] for name, entry in entries.items()}
    extra: dict[str, Any] = {"ds": _view(template.stem, list(entries.values()), groups)}
    if template.app:
        inputs, outputs = template.app
        extra["linearData"] = {
            "inputs": [[numbers[name], widget] for name, widget in inputs],
            "outputs": [numbers[name] for name in outputs],
        }
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"unguide/{template.stem}")),
        "revision": 0,
        "last_node_id": len(entries),
        "last_link_id": len(links),
        "nodes": list(entries.values()),
        "links": links,
        "groups": groups,
        "config": {},
        "extra": extra,
        "version": 0.4,
    }


INPUTS, OUTPUTS = -10, -20
"""The ids that the page gives to the two ends of a subgraph."""


def blueprint(wanted: Blueprint, object_info: Mapping[str, Any]) -> dict[str, Any]:
    """The subgraph in the format of the page: a workflow of one node, and what is in it. Raises: DevError."""
    entries, links, _ = _graph(wanted.columns, object_info)
    inputs = list(_lead_in(wanted, entries, links))
    outputs = list(_lead_out(wanted, entries, links))
    right = max(entry["pos"][0] + entry["size"][0] for entry in entries.values())
    extra = {"BlueprintDescription": wanted.description}
    subgraph = {
        "id": _uuid(wanted.name, ""),
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(entries), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": wanted.name,
        "inputNode": {"id": INPUTS, "bounding": [-220, 40, 140, 40 + 20 * len(inputs)]},
        "outputNode": {"id": OUTPUTS, "bounding": [right + 80, 40, 140, 40 + 20 * len(outputs)]},
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": list(entries.values()),
        "groups": [],
        "links": [dict(zip(_LINK, link, strict=True)) for link in links],
        "extra": extra,
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [_instance(wanted, inputs, outputs, entries)],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
        "extra": extra,
    }


def _lead_in(
    wanted: Blueprint, entries: Mapping[str, dict[str, Any]], links: list[list[Any]]
) -> Iterator[dict[str, Any]]:
    """The subgraph's inputs, which are linked with the nodes inside."""
    for number, (name, targets) in enumerate(wanted.inputs.items()):
        first, kind = len(links) + 1, ""
        for node, slot in targets:
            into = [given["name"] for given in entries[node]["inputs"]].index(slot)
            kind = entries[node]["inputs"][into]["type"]
            entries[node]["inputs"][into]["link"] = len(links) + 1
            links.append([len(links) + 1, INPUTS, number, entries[node]["id"], into, kind])
        made = list(range(first, len(links) + 1))
        yield {"id": _uuid(wanted.name, name), "name": name, "type": kind, "linkIds": made}


def _lead_out(
    wanted: Blueprint, entries: Mapping[str, dict[str, Any]], links: list[list[Any]]
) -> Iterator[dict[str, Any]]:
    """The subgraph's outputs, which are linked with the nodes inside."""
    for number, (name, source) in enumerate(wanted.outputs.items()):
        out = [given["name"] for given in entries[source.node]["outputs"]].index(source.name)
        given = entries[source.node]["outputs"][out]
        links.append([len(links) + 1, entries[source.node]["id"], out, OUTPUTS, number, given["type"]])
        given["links"].append(len(links))
        yield {"id": _uuid(wanted.name, f"out {name}"), "name": name, "type": given["type"], "linkIds": [len(links)]}


def _instance(
    wanted: Blueprint,
    inputs: list[dict[str, Any]],
    outputs: list[dict[str, Any]],
    entries: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """The node that stands for the subgraph; the widgets of its inputs are those of the first node inside."""
    slots = []
    for each, ((node, name), *_) in zip(inputs, wanted.inputs.values(), strict=True):
        slot = {"name": each["name"], "type": each["type"], "link": None}
        if any(given["name"] == name and "widget" in given for given in entries[node]["inputs"]):
            slot["widget"] = {"name": each["name"]}
        slots.append(slot)
    return {
        "id": 1,
        "type": _uuid(wanted.name, ""),
        "pos": [0, 0],
        "size": [NODE_WIDTH, 60 + 30 * len(slots)],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": slots,
        "outputs": [{"name": each["name"], "type": each["type"], "links": []} for each in outputs],
        "title": wanted.name,
        "properties": {},
        "widgets_values": [],
    }


_LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")


def _uuid(name: str, part: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"unguide/{name}/{part}"))


def _graph(
    columns: tuple[Column, ...], object_info: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[list[Any]], list[dict[str, Any]]]:
    """The nodes by name, placed and linked; the links; the groups. Raises: DevError."""
    nodes = [node for column in columns for group in column.groups for node in group.nodes]
    numbers = {node.name: number for number, node in enumerate(nodes, 1)}
    if len(numbers) != len(nodes):
        raise DevError(f"two nodes have one name: {', '.join(node.name for node in nodes)}")
    entries = {node.name: _entry(node, numbers, object_info) for node in nodes}
    return entries, _connect(nodes, entries), list(_place(columns, entries))


def _entry(node: Node, numbers: Mapping[str, int], object_info: Mapping[str, Any]) -> dict[str, Any]:
    """A node of the file, not yet placed and not yet linked."""
    entry: dict[str, Any] = {"id": numbers[node.name], "type": node.kind, "pos": [], "size": [0, node.height]}
    entry |= {"flags": {}, "order": numbers[node.name] - 1, "mode": 0}
    if node.kind == NOTE:
        entry |= {"inputs": [], "outputs": [], "properties": {}, "widgets_values": [node.inputs["text"]]}
    else:
        if node.kind not in object_info:
            raise DevError(f"there is no node {node.kind!r} in this ComfyUI")
        info = object_info[node.kind]
        inputs = list(specified(info))
        if unknown := set(node.inputs) - {name for name, *_ in inputs}:
            raise DevError(f"{node.kind} has no input {', '.join(sorted(unknown))}")
        slots = [_slot(*given) for given in inputs]
        entry["inputs"] = sorted(slots, key=lambda slot: "widget" in slot)
        kinds, names = info["output"], info["output_name"]
        entry["outputs"] = [{"name": n, "type": k, "links": []} for n, k in zip(names, kinds, strict=True)]
        entry["properties"] = {"Node name for S&R": node.kind}
        if not node.own_first:
            entry["widgets_values"] = list(_values(node, inputs))
    if node.title:
        entry["title"] = node.title
    colour = node.colour or ("note" if node.kind == NOTE else "ours" if node.kind.startswith("UnGuide") else "")
    if colour:
        entry["color"], entry["bgcolor"] = COLOURS[colour]
    return entry


def _slot(name: str, kind: str, optional: bool, options: Mapping[str, Any]) -> dict[str, Any]:
    slot: dict[str, Any] = {"name": name, "type": kind, "link": None}
    if optional:
        slot["shape"] = 7
    if is_widget(kind, options):
        slot["widget"] = {"name": name}
    return slot


def _values(node: Node, inputs: list[tuple[str, str, bool, Mapping[str, Any]]]) -> Iterator[Any]:
    """The widgets' values, in order; behind a seed stands what becomes of it after a run."""
    for name, kind, _, options in inputs:
        if is_widget(kind, options):
            given = node.inputs.get(name)
            yield default(kind, options) if given is None or isinstance(given, Output) else given
            if options.get("control_after_generate"):
                yield "fixed"


def _connect(nodes: list[Node], entries: Mapping[str, dict[str, Any]]) -> list[list[Any]]:
    """The links, which are entered at both ends too."""
    links: list[list[Any]] = []
    for node in nodes:
        for name, given in node.inputs.items():
            if not isinstance(given, Output):
                continue
            source, sink = entries[given.node], entries[node.name]
            names = [slot["name"] for slot in source["outputs"]]
            if given.name not in names:
                raise DevError(f"{source['type']} has no output {given.name!r}; it has {', '.join(names)}")
            out = names.index(given.name)
            into = [slot["name"] for slot in sink["inputs"]].index(name)
            number = len(links) + 1
            source["outputs"][out]["links"].append(number)
            sink["inputs"][into]["link"] = number
            links.append([number, source["id"], out, sink["id"], into, source["outputs"][out]["type"]])
    return links


def _place(columns: tuple[Column, ...], entries: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Gives every node its place and width, column by column, and yields the groups around them."""
    left, number = 0, 0
    for column in columns:
        top = 0
        for group in column.groups:
            inset = PADDING if group.title else 0
            y = top + (GROUP_BAR if group.title else 0)
            for node in group.nodes:
                entry = entries[node.name]
                entry["pos"] = [left + inset, y + TITLE_BAR]
                entry["size"][0] = column.width - 2 * inset
                y += TITLE_BAR + node.height + PADDING
            if group.title:
                number += 1
                yield {
                    "id": number,
                    "title": group.title,
                    "bounding": [left, top, column.width, y - top],
                    "color": GROUP_COLOURS[(number - 1) % len(GROUP_COLOURS)],
                    "flags": {},
                }
            top = y + PADDING
        left += column.width + GAP


def _view(stem: str, nodes: list[dict[str, Any]], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The view that shows everything, in the middle of what the page leaves free, at its own scale at most."""
    right = max(node["pos"][0] + node["size"][0] + PADDING for node in nodes)
    bottom = max(
        [node["pos"][1] + node["size"][1] for node in nodes] + [g["bounding"][1] + g["bounding"][3] for g in groups]
    )
    width, height = WINDOW[0] - CHROME[0] - CHROME[2], WINDOW[1] - CHROME[1] - CHROME[3]
    scale = round(min(1.0, width / right, height / bottom), 3)
    if scale < LEGIBLE:
        raise DevError(
            f"{stem} is {right} x {bottom} and can be shown at {scale}; the least that is legible is {LEGIBLE}"
        )
    offset = [(CHROME[0] + (width - right * scale) / 2) / scale, (CHROME[1] + (height - bottom * scale) / 2) / scale]
    return {"scale": scale, "offset": [round(value, 1) for value in offset]}
