"""What a person reads when a file is wrong: the sentence is the node's error, and the server goes on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dev.api import ExecutionFailedError, PromptRejectedError
from dev.host import Host
from dev.server import Server
from tests.workflows.conftest import DOG, twin

FOLDER = "unguide-tests"
DEMO_LORA = "unguide-demo/selective/cat.safetensors"


@pytest.fixture(scope="module", autouse=True)
def broken_loras() -> Iterator[Path]:
    """Erasure LoRAs that are wrong in one way each, among the host's LoRAs while these tests run."""
    loras = Host.from_environment().base_directory / "models" / "loras"
    folder = loras / FOLDER
    folder.mkdir(exist_ok=True)
    whole = (loras / DEMO_LORA).read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.pth").write_text("not a checkpoint", encoding="utf-8")
    sdxl = "lora_unet_input_blocks_4_1_transformer_blocks_9_attn2_to_k"
    layers = {f"{sdxl}.lora_down.weight": torch.zeros(1, 2048), f"{sdxl}.lora_up.weight": torch.zeros(640, 1)}
    save_file(layers, folder / "sdxl.safetensors")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "node", "words"),
    [
        ("truncated.safetensors", "UnGuideLoadErasureLora", "truncated.safetensors"),
        ("empty.safetensors", "UnGuideLoadErasureLora", "empty.safetensors"),
        ("text.pth", "UnGuideLoadErasureLora", "text.pth"),
        ("sdxl.safetensors", "UnGuideSampler", "made for another architecture"),
    ],
)
def test_a_wrong_file_is_the_nodes_error_in_one_sentence(server: Server, name: str, node: str, words: str) -> None:
    with pytest.raises(ExecutionFailedError) as caught:
        server.api.run(twin("1_quick_start", lora_name=f"{FOLDER}/{name}", steps=1))
    assert caught.value.details["node_type"] == node
    message = caught.value.details["exception_message"].strip()
    assert name in message
    assert words in message
    assert "Traceback" not in message
    assert len(message.splitlines()) == 1


def test_another_models_decision_is_refused_with_the_remedy(server: Server) -> None:
    graph = twin("2_probe_then_sample", prompt=DOG, steps=1)
    (probe,) = [key for key, node in graph.items() if node["class_type"] == "UnGuideProbe"]
    loader = {"class_type": "LoraLoaderModelOnly", "inputs": {"lora_name": DEMO_LORA, "strength_model": 1.0}}
    loader["inputs"]["model"] = graph[probe]["inputs"]["model"]
    graph["100"] = loader
    graph[probe]["inputs"]["model"] = ["100", 0]
    with pytest.raises(ExecutionFailedError, match="connect the same model") as caught:
        server.api.run(graph)
    assert caught.value.details["node_type"] == "UnGuideModel"


def test_a_file_that_does_not_exist_is_refused_before_anything_runs(server: Server) -> None:
    with pytest.raises(PromptRejectedError, match="lora_name"):
        server.api.run(twin("1_quick_start", lora_name="no/such/file.safetensors"))


def test_a_value_out_of_range_is_refused_by_name(server: Server) -> None:
    with pytest.raises(PromptRejectedError, match="weight_detected"):
        server.api.run(twin("1_quick_start", settings={"weight_detected": 9.0}))


def test_a_probe_longer_than_its_schedule_is_refused_before_anything_runs(server: Server) -> None:
    with pytest.raises(PromptRejectedError, match=r"UnGuideSettings.*probe_steps is 20 and probe_schedule_steps 20"):
        server.api.run(twin("1_quick_start", settings={"probe_steps": 20}, steps=1))


def test_a_threshold_that_is_not_a_number_is_refused_before_anything_runs(server: Server) -> None:
    with pytest.raises(PromptRejectedError, match="expected a number such as"):
        server.api.run(twin("1_quick_start", settings={"threshold": "high"}, steps=1))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"generate_instead": "cat"}, "nothing to learn"),
        ({"generate_instead": ""}, "there is no reference for 'cat'"),
        ({"concept": ""}, "no concept is named"),
        ({"layers": "custom"}, "the pattern is empty"),
    ],
)
def test_a_training_that_cannot_be_is_the_nodes_error_in_one_sentence(server: Server, inputs: dict, words: str) -> None:
    with pytest.raises(ExecutionFailedError, match=words) as caught:
        server.api.run(twin("5_train_erasure_lora", steps=1, **inputs))
    assert caught.value.details["node_type"] == "UnGuideTrainErasureLora"
    assert len(caught.value.details["exception_message"].strip().splitlines()) == 1


def test_the_server_goes_on_after_every_failure(server: Server) -> None:
    assert server.api.run(twin("1_quick_start", prompt=DOG, steps=1))["status"]["status_str"] == "success"
