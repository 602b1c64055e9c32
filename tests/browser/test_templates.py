"""Every template in a real browser, in both renderers: it opens, nothing overlaps, it runs and shows its verdict."""

from __future__ import annotations

from typing import Any

import pytest

from dev.page import Canvas, template
from tests.conftest import ROOT

STEMS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
RENDERERS = ("Nodes 2.0", "classic")
OWN_CHECKPOINT = {"6_train_on_your_checkpoint"}
TRAINING = {"5_train_erasure_lora"}
RUNNING = [
    pytest.param(stem, marks=pytest.mark.lengthy if stem in TRAINING else ())
    for stem in STEMS
    if stem not in OWN_CHECKPOINT
]
CAT = "a photo of the cat"
FEW = {"steps": 3, "shipped_prompts": 8, "iterations": 2, "sampling_steps": 2, "scenes": "", "preview_every": 0}
KEPT = "\n".join(f"a photo of the {word}" for word in ("dog", "bird", "ship", "car", "forest", "sea", "sky", "house"))
JUDGED = {"UnGuideSampler": "erased: ", "UnGuideModel": "erased: ", "UnGuideProbe": "detected: "}


@pytest.mark.parametrize("stem", STEMS)
def test_a_template_opens_and_nothing_overlaps(canvas: Canvas, stem: str) -> None:
    workflow = template(stem)
    overlaps = {}
    for renderer in RENDERERS:
        canvas.nodes_2(renderer == "Nodes 2.0")
        canvas.open(workflow)
        overlaps[renderer] = canvas.overlaps()
        opened = canvas.page.evaluate("() => app.graph.nodes.map(node => [node.type, Boolean(node.has_errors)])")
        assert sorted(opened) == sorted([node["type"], False] for node in workflow["nodes"])
    assert overlaps == {renderer: [] for renderer in RENDERERS}


@pytest.mark.parametrize("stem", RUNNING)
def test_a_template_runs_shows_its_verdict_and_nothing_overlaps(canvas: Canvas, stem: str) -> None:
    workflow = template(stem)
    canvas.open(workflow)
    canvas.fill("*", **FEW)
    canvas.fill("UnGuideTrainErasureLora", keep_prompts=KEPT)
    canvas.fill("Prompt", text=CAT)
    end = canvas.run()
    assert end["event"] == "execution_success", end
    judging = {node["type"] for node in workflow["nodes"]} & set(JUDGED)
    assert judging
    overlaps: dict[str, Any] = {}
    for renderer in reversed(RENDERERS):
        canvas.nodes_2(renderer == "Nodes 2.0")
        overlaps[renderer] = canvas.overlaps()
        badges = canvas.verdicts()
        assert badges == {node: verdict_of(stem, node) for node in judging}, renderer
    assert overlaps == {renderer: [] for renderer in RENDERERS}


def verdict_of(stem: str, node: str) -> tuple[str, str, bool]:
    """The badge for a cat: its kind, its text, and that it is one line on the screen."""
    return "erased", f"{JUDGED[node]}cat", True


def test_what_needs_a_checkpoint_takes_the_first_one_of_the_users_own(canvas: Canvas) -> None:
    """A bare ComfyUI has none, and says so before anything runs."""
    (stem,) = OWN_CHECKPOINT
    canvas.open(template(stem))
    chosen = "() => app.graph.nodes.find(n => n.type === 'CheckpointLoaderSimple').widgets[0].value"
    assert not canvas.page.evaluate(chosen)


def test_a_template_is_opened_from_the_template_browser_in_a_view_that_shows_all_of_it(canvas: Canvas) -> None:
    canvas.choose_template(STEMS[0])
    nodes = canvas.page.evaluate("() => app.graph.nodes.map(node => node.type)")
    assert sorted(nodes) == sorted(node["type"] for node in template(STEMS[0])["nodes"])
    places = canvas.page.evaluate(
        """() => app.graph.nodes.map(node => [0, 1].flatMap(axis => [0, node.size[axis]].map(
          far => (node.pos[axis] + far + app.canvas.ds.offset[axis]) * app.canvas.ds.scale)))"""
    )
    for left, right, top, bottom in places:
        assert 0 <= left < right <= 1600
        assert 0 <= top < bottom <= 1000
    assert canvas.page.evaluate("() => app.canvas.ds.scale") >= 0.6


def test_the_quick_start_is_an_app_that_shows_its_image_and_its_report(canvas: Canvas) -> None:
    canvas.open(template("1_quick_start"))
    canvas.fill("UnGuideSampler", steps=3, seed=11)
    page = canvas.page
    page.get_by_role("button", name="Enter app mode").first.click()
    form = page.get_by_test_id("linear-widgets")
    form.wait_for()
    labels = [label.strip() for label in form.get_by_test_id("builder-widget-label").all_inner_texts()]
    assert labels == ["text", "lora_name", "seed", "preview_text"]
    canvas.listen()
    page.get_by_role("button", name="Run", exact=True).last.click()
    assert canvas.wait()["event"] == "execution_success"
    image = page.get_by_test_id("linear-center-panel").locator("img").first
    image.wait_for()
    canvas.settle()
    assert image.evaluate("image => image.naturalWidth") == 320
    prompt, report = (box.input_value() for box in form.locator("textarea").all())
    assert prompt == CAT
    assert report.startswith("Detected 'cat' in the prompt")
    page.get_by_role("button", name="Enter node graph").first.click()
    page.get_by_test_id("queue-button").wait_for()
