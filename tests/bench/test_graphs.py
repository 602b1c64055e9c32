"""Methods, settings and the workflows that they become."""

from __future__ import annotations

import pytest

from unguide_bench.errors import BenchError
from unguide_bench.graphs import Job, complete, erasure_graph, image_graph, literal
from unguide_bench.methods import DEFAULT, Method, Settings

SETTINGS = Settings("a.safetensors", "b.safetensors", negative="cat", steps=3, size=64)


def graph_of(text: str, **changes):
    return image_graph(SETTINGS, Job(Method.parse(text), "a cat (small)", 5, 7.5), **changes)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("base", "base"),
        ("negative", "negative prompt"),
        ("lora", "LoRA 1"),
        ("LoRA:0.5", "LoRA 0.5"),
        ("always", "UnGuide always, weight 0"),
        ("always:-1", "UnGuide always, weight -1"),
        ("during", "UnGuide during sampling"),
        ("as-the-paper", "UnGuide as the paper"),
    ],
)
def test_a_method_is_named_by_its_way_and_value(text: str, name: str) -> None:
    assert Method.parse(text).name == name


@pytest.mark.parametrize("text", ["", "esd", "base:1", "during:2", "lora:much"])
def test_an_unknown_method_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(BenchError, match=r"choose from base, negative, lora, during.*always:WEIGHT"):
        Method.parse(text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"size": 100}, "multiple of 8"), ({"steps": 0}, "0 steps"), ({"cfg": -1.0}, "cfg is -1")],
)
def test_impossible_settings_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(BenchError, match=words):
        Settings("a", "b", **changes)


def test_every_link_of_every_methods_workflow_leads_to_one_of_its_nodes() -> None:
    for text in (*DEFAULT, "always:-1", "lora:2"):
        for by_host in (True, False):
            graph = graph_of(text, lora_by_host=by_host)
            links = [v for node in graph.values() for v in node["inputs"].values() if isinstance(v, list)]
            assert {link[0] for link in links} < set(graph)
            assert "image" in graph


def test_each_method_has_its_sampler_and_settings() -> None:
    kinds = {text: graph_of(text)["sampler"]["class_type"] for text in ("base", "lora", "during", "always")}
    assert kinds == {
        "base": "KSampler",
        "lora": "KSampler",
        "during": "UnGuideSampler",
        "always": "UnGuideSampler",
    }
    lora = graph_of("lora:0.5")
    assert (lora["lora"]["inputs"]["strength_model"], lora["sampler"]["inputs"]["model"]) == (0.5, ["lora", 0])
    other = graph_of("lora:0.5", lora_by_host=False)
    assert "lora" not in other
    assert other["erasure"]["inputs"]["strength"] == 0.5
    assert other["settings"]["inputs"] == {"decide": "always erase", "weight_detected": 0.0}
    assert graph_of("always:-1")["settings"]["inputs"] == {"decide": "always erase", "weight_detected": -1.0}
    assert graph_of("as-the-paper")["settings"]["inputs"] == {"decide": "as the paper"}


def test_only_the_negative_prompt_method_has_a_negative_prompt() -> None:
    texts = {text: graph_of(text)["negative"]["inputs"]["text"] for text in DEFAULT}
    assert texts == {text: "cat" if text == "negative" else "" for text in DEFAULT}


def test_parentheses_are_text_and_no_emphasis_whether_they_were_escaped_or_not() -> None:
    assert literal("a (cat) [x]") == "a \\(cat\\) [x]"
    assert literal("a \\(cat\\)") == "a \\(cat\\)"
    assert graph_of("base")["positive"]["inputs"]["text"] == "a cat \\(small\\)"


def test_required_inputs_that_are_left_out_take_the_nodes_defaults_and_optional_ones_do_not() -> None:
    info = {
        "class_type": {},
        "Loader": {
            "input": {
                "required": {
                    "name": [["x", "y"]],
                    "model": ["MODEL", {}],
                    "mode": ["COMBO", {"options": ["p", "q"]}],
                    "strength": ["FLOAT", {"default": 0.7}],
                },
                "optional": {"alpha": ["FLOAT", {"default": 3.0}]},
            }
        },
    }
    graph = {"1": {"class_type": "Loader", "inputs": {"name": "y"}}}
    assert complete(graph, info)["1"]["inputs"] == {"name": "y", "mode": "p", "strength": 0.7}
    assert graph["1"]["inputs"] == {"name": "y"}


def test_the_loader_is_given_the_model_that_full_weights_are_compared_with() -> None:
    assert erasure_graph(SETTINGS, 1.0)["erasure"]["inputs"]["model"] == ["checkpoint", 0]
