"""Every template in a real browser, in both renderers: it opens, nothing overlaps, it runs and shows its verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.browser.canvas import Canvas, template
from tests.conftest import ROOT

STEMS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
OWN_CHECKPOINT = "CheckpointLoaderSimple"
CAT = "a photo of the cat"
KEPT = "\n".join(f"a photo of the {word}" for word in ("dog", "bird", "ship", "car", "forest", "sea", "sky", "house"))
FEW = {"iterations": 2, "sampling_steps": 2, "scenes": "", "keep_prompts": KEPT, "preview_every": 0}
JUDGED = {"UnGuideSampler": "erased: ", "UnGuideModel": "erased: ", "UnGuideProbe": "detected: "}


@dataclass
class Visit:
    """What was seen of one template: nodes that overlap, by renderer and moment, how it ran, and its badges."""

    types: set[str]
    overlaps: dict[str, list[Any]] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        """Whether it needs nothing of the user's own."""
        return OWN_CHECKPOINT not in self.types


@pytest.fixture(scope="module", params=STEMS)
def visit(request: pytest.FixtureRequest, session_canvas: Canvas) -> Visit:
    """A template, opened, run in the classic canvas with few steps, and looked at in both renderers."""
    canvas, workflow = session_canvas, template(request.param)
    seen = Visit({node["type"] for node in workflow["nodes"]})
    for renderer in ("Nodes 2.0", "classic"):
        canvas.nodes_2(renderer == "Nodes 2.0")
        canvas.open(workflow)
        seen.overlaps[f"{renderer}, before"] = canvas.overlaps()
    if seen.runs:
        canvas.fill("*", steps=5, **FEW)
        canvas.fill("Prompt", text=CAT)
        seen.end = canvas.run()
        for renderer in ("classic", "Nodes 2.0"):
            canvas.nodes_2(renderer == "Nodes 2.0")
            seen.overlaps[f"{renderer}, after"] = canvas.overlaps()
            seen.verdicts[renderer] = canvas.verdicts()
        canvas.nodes_2(False)
    return seen


def test_nothing_overlaps_before_and_after_a_run(visit: Visit) -> None:
    assert len(visit.overlaps) == (4 if visit.runs else 2)
    assert {moment: pairs for moment, pairs in visit.overlaps.items() if pairs} == {}


def test_it_runs_and_shows_its_verdict(visit: Visit) -> None:
    if not visit.runs:
        assert visit.end == {}
        return
    assert visit.end["event"] == "execution_success", visit.end
    judging = visit.types & set(JUDGED)
    assert judging
    for renderer, badges in visit.verdicts.items():
        assert set(badges) == judging, renderer
        for node, (kind, text, visible) in badges.items():
            assert (kind, visible) == ("erased", True), (renderer, node)
            assert text == f"{JUDGED[node]}cat", (renderer, node)


def test_a_template_is_opened_from_the_template_browser(canvas: Canvas) -> None:
    page = canvas.page
    page.locator("button:has-text('Templates')").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("unguide", exact=False).first.click()
    page.wait_for_timeout(800)
    dialog.get_by_text(STEMS[0], exact=False).first.click()
    page.wait_for_timeout(1500)
    nodes = page.evaluate("() => app.graph.nodes.map(node => node.type)")
    assert sorted(nodes) == sorted(node["type"] for node in template(STEMS[0])["nodes"])
