"""Training in the page: its progress, and how it is cancelled."""

from __future__ import annotations

import re

from dev.page import Canvas, template


def test_training_shows_progress_and_can_be_cancelled(canvas: Canvas) -> None:
    canvas.open(template("5_train_erasure_lora"))
    few = {"sampling_steps": 2, "synonyms": "", "scenes": "", "keep_prompts": "", "preview_every": 2}
    canvas.fill("UnGuideTrainErasureLora", iterations=500, **few)
    canvas.start()
    canvas.wait("heard.previews > 1 && heard.texts.some(text => /^[3-9] of 500: loss/.test(text))")
    canvas.page.get_by_role("button", name="Cancel current run").click()
    assert canvas.wait()["event"] == "execution_interrupted"
    texts = canvas.page.evaluate("() => heard.texts")
    counted = {text.split(":")[0] for text in texts if re.search(r"\d+ of \d+; \d+ s left", text)}
    assert counted >= {"Encoding prompts", "Generating latents to train at"}
    assert re.match(r"Cancelled at iteration \d+ of 500: nothing is kept", texts[-1])
    shown = "() => app.graph.nodes.flatMap(n => n.widgets ?? []).find(w => w.name === '$$node-text-preview')?.value"
    assert canvas.page.evaluate(shown) == texts[-1]
