"""The blueprints in a real browser: the search offers them, and they run inside a workflow."""

from __future__ import annotations

import json
import re

import pytest

from dev.page import Canvas, template
from tests.conftest import ROOT

NAMES = sorted(path.stem for path in (ROOT / "subgraphs").glob("*.json"))
IMAGE = {"Compare with and without UnGuide": "with UnGuide", "Erase one word": "image"}
TAKE_THE_SAMPLERS_PLACE = """([name, image]) => {
  const find = title => app.graph.nodes.find(node => node.title === title || node.type === title);
  const [blueprint, sampler, decode] = [find(name), find("UnGuideSampler"), find("VAEDecode")];
  const from = (node, slot) => {
    const input = node.inputs.find(each => each.name === slot);
    const link = input && app.graph.links.get(input.link);
    return link && [app.graph.getNodeById(link.origin_id), link.origin_slot];
  };
  const given = Object.fromEntries(["model", "positive", "negative", "latent_image", "erasure_lora"].map(
    slot => [slot, from(sampler, slot)]));
  given.vae = from(decode, "vae");
  given.clip = from(find("Prompt"), "clip");
  for (const [slot, input] of blueprint.inputs.entries())
    if (given[input.name]) given[input.name][0].connect(given[input.name][1], blueprint, slot);
  for (const [title, output, slot] of [["SaveImage", image, "images"], ["ImageScaleBy", image, "image"],
                                       ["PreviewAny", "report", "source"]])
    blueprint.connect(blueprint.findOutputSlot(output), find(title), find(title).findInputSlot(slot));
  app.graph.remove(sampler);
  app.graph.remove(decode);
}"""
REPORT = "() => app.graph.nodes.find(n => n.type === 'PreviewAny').widgets.map(w => String(w.value)).join(' ')"


@pytest.mark.parametrize("name", NAMES)
def test_a_blueprint_is_found_takes_the_samplers_place_and_runs(canvas: Canvas, name: str) -> None:
    canvas.open(template("1_quick_start"))
    canvas.take_from_search(name)
    wanted = json.loads((ROOT / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))["nodes"][0]
    inputs = "title => app.graph.nodes.find(node => node.title === title).inputs.map(input => input.name)"
    assert canvas.page.evaluate(inputs, name) == [slot["name"] for slot in wanted["inputs"]]
    canvas.page.evaluate(TAKE_THE_SAMPLERS_PLACE, [name, IMAGE[name]])
    canvas.fill("*", steps=3, shipped_prompts=8, scenes="")
    end = canvas.run()
    assert end["event"] == "execution_success", end
    assert re.match("Detected 'cat'", canvas.page.evaluate(REPORT))
