"""Save Erasure LoRA on the real server: the file is where the host's own nodes put theirs, and loads at once."""

from __future__ import annotations

from dev.api import Graph
from dev.server import Server

LORA = "unguide-demo/selective/cat.safetensors"
FOLDER = "unguide-tests"


def graph(lora_name: str, format: str) -> Graph:
    load = {"class_type": "UnGuideLoadErasureLora", "inputs": {"lora_name": lora_name, "strength": 1.0}}
    prefix = f"loras/{FOLDER}/cat"
    save = {
        "class_type": "UnGuideSaveErasureLora",
        "inputs": {"erasure_lora": ["1", 0], "filename_prefix": prefix, "format": format},
    }
    return {"1": load, "2": save}


def test_a_saved_lora_is_offered_by_the_loaders_and_converts_again(server: Server) -> None:
    entry = server.api.run(graph(LORA, "kohya"))
    (name,) = entry["outputs"]["2"]["text"]
    assert name == f"loras/{FOLDER}/cat_00001_.safetensors"
    assert (server.output_directory / name).is_file()
    listed = name.removeprefix("loras/")
    for node in ("UnGuideLoadErasureLora", "LoraLoader"):
        kind, *options = server.api.get(f"/object_info/{node}")[node]["input"]["required"]["lora_name"]
        assert listed in (kind if isinstance(kind, list) else options[0]["options"])
    again = server.api.run(graph(listed, "diffusers"))
    assert again["outputs"]["2"]["text"] == [f"loras/{FOLDER}/cat_00002_.safetensors"]
