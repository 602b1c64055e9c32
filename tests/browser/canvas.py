"""ComfyUI's page as a person uses it: opens workflows, fills widgets in, presses Run, reads what is there."""

from __future__ import annotations

import json
import time
from itertools import combinations
from typing import Any

from playwright.sync_api import Page

from dev.server import Server
from tests.conftest import ROOT

READY = "() => window.app && app.graph && app.extensionManager"
FRAMES = 4  # a second: enough to look at, and it leaves the processor to the model
ENDS = ("execution_success", "execution_error", "execution_interrupted")
LISTEN = """ends => {
  window.heard = {texts: [], previews: 0, end: null};
  if (window.hearing) return;
  window.hearing = true;
  for (const end of ends) app.api.addEventListener(end, ({detail}) => { window.heard.end = {event: end, ...detail}; });
  app.api.addEventListener("progress_text", ({detail}) => window.heard.texts.push(detail.text));
  for (const kind of ["b_preview", "b_preview_with_metadata"])
    app.api.addEventListener(kind, () => { window.heard.previews += 1; });
}"""
FIT = """() => {
  const boxes = app.graph.nodes.map(node => [...node.pos, ...node.size]);
  if (!boxes.length) return;
  const [left, top] = [0, 1].map(axis => Math.min(...boxes.map(box => box[axis])));
  const [right, bottom] = [0, 1].map(axis => Math.max(...boxes.map(box => box[axis] + box[axis + 2])));
  const {ds} = app.canvas;
  ds.scale = Math.min(1, 1400 / (right - left), 800 / (bottom - top));
  ds.offset = [100 / ds.scale - left, 120 / ds.scale - top];
  app.canvas.setDirty(true, true);
}"""
CLASSIC_BOXES = """() => app.graph.nodes.map(node => {
  node.updateArea?.();
  const [x, y, width, height] = node.boundingRect;
  return [`${node.type} ${node.id}`, x, y, width, height];
})"""
NODES_2_BOXES = """() => [...document.querySelectorAll("[data-node-id]")].map(element => {
  const {x, y, width, height} = element.getBoundingClientRect();
  const node = app.graph.getNodeById(Number(element.dataset.nodeId));
  return [`${node?.type} ${element.dataset.nodeId}`, x, y, width, height];
})"""
VERDICTS = """() => app.graph.nodes.flatMap(node => {
  const element = node.widgets?.find(widget => widget.name === "verdict")?.element;
  if (!element) return [];
  const oneLine = element.offsetWidth > 100 && element.offsetHeight < 32;
  return [[node.type, [element.dataset.unguideVerdict ?? "", element.textContent, oneLine]]];
})"""


class Canvas:
    """One page of a running server."""

    def __init__(self, page: Page, server: Server) -> None:
        self.page, self.server = page, server
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def visit(self) -> None:
        """Open the page; the first visit shows the templates, which Escape closes."""
        self.page.goto(self.server.api.url)
        self.page.wait_for_function(READY)
        self.page.wait_for_timeout(1500)
        self.page.keyboard.press("Escape")
        self.set("LiteGraph.Canvas.MaximumFps", FRAMES)
        self.set("Comfy.Minimap.Visible", False)

    def set(self, name: str, value: Any) -> None:
        """Change a setting."""
        self.page.evaluate("async ([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])

    def nodes_2(self, on: bool) -> None:
        """Switch between the classic canvas and Nodes 2.0."""
        if self.page.evaluate("() => LiteGraph.vueNodesMode") != on:
            self.set("Comfy.VueNodes.Enabled", on)
            self.page.wait_for_timeout(1000)

    def clear(self) -> None:
        self.page.keyboard.press("Escape")
        self.open({"nodes": [], "links": [], "version": 0.4})

    def open(self, workflow: dict[str, Any]) -> None:
        """Load a workflow and show all of it."""
        self.page.evaluate("async workflow => app.loadGraphData(workflow)", workflow)
        self.page.wait_for_timeout(800)
        self.page.evaluate(FIT)
        self.page.wait_for_timeout(700)

    def fill(self, title: str, **values: Any) -> None:
        """Fill widgets in, on all nodes of that type or title that have them."""
        self.page.evaluate(
            """([title, values]) => {
              const chosen = app.graph.nodes.filter(node => ["*", node.type, node.title].includes(title));
              for (const widget of chosen.flatMap(node => node.widgets ?? []).filter(each => each.name in values)) {
                widget.value = values[widget.name];
                widget.callback?.(widget.value);
              } }""",
            [title, values],
        )

    def add(self, kind: str) -> None:
        """Add a node."""
        self.page.evaluate(
            "kind => { const node = LiteGraph.createNode(kind); node.pos = [400, 200]; app.graph.add(node); }", kind
        )
        self.page.wait_for_timeout(600)

    def see(self, x: float, y: float, scale: float) -> None:
        """Move the view so that the place (x, y) of the graph is at the window's upper left corner."""
        self.page.evaluate(
            "([x, y, scale]) => { app.canvas.ds.scale = scale; app.canvas.ds.offset = [-x, -y]; "
            "app.canvas.setDirty(true, true); }",
            [x, y, scale],
        )
        self.page.wait_for_timeout(600)

    def start(self) -> None:
        """Press Run."""
        self.page.evaluate(LISTEN, list(ENDS))
        self.page.get_by_test_id("queue-button").click()

    def wait(self, until: str = "heard.end", timeout: float = 120.0) -> Any:
        """Wait for an expression about what was `heard`, and return it: `texts`, `previews` and the `end`."""
        deadline = time.monotonic() + timeout
        while not self.page.evaluate(f"() => Boolean({until})"):
            assert time.monotonic() < deadline, f"{until} did not come; heard {self.page.evaluate('() => heard')}"
            self.server.check()
            self.page.wait_for_timeout(200)
        return self.page.evaluate(f"() => {until}")

    def run(self, timeout: float = 120.0) -> dict[str, Any]:
        """Press Run and return how it ended, once the page has drawn it."""
        self.start()
        end = self.wait(timeout=timeout)
        self.page.wait_for_timeout(1200)
        return dict(end)

    def verdicts(self) -> dict[str, tuple[str, str, bool]]:
        """Kind and text of every badge by the type of its node, and whether it is one line on the screen."""
        return {kind: tuple(badge) for kind, badge in self.page.evaluate(VERDICTS)}

    def overlaps(self) -> list[tuple[str, str]]:
        """The nodes that lie on one another, pair by pair."""
        vue = self.page.evaluate("() => LiteGraph.vueNodesMode")
        boxes = self.page.evaluate(NODES_2_BOXES if vue else CLASSIC_BOXES)
        assert len(boxes) == self.page.evaluate("() => app.graph.nodes.length")
        return [(one[0], other[0]) for one, other in combinations(boxes, 2) if _meet(one[1:], other[1:])]

    def search(self, term: str) -> list[str]:
        """The names of the nodes that the search finds, as listed."""
        self.page.mouse.dblclick(700, 450)
        self.page.wait_for_timeout(500)
        self.page.keyboard.type(term)
        self.page.wait_for_timeout(900)
        found = [option.split("\n")[0] for option in self.page.locator("[role=option]").all_inner_texts()]
        for _ in range(2):
            self.page.keyboard.press("Escape")
        self.page.wait_for_timeout(200)
        return found


def template(stem: str) -> dict[str, Any]:
    """A shipped workflow."""
    return dict(json.loads((ROOT / "workflows" / f"{stem}.json").read_text(encoding="utf-8")))


def _meet(one: list[float], other: list[float], slack: float = 1.0) -> bool:
    (ax, ay, aw, ah), (bx, by, bw, bh) = one, other
    return ax + aw > bx + slack and bx + bw > ax + slack and ay + ah > by + slack and by + bh > ay + slack
