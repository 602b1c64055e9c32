"""What the pack adds to the page, and what a person meets there: search, folded inputs, colours, errors, help."""

from __future__ import annotations

import re

import pytest

from dev.page import Canvas, template

WORDS = ("forget", "remove", "erase", "unlearn", "censor", "nsfw", "negative", "concept")
STARTS = {"UnGuide", "UnGuide Sampler", "Erase Concept"}
"""The nodes to start from: those that use an erasure LoRA, and the one that makes it from a word."""
PACK = re.compile("UnGuide|Erasure|Stability Probe|Erase")
VISIBLE = """kind => { const node = app.graph.nodes.find(node => node.type === kind);
  return node.widgets.filter(each => node.isWidgetVisible(each)).map(each => each.name); }"""
PRESS = """kind => app.graph.nodes.find(node => node.type === kind).widgets.find(
  widget => widget.name === "show_advanced").callback()"""
HEIGHT = "kind => app.graph.nodes.find(node => node.type === kind).size[1]"
FOLDING = ("UnGuideSettings", "UnGuideLoadErasureLora", "UnGuideCalibrate", "UnGuideTrainErasureLora")


def advanced_inputs(canvas: Canvas, kind: str) -> set[str]:
    """The names of a node's advanced inputs."""
    given = canvas.server.api.get(f"/object_info/{kind}")[kind]["input"]
    inputs = {**given.get("required", {}), **given.get("optional", {})}
    return {name for name, (_, *options) in inputs.items() if options and options[0].get("advanced")}


@pytest.mark.parametrize("kind", FOLDING)
def test_advanced_inputs_are_folded_away_until_they_are_asked_for(canvas: Canvas, kind: str) -> None:
    advanced = advanced_inputs(canvas, kind)
    assert len(advanced) >= 3
    canvas.add(kind)
    folded, height = canvas.page.evaluate(VISIBLE, kind), canvas.page.evaluate(HEIGHT, kind)
    assert not advanced & set(folded)
    assert folded[-1] == "show_advanced"
    assert height < 30 * (len(folded) + 12)
    canvas.page.evaluate(PRESS, kind)
    assert advanced <= set(canvas.page.evaluate(VISIBLE, kind))
    assert canvas.page.evaluate(HEIGHT, kind) > height
    canvas.page.evaluate(PRESS, kind)
    assert (canvas.page.evaluate(VISIBLE, kind), canvas.page.evaluate(HEIGHT, kind)) == (folded, height)


def test_nodes_2_folds_them_by_its_own_button_and_shows_no_second_one(canvas: Canvas) -> None:
    canvas.nodes_2(True)
    canvas.add("UnGuideSettings")
    shown = canvas.page.locator("[data-node-id]").first.inner_text()
    assert "probe_schedule_steps" not in shown
    assert "Show advanced" in shown
    assert shown.count("Show advanced") == 1


def test_what_the_page_adds_is_not_saved_with_the_workflow(canvas: Canvas) -> None:
    for kind in ("UnGuideSampler", "UnGuideSettings"):
        canvas.clear()
        canvas.add(kind)
        saved = canvas.page.evaluate("() => app.graph.serialize().nodes[0]")
        given = canvas.server.api.get(f"/object_info/{kind}")[kind]["input"]
        widgets = [
            name
            for name, (type_, *_) in {**given["required"], **given.get("optional", {})}.items()
            if isinstance(type_, list) or type_ in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
        ]
        assert len(saved["widgets_values"]) == len(widgets) + (kind == "UnGuideSampler")  # control_after_generate


@pytest.mark.parametrize("word", WORDS)
def test_what_a_person_wants_finds_the_node_for_it(canvas: Canvas, word: str) -> None:
    """The host ranks by a node's name before its search aliases, and its own popular nodes before all others."""
    found = canvas.search(word)
    ours = [name for name in found if PACK.search(name)]
    assert ours, found
    assert ours[0] in STARTS, found
    assert found.index(ours[0]) < 12, found


def test_wires_of_erasure_loras_have_a_colour_of_their_own_under_every_palette(canvas: Canvas) -> None:
    colours = """() => [
      app.canvas.default_connection_color_byType.ERASURE_LORA, LGraphCanvas.link_type_colors.ERASURE_LORA,
      getComputedStyle(document.documentElement).getPropertyValue("--color-datatype-ERASURE_LORA")]"""
    others = "() => Object.entries(LGraphCanvas.link_type_colors).filter(([n]) => n !== 'ERASURE_LORA').map(e => e[1])"
    for palette in ("light", "dark"):
        canvas.set("Comfy.ColorPalette", palette)
        canvas.clear()
        found = canvas.page.evaluate(colours)
        assert len(set(found)) == 1
        assert found[0].startswith("#")
        assert found[0] not in canvas.page.evaluate(others)


def test_load_erasure_lora_is_suggested_first_for_an_erasure_lora_input(canvas: Canvas) -> None:
    """A wire that is dragged from the input and dropped beside the node. Where the host opens its search box instead of
    a menu, the shortest names come first, and nobody can change that."""
    canvas.set("Comfy.LinkRelease.Action", "context menu")
    canvas.add("UnGuideModel")
    canvas.see(0, 0, 1.0)
    x, y = canvas.page.evaluate(
        """() => { const node = app.graph.nodes[0]; const slot = node.inputs.findIndex(i => i.name === "erasure_lora");
          const [x, y] = node.getInputPos(slot); const box = app.canvas.canvas.getBoundingClientRect();
          return [x + box.x, y + box.y]; }"""
    )
    canvas.page.mouse.move(x, y)
    canvas.page.mouse.down()
    canvas.page.mouse.move(x - 150, y + 250, steps=6)
    canvas.page.mouse.up()
    canvas.page.locator(".litemenu-entry").first.wait_for()
    menu = canvas.page.locator(".litemenu-entry").all_inner_texts()
    canvas.set("Comfy.LinkRelease.Action", "search box")
    suggested = [entry.strip() for entry in menu if PACK.search(entry)]
    assert suggested, menu
    assert suggested[0] in ("Load Erasure LoRA", "UnGuideLoadErasureLora")


def test_an_error_dialog_says_the_remedy_and_no_path(canvas: Canvas) -> None:
    canvas.open(template("5_train_erasure_lora"))
    canvas.fill("UnGuideTrainErasureLora", generate_instead="cat")
    end = canvas.run()
    assert end["event"] == "execution_error"
    assert "nothing to learn; use" in end["exception_message"]
    assert not re.search(r"/\w+/", end["exception_message"] + end["exception_type"])
    canvas.page.get_by_test_id("error-overlay-see-errors").click()
    canvas.settle()
    said = [line for line in canvas.page.locator("body").inner_text().splitlines() if "nothing to learn" in line]
    assert said
    assert not [line for line in said if re.search(r"/\w+/", line)]


def test_saving_shows_the_name_of_the_file_on_the_node(canvas: Canvas) -> None:
    for kind in ("UnGuideLoadErasureLora", "UnGuideSaveErasureLora"):
        canvas.add(kind)
    canvas.page.evaluate("() => app.graph.nodes[0].connect(0, app.graph.nodes[1], 0)")
    assert canvas.run()["event"] == "execution_success"
    shown = "() => app.graph.nodes[1].widgets.find(w => w.name === '$$node-text-preview')?.value"
    assert canvas.page.evaluate(shown) == "saved: loras/unguide_erasure_00001_.safetensors"


def test_a_nodes_help_shows_its_picture(canvas: Canvas) -> None:
    text, widths = canvas.help_of("UnGuideSampler")
    assert min(widths) > 100
    assert "bit for bit" in text
