"""Screenshots of the nodes for their help pages: `python3 dev screenshots`.

Runs in the host's python, which has playwright, and in the browser that UNGUIDE_BROWSER names.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import FloatRect

from dev.browser import VARIABLE
from dev.host import Host
from dev.layout import COLOURS
from dev.page import Canvas, opened, template
from dev.server import running_server
from dev.workspace import PACK

DOCS = PACK / "web" / "docs"
QUALITY = 82
AROUND = (8, 8, 62, 8)
"""What is shown around a node, in the canvas' units: left, right, above with its title bar and its badge, below."""
AWAY = (4000, 4000)
"""A place where no other node lies."""
END = "heard.end"
LEARNING = "heard.previews > 0 && heard.texts.some(text => /^[3-9]\\d of \\d+: loss/.test(text))"
CONNECT = """([kind, colours]) => {
  const node = app.graph.nodes.find(node => node.type === kind);
  [node.color, node.bgcolor] = colours;
  for (const [slot, input] of node.inputs.entries()) {
    if (input.widget || input.link != null || input.shape === 7) continue;
    const giver = app.graph.nodes.find(other => other.outputs?.some(output => output.type === input.type));
    giver?.connect(giver.outputs.findIndex(output => output.type === input.type), node, slot);
  }
}"""
STAND = """([kind, place, size]) => {
  const node = app.graph.nodes.find(node => node.type === kind);
  app.canvas.links_render_mode = LiteGraph.HIDDEN_LINK;
  app.canvas.deselectAll?.();
  node.pos = place;
  node.setSize([size[0] || node.size[0], size[1] || node.computeSize()[1]]);
  return [...node.size];
}"""


@dataclass(frozen=True)
class Shot:
    """A node in a template.

    Args:
        until: what to wait for after Run, as `Canvas.wait` has it; "" for a node that has not run.
        values: of the node's widgets.
        size: width and height; 0 takes the template's width, and the height that the widgets need.
    """

    stem: str = "1_quick_start"
    until: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)


SHOTS = {
    "UnGuideDemoModel": Shot(),
    "UnGuideLoadErasureLora": Shot(),
    "UnGuideSampler": Shot(until=END, size=(0, 500)),
    "UnGuideProbe": Shot("2_probe_then_sample", until=END, size=(0, 700)),
    "UnGuideModel": Shot("2_probe_then_sample", until=END),
    "UnGuideSettings": Shot("4_custom_sampling"),
    "UnGuideEraseConcept": Shot("0_erase_a_word"),
    "UnGuideCalibrate": Shot(size=(340, 0)),
    "UnGuideSaveErasureLora": Shot(until=END, values={"filename_prefix": "loras/forget_cat"}, size=(340, 0)),
    "UnGuideTrainErasureLora": Shot("5_train_erasure_lora", until=LEARNING, size=(0, 640)),
}


def take(canvas: Canvas, kind: str, shot: Shot) -> None:
    """Write the screenshot of a node."""
    canvas.clear()
    canvas.open(template(shot.stem))
    if not canvas.page.evaluate("kind => app.graph.nodes.some(node => node.type === kind)", kind):
        canvas.add(kind)
        canvas.page.evaluate(CONNECT, [kind, COLOURS["ours"]])
    canvas.fill(kind, **shot.values)
    if shot.until:
        canvas.server.api.request("/free", {"free_memory": True})  # or a node that ran before says nothing
        canvas.page.wait_for_timeout(2000)
    if shot.until == END:
        canvas.run()
    elif shot.until:
        canvas.start()
        canvas.wait(shot.until)
    left, right, above, below = AROUND
    width, height = canvas.page.evaluate(STAND, [kind, AWAY, shot.size])
    canvas.see(AWAY[0] - 200, AWAY[1] - 150, 1.0)
    box = canvas.page.locator("canvas").first.bounding_box() or {"x": 0.0, "y": 0.0}
    clip: FloatRect = {
        "x": box["x"] + 200 - left,
        "y": box["y"] + 150 - above,
        "width": left + width + right,
        "height": above + height + below,
    }
    canvas.page.screenshot(path=DOCS / f"{kind}.jpg", type="jpeg", quality=QUALITY, clip=clip)
    sys.stdout.write(f"written: web/docs/{kind}.jpg\n")
    sys.stdout.flush()


def main() -> None:
    wanted = sys.argv[1:] or list(SHOTS)
    with running_server(Host.from_environment()) as server, opened(server, os.environ[VARIABLE]) as canvas:
        for kind in wanted:
            take(canvas, kind, SHOTS[kind])
        canvas.idle()


if __name__ == "__main__":
    main()
