"""A workflow file as a person opens it (UI format), turned into what the server runs (API format).

The page does the same when a person presses Run. It does not know files and servers: the node types come in as the
server's /object_info.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dev.api import Graph
from dev.report import DevError

# shown by the page alone
NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
# values of the widget that the page puts behind a seed
CONTROLS = ("fixed", "increment", "decrement", "randomize")

Node = dict[str, Any]


def to_api(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> Graph:
    """The API-format graph of a UI-format workflow (version 0.4), titles included.

    Args:
        object_info: the server's node types, which name the widgets that `widgets_values` lists without names.
    Raises: DevError for a node type that the server does not have, a muted or bypassed node, and widget values
        that are too few or too many.
    """
    links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    return {str(node["id"]): _api_node(node, links, object_info) for node in workflow["nodes"] if not _is_note(node)}


def node_of(graph: Graph, **inputs: Any) -> str:
    """The id of the one node whose inputs have these values."""
    wanted = inputs.items()
    found = [
        key for key, node in graph.items() if wanted <= {k: v for k, v in node["inputs"].items() if _plain(v)}.items()
    ]
    return _only(found, f"inputs {inputs}")


def node_of_type(graph: Graph, class_type: str) -> str:
    """The id of the one node of that type."""
    return _only([key for key, node in graph.items() if node["class_type"] == class_type], f"type {class_type}")


def upstream(graph: Graph, targets: tuple[str, ...]) -> Graph:
    """The part of a graph that these nodes need, themselves included."""
    needed: set[str] = set()
    waiting = list(targets)
    while waiting:
        key = waiting.pop()
        if key not in needed:
            needed.add(key)
            waiting += [value[0] for value in graph[key]["inputs"].values() if isinstance(value, list)]
    return {key: node for key, node in graph.items() if key in needed}


def _is_note(node: Node) -> bool:
    return node["type"] in NOTES


def _api_node(node: Node, links: Mapping[int, tuple[str, int]], object_info: Mapping[str, Any]) -> Node:
    where = f"node {node['id']} ({node['type']})"
    if node["type"] not in object_info:
        raise DevError(f"{where} of the workflow is of a type that this ComfyUI does not have")
    if node.get("mode", 0) != 0:
        raise DevError(f"{where} of the workflow is muted or bypassed; only workflows without such nodes are run here")
    info = object_info[node["type"]]
    connected = {slot["name"]: links[slot["link"]] for slot in node.get("inputs", []) if slot.get("link") is not None}
    values = _widget_values(info, node.get("widgets_values"), where)
    inputs = {**values, **{name: list(link) for name, link in connected.items()}}
    title = node.get("title") or info.get("display_name") or node["type"]
    return {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}


def _widget_values(info: Mapping[str, Any], values: list[Any] | None, where: str) -> dict[str, Any]:
    """The widgets' values by name: the file lists them in the order of the inputs, a seed's control behind it.

    A file without the list leaves the values to the page, which takes the defaults.
    """
    if values is None:
        return {name: default(kind, options) for name, kind, options in _widgets(info)}
    named: dict[str, Any] = {}
    waiting = list(values)
    for name, _, options in _widgets(info):
        if not waiting:
            raise DevError(f"{where} of the workflow has {len(values)} widget values, and none for {name!r}")
        named[name] = waiting.pop(0)
        if options.get("control_after_generate") and waiting and waiting[0] in CONTROLS:
            waiting.pop(0)
    if waiting:
        raise DevError(f"{where} of the workflow has more widget values than inputs: {waiting} are left over")
    return named


def default(kind: str, options: Mapping[str, Any]) -> Any:
    """What a new widget holds: the default, or the first entry of a list."""
    first = (options.get("options") or [""])[0] if kind == "COMBO" else ""
    return options.get("default", first)


def specified(info: Mapping[str, Any]) -> Iterator[tuple[str, str, bool, Mapping[str, Any]]]:
    """Every input of a node type: its name, its type, whether it is optional, and its options."""
    for section in ("required", "optional"):
        for name in info["input_order"].get(section, ()):
            kind, *rest = info["input"][section][name]
            options = rest[0] if rest else {}
            if isinstance(kind, list):  # nodes of the older kind list a combo's entries in place of the type
                kind, options = "COMBO", {**options, "options": kind}
            yield name, kind, section == "optional", options


def is_widget(kind: str, options: Mapping[str, Any]) -> bool:
    """Whether the page makes a widget of an input."""
    return kind in WIDGETS and not options.get("forceInput")


def _widgets(info: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for name, kind, _, options in specified(info):
        if is_widget(kind, options):
            yield name, kind, options


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _only(found: list[str], what: str) -> str:
    if len(found) != 1:
        raise DevError(f"the workflow has {len(found)} nodes with {what}; expected one")
    return found[0]
