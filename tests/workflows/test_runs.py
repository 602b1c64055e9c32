"""The shipped workflows, executed by the real server on the demo model, as after a press of Run."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dev.api import ExecutionFailedError, Graph
from dev.server import Server
from tests.workflows.conftest import CAT, DOG, STEMS, image, report, twin

COMPARISON = "3_compare_base_lora_unguide"
TRAINING = "5_train_erasure_lora"
ERASING = "0_erase_a_word"
# 6 is 5 on the checkpoint of one's own, which costs a second calibration and shows nothing more
RUN = [stem for stem in STEMS if stem != "6_train_on_your_checkpoint"]
COLUMNS = ("1: base", "2: LoRA only", "3: UnGuide")
# fewer than the files have, to save time: nothing below depends on it
STEPS = 10
KEPT = "\n".join(f"a photo of the {word}" for word in ("dog", "bird", "ship", "car", "forest", "sea", "sky", "house"))
FEW = {"iterations": 3, "sampling_steps": 2, "scenes": "", "keep_prompts": KEPT, "shipped_prompts": 20}
IMAGE_NODES = (
    "SaveImage",
    "PreviewImage",
    "LossGraphNode",
    "UnGuideSampler",
    "UnGuideProbe",
    "UnGuideTrainErasureLora",
)
# these workflows show a report
REPORTING = ("1_quick_start", "2_probe_then_sample", COMPARISON)

Run = tuple[dict[str, Any], Graph]


def decided(entry: dict[str, Any]) -> dict[str, Any]:
    """The one decision of a run's report."""
    (erasure,) = report(entry)["erasure"]
    return {**erasure["decision"], "weight": erasure["weight"]}


@pytest.fixture(scope="session")
def finished(server: Server) -> dict[tuple[str, str], Run]:
    """Each of `RUN`, with two prompts and fewer steps, run once: entry and graph by stem and prompt."""
    runs = {}
    for stem in RUN:
        for prompt in (CAT, DOG):
            graph = twin(stem, prompt=prompt, steps=STEPS, width=64, height=64, **FEW)
            runs[stem, prompt] = (server.api.run(graph), graph)
    return runs


def test_the_report_is_for_people_and_the_node_shows_the_verdict(server: Server) -> None:
    # with steps of its own: what the runs below share with it would be cached, and shows nothing
    graph = twin("1_quick_start", prompt=CAT, steps=3)
    (node,) = [key for key, value in graph.items() if value["class_type"] == "PreviewAny"]
    sampler = graph[node]["inputs"]["source"][0]
    graph[node]["inputs"]["source"] = [sampler, 2]
    outputs = server.api.run(graph)["outputs"]
    (text,) = outputs[node]["text"]
    assert text.startswith(
        "Detected 'cat' in the prompt, before the first step, and erased it; 0 extra model evaluations."
    )
    assert outputs[sampler]["unguide_verdict"] == [{"kind": "erased", "text": "erased: cat"}]


def comparison(server: Server, finished: dict[tuple[str, str], Run], prompt: str) -> list[Any]:
    entry, graph = finished[COMPARISON, prompt]
    return [image(server, entry, graph, title) for title in COLUMNS]


@pytest.mark.parametrize("stem", RUN)
def test_every_image_node_shows_an_image(server: Server, finished: dict[tuple[str, str], Run], stem: str) -> None:
    entry, graph = finished[stem, CAT]
    assert entry["status"]["status_str"] == "success"
    images = server.api.images(entry)
    assert set(images) == {key for key, node in graph.items() if node["class_type"] in IMAGE_NODES}
    assert all(len(pngs) == 1 for pngs in images.values())


@pytest.mark.parametrize("stem", REPORTING)
def test_the_report_says_detected_for_the_concepts_prompt_and_not_for_another(
    finished: dict[tuple[str, str], Run], stem: str
) -> None:
    cat, dog = (decided(finished[stem, prompt][0]) for prompt in (CAT, DOG))
    assert (cat["detected"], cat["weight"]) == (True, 0.0)
    assert (dog["detected"], dog["weight"]) == (False, 1.0)
    assert cat["score"] > dog["score"]


def test_an_unrelated_image_is_the_base_models_and_the_lora_alone_changes_it(
    server: Server, finished: dict[tuple[str, str], Run]
) -> None:
    base, lora_only, guided = comparison(server, finished, DOG)
    assert guided == base
    assert lora_only != base


def test_the_concepts_image_is_not_the_base_models(server: Server, finished: dict[tuple[str, str], Run]) -> None:
    base, lora_only, guided = comparison(server, finished, CAT)
    assert base not in (lora_only, guided)


@pytest.mark.parametrize("prompt", [CAT, DOG])
def test_all_workflows_with_a_shipped_lora_generate_the_same_image(
    server: Server, finished: dict[tuple[str, str], Run], prompt: str
) -> None:
    wanted = comparison(server, finished, prompt)[2]
    for stem in RUN:
        if stem not in (COMPARISON, TRAINING, ERASING):
            entry, graph = finished[stem, prompt]
            assert image(server, entry, graph, "Image") == wanted, stem


def test_a_lora_trained_in_the_graph_is_used_in_it_and_leaves_an_unrelated_image_alone(
    server: Server, finished: dict[tuple[str, str], Run]
) -> None:
    """After three iterations it erases little, but the gate already detects its concept and nothing else."""
    titles = ("Image", "Without UnGuide")
    (cat, cat_base), (dog, dog_base) = (
        [image(server, *finished[TRAINING, prompt], title) for title in titles] for prompt in (CAT, DOG)
    )
    assert cat != cat_base
    assert dog == dog_base
    assert decided(finished[TRAINING, CAT][0])["detected"] is True
    assert decided(finished[TRAINING, DOG][0])["detected"] is False


def test_a_word_is_erased_in_the_graph_once_and_an_unrelated_image_is_the_base_models(
    server: Server, finished: dict[tuple[str, str], Run]
) -> None:
    (cat, _), (dog, graph) = (finished[ERASING, prompt] for prompt in (CAT, DOG))
    base = [comparison(server, finished, prompt)[0] for prompt in (CAT, DOG)]
    assert image(server, cat, graph, "Image") != base[0]
    assert image(server, dog, graph, "Image") == base[1]
    (node,) = [key for key, value in graph.items() if value["class_type"] == "UnGuideEraseConcept"]
    kept = [nodes for kind, data in dog["status"]["messages"] if kind == "execution_cached" for nodes in data["nodes"]]
    assert node in kept
    said = [output["text"][0] for output in cat["outputs"].values() if "text" in output]
    assert any("no model evaluation" in text for text in said)


def test_the_trained_lora_is_kept_for_the_next_prompt(finished: dict[tuple[str, str], Run]) -> None:
    entry, graph = finished[TRAINING, DOG]
    (node,) = [key for key, value in graph.items() if value["class_type"] == "UnGuideTrainErasureLora"]
    cached = [
        nodes for kind, data in entry["status"]["messages"] if kind == "execution_cached" for nodes in data["nodes"]
    ]
    assert node in cached


def test_only_the_model_that_generates_the_image_is_evaluated(finished: dict[tuple[str, str], Run]) -> None:
    cat, dog = (report(finished["1_quick_start", prompt][0])["model_evaluations"] for prompt in (CAT, DOG))
    assert (cat["base"], cat["adapted"]) == (0, 2 * STEPS)
    assert (dog["base"], dog["adapted"]) == (2 * STEPS, 0)
    assert cat["probe"] == dog["probe"] == 0
    assert cat["wasted"] == dog["wasted"] == 0


def test_always_erasing_is_the_lora_in_the_hosts_own_loader(server: Server) -> None:
    """The loader applies the same file in the same way; only the arithmetic differs."""
    graph = twin(COMPARISON, prompt=DOG, steps=4)
    entry = server.api.run(graph)
    base, always, _ = (image(server, entry, graph, title) for title in COLUMNS)
    (sampler,) = [node for node in graph.values() if node["_meta"]["title"] == "LoRA only"]
    model = graph[sampler["inputs"]["model"][0]]["inputs"]["model"]
    inputs = {"model": model, "lora_name": "unguide-demo/selective/cat.safetensors", "strength_model": 1.0}
    graph["loader"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs, "_meta": {"title": "loader"}}
    sampler["inputs"]["model"] = ["loader", 0]
    loaded = image(server, server.api.run(graph), graph, COLUMNS[1])
    assert difference(loaded, always) <= 2 < difference(loaded, base)


def difference(one: Any, other: Any) -> int:
    """The largest difference of a channel's value between two images, of 255."""
    assert one[0] == other[0]
    return max(abs(a - b) for a, b in zip(one[1], other[1], strict=True))


def again(server: Server, number: int) -> Any:
    """The quick start's image, sampled again: the host caches by inputs, so one that has no effect here differs."""
    graph = twin("1_quick_start", settings={"weight_otherwise": 0.5 + number / 100}, prompt=CAT, steps=6)
    return image(server, server.api.run(graph), graph, "Image")


def test_the_same_prompt_twice_gives_the_same_image(server: Server) -> None:
    assert again(server, 1) == again(server, 2)


def test_a_run_after_an_interrupted_one_gives_the_same_image(server: Server) -> None:
    before = again(server, 3)
    steps = 997
    running = server.api.queue(twin("1_quick_start", prompt=CAT, steps=steps))
    wait_for_log(server, f"/{steps} [")
    server.api.interrupt()
    with pytest.raises(ExecutionFailedError, match="interrupted"):
        server.api.wait(running, timeout=60)
    assert again(server, 4) == before


def wait_for_log(server: Server, text: str, timeout: float = 120.0) -> None:
    """Returns once the server has printed that text, as its progress bar does after the first step."""
    deadline = time.monotonic() + timeout
    while text not in server.log.read_text(encoding="utf-8", errors="replace"):
        assert time.monotonic() < deadline, f"{text!r} is not in {server.log}"
        server.check()
        time.sleep(0.1)
