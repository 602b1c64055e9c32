"""The templates' thumbnails: what each generates with the demo model, beside what the model alone generates.

Runs in the host's python, which has Pillow: `python3 dev templates --thumbnails`. The comparison is always among them.
"""

from __future__ import annotations

import io
import json
import sys
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from dev import workflow
from dev.api import Graph
from dev.host import Host
from dev.server import Server, running_server
from dev.workspace import PACK

WORKFLOWS = PACK / "workflows"
SIZE = (1040, 585)
MARGIN, CAPTION = 24, 56
GROUND, TEXT = "#14181f", "#f2f4f8"
COMPARISON = "3_compare_base_lora_unguide"
SMALL = {"width": 64, "height": 64, "ckpt_name": "unguide-demo.safetensors"}
"""For templates that start from a checkpoint of the user's: the demo's, at its own size."""
LONGEST = 7200.0
"""Seconds for a template: some train, on a machine that may do much else."""
BASE = "1: base"
TITLES = {"the model": BASE, "the LoRA alone": "2: LoRA only", "UnGuide": "3: UnGuide"}
CAPTIONS = {
    "0_erase_a_word": ("the model", "a word: erased", "a dog: the same"),
    "1_quick_start": ("the model", "a cat: erased", "a dog: the same"),
    "2_probe_then_sample": ("the model", "detected: cat", "not detected"),
    "4_custom_sampling": ("the model", "any sampler: cat", "any sampler: dog"),
    "6_train_on_your_checkpoint": ("your model", "forgets a word", "keeps the rest"),
    "5_train_erasure_lora": ("the model", "trained: cat", "trained: dog"),
}


def images(server: Server, object_info: dict[str, Any], stem: str, prompt: str) -> dict[str, Image.Image]:
    """What the template's Save Image nodes write for a prompt, by the nodes' titles."""
    content = json.loads((WORKFLOWS / f"{stem}.json").read_text(encoding="utf-8"))
    graph: Graph = workflow.to_api(content, object_info)
    for node in graph.values():
        if node["_meta"]["title"] == "Prompt":
            node["inputs"]["text"] = f"a photo of the {prompt}"
        node["inputs"] |= {name: value for name, value in SMALL.items() if name in node["inputs"]}
    found = server.api.images(server.api.run(graph, LONGEST))
    saved = {key: node["_meta"]["title"] for key, node in graph.items() if node["class_type"] == "SaveImage"}
    return {title: Image.open(io.BytesIO(found[key][0])).convert("RGB") for key, title in saved.items()}


def row(tiles: list[tuple[str, Image.Image]]) -> Image.Image:
    """Captions over images, beside one another."""
    canvas = Image.new("RGB", SIZE, GROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(30)
    side = (SIZE[0] - MARGIN * (len(tiles) + 1)) // len(tiles)
    top = (SIZE[1] - side - CAPTION) // 2
    for number, (caption, image) in enumerate(tiles):
        left = MARGIN + number * (side + MARGIN)
        draw.text((left + side / 2, top + CAPTION / 2 - 6), caption, fill=TEXT, font=font, anchor="mm")
        canvas.paste(image.resize((side, side), Image.Resampling.LANCZOS), (left, top + CAPTION))
    return canvas


def save(stem: str, tiles: list[tuple[str, Image.Image]]) -> None:
    """Writes a template's thumbnail."""
    row(tiles).save(WORKFLOWS / f"{stem}.jpg", quality=85)
    sys.stdout.write(f"written: workflows/{stem}.jpg\n")
    sys.stdout.flush()


def main() -> None:
    wanted = sys.argv[1:]
    with running_server(Host.from_environment()) as server:
        object_info = server.api.get("/object_info")
        cat = images(server, object_info, COMPARISON, "cat")
        save(COMPARISON, [(caption, cat[title]) for caption, title in TITLES.items()])
        for stem, captions in CAPTIONS.items():
            if wanted and stem not in wanted:
                continue
            results = [images(server, object_info, stem, prompt)["Image"] for prompt in ("cat", "dog")]
            save(stem, list(zip(captions, (cat[BASE], *results), strict=True)))


if __name__ == "__main__":
    main()
