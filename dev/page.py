"""ComfyUI's page as a person uses it: opens workflows, fills widgets in, presses Run, reads what is there.

Runs in the host's python, which has playwright. The tests in a browser and `python3 dev screenshots` use it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from playwright.sync_api import Locator, Page, ViewportSize, sync_playwright
from playwright.sync_api import TimeoutError as PageTimeout

from dev.server import Server
from dev.workspace import PACK

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
VIEW: ViewportSize = {"width": 1600, "height": 1000}
READY = "() => window.app && app.graph && app.extensionManager"
FRAMES = 8  # a second: enough to look at, and it leaves the processor to the model
PATIENCE = 900.0  # seconds for a run, on a machine that does much else
ALL_NODES = "app.graph.nodes.flatMap(node => [node, ...(node.subgraph?.nodes ?? [])])"
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
SETTLED = """async () => {
  const look = () => JSON.stringify([
    app.graph.nodes.map(node => [...node.pos, ...node.size]),
    [...document.querySelectorAll("[data-node-id]")].map(element => element.getBoundingClientRect().toJSON()),
    document.querySelectorAll("[role=option], [role=dialog], .litemenu-entry, .node-help-content img").length]);
  app.canvas.setDirty(true, true);
  const [frame, deadline] = [app.canvas.frame, performance.now() + 10000];
  for (let [last, same] = ["", 0]; same < 2 || app.canvas.frame < frame + 2; ) {
    await new Promise(resolve => setTimeout(() => requestAnimationFrame(resolve), 100));
    const now = look();
    [last, same] = [now, now === last ? same + 1 : 0];
    if (performance.now() > deadline) return;
  }
}"""
IMAGES = """() => app.graph.nodes.every(node =>
  !app.nodeOutputs[node.id]?.images?.length || LiteGraph.vueNodesMode || node.imgs?.every(image => image.complete))"""
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
        self.page, self.server, self.language = page, server, "en"
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.set_default_timeout(120_000)

    def visit(self) -> None:
        """Open the page; the first visit shows the templates, which Escape closes."""
        self.page.goto(self.server.api.url)
        self.page.wait_for_function(READY)
        self.page.wait_for_timeout(1500)
        self.page.keyboard.press("Escape")
        self.set("LiteGraph.Canvas.MaximumFps", FRAMES)
        self.set("Comfy.Minimap.Visible", False)

    def settle(self) -> None:
        """Wait until the page has drawn what was asked of it and nothing moves any more."""
        self.page.evaluate(SETTLED)

    def set(self, name: str, value: Any) -> None:
        """Change a setting."""
        self.page.evaluate("async ([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])

    def speak(self, language: str) -> None:
        """Show the page in a language, such as "zh"."""
        self.language = language
        self.set("Comfy.Locale", language)
        self.visit()

    def nodes_2(self, on: bool) -> None:
        """Switch between the classic canvas and Nodes 2.0."""
        if self.page.evaluate("() => LiteGraph.vueNodesMode") != on:
            self.set("Comfy.VueNodes.Enabled", on)
            self.settle()

    def clear(self) -> None:
        """An empty graph, and nothing that runs or waits to run."""
        self.idle()
        self.page.keyboard.press("Escape")
        self.open({"nodes": [], "links": [], "version": 0.4})

    def idle(self) -> None:
        """End what runs, and forget what waits."""
        deadline = time.monotonic() + PATIENCE
        while any(self.server.api.get("/queue").values()):
            assert time.monotonic() < deadline, "the run could not be ended"
            self.server.api.request("/queue", {"clear": True})
            self.server.api.interrupt()
            self.page.wait_for_timeout(500)

    def open(self, workflow: dict[str, Any]) -> None:
        """Load a workflow and show all of it."""
        self.page.evaluate("async workflow => app.loadGraphData(workflow)", workflow)
        self.page.evaluate(FIT)
        self.settle()

    def fill(self, title: str, **values: Any) -> None:
        """Fill widgets in, on all nodes of that type or title that have them, subgraphs included."""
        self.page.evaluate(
            f"""([title, values]) => {{
              const chosen = {ALL_NODES}.filter(node => ["*", node.type, node.title].includes(title));"""
            """
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
        self.settle()

    def see(self, x: float, y: float, scale: float) -> None:
        """Move the view so that the place (x, y) of the graph is at the window's upper left corner."""
        self.page.evaluate(
            "([x, y, scale]) => { app.canvas.ds.scale = scale; app.canvas.ds.offset = [-x, -y]; "
            "app.canvas.setDirty(true, true); }",
            [x, y, scale],
        )
        self.settle()

    def choose_template(self, stem: str) -> None:
        """Open a template as a newcomer does, from the template browser."""
        self.page.locator("button:has-text('Templates')").first.click()
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_text("unguide", exact=False).first.click()
        dialog.get_by_text(stem, exact=False).first.click()
        dialog.wait_for(state="hidden")
        self.settle()

    def take_from_search(self, name: str) -> None:
        """Put the first thing that the search finds at the free place below everything."""
        bottom = "() => Math.max(...app.graph.nodes.map(node => node.pos[1] + node.size[1])) + 100"
        self.see(0, self.page.evaluate(bottom), 1.0)
        self._find(name)
        self.page.keyboard.press("Enter")
        self.settle()
        self.page.mouse.click(700, 450)
        self.page.evaluate(FIT)
        self.settle()

    def listen(self) -> None:
        """Begin to hear what the server says of the next run."""
        self.page.evaluate(LISTEN, list(ENDS))

    def start(self) -> None:
        """Press Run."""
        self.listen()
        self.page.get_by_test_id("queue-button").click()

    def wait(self, until: str = "heard.end", timeout: float = PATIENCE) -> Any:
        """Wait for an expression about what was `heard`, and return it: `texts`, `previews` and the `end`."""
        deadline = time.monotonic() + timeout
        while not self.page.evaluate(f"() => Boolean({until})"):
            if time.monotonic() > deadline:
                self.idle()
                raise AssertionError(f"{until} did not come; heard {self.page.evaluate('() => heard')}")
            self.server.check()
            self.page.wait_for_timeout(200)
        return self.page.evaluate(f"() => {until}")

    def run(self, timeout: float = PATIENCE) -> dict[str, Any]:
        """Press Run and return how it ended, once the page has drawn it."""
        self.start()
        end = self.wait(timeout=timeout)
        self.page.wait_for_function(IMAGES)
        self.settle()
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
        options = self._find(term)
        found = [option.split("\n")[0] for option in options.all_inner_texts()]
        while options.count():
            self.page.keyboard.press("Escape")
            self.settle()
        return found

    def help_of(self, kind: str) -> tuple[str, list[int]]:
        """The text of a node's help page, and the widths of its images."""
        self.add(kind)
        self.page.evaluate("() => app.canvas.selectNode(app.graph.nodes.at(-1))")
        button = self.page.get_by_test_id("info-button").first
        button.wait_for(state="attached")
        button.evaluate("button => button.click()")
        help_page = self.page.locator(".node-help-content")
        help_page.locator("img").first.wait_for()
        self.settle()
        widths = "() => [...document.querySelectorAll('.node-help-content img')].map(image => image.naturalWidth)"
        return help_page.inner_text(), list(self.page.evaluate(widths))

    def _find(self, term: str) -> Locator:
        """Open the search and type; what it lists. A busy page may take a double click for two single ones: again."""
        options = self.page.locator("[role=option]")
        deadline = time.monotonic() + PATIENCE
        while not options.count():
            assert time.monotonic() < deadline, "a double click on the empty canvas opens no search"
            self.page.mouse.dblclick(700, 450)
            with contextlib.suppress(PageTimeout):
                options.first.wait_for(timeout=5000)
        self.page.keyboard.type(term)
        self.page.wait_for_timeout(400)  # the page searches when the typing has stopped
        self.settle()
        return options


@contextlib.contextmanager
def opened(server: Server, browser_path: str) -> Iterator[Canvas]:
    """The page of a server in a Chromium without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=FLAGS)
        try:
            canvas = Canvas(browser.new_context(viewport=VIEW).new_page(), server)
            canvas.visit()
            yield canvas
        finally:
            browser.close()


def template(stem: str) -> dict[str, Any]:
    """A shipped workflow."""
    return dict(json.loads((PACK / "workflows" / f"{stem}.json").read_text(encoding="utf-8")))


def _meet(one: list[float], other: list[float], slack: float = 1.0) -> bool:
    (ax, ay, aw, ah), (bx, by, bw, bh) = one, other
    return ax + aw > bx + slack and bx + bw > ax + slack and ay + ah > by + slack and by + bh > ay + slack
