"""Closed form on the command line: lists of concepts, files of prompts, one adapter for each or for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.narrow import load_narrow_model
from tests.conftest import pack_module
from tests.host.test_blending import relative
from tests.host.test_erase import clip  # noqa: F401
from unguide_core.adapter.names import HOST, renamed
from unguide_core.formats import load_adapter
from unguide_core.probe.calibration import Calibration
from unguide_train.cli import main
from unguide_train.closed_form import read_list
from unguide_train.config import ConfigError


@pytest.fixture
def arguments(checkpoint: Path, tokenizer: Path) -> list[str]:
    return ["--closed-form", "--base", str(checkpoint), "--tokenizer", str(tokenizer), "--shipped", "30"]


def test_a_concept_is_written_as_the_node_makes_it(arguments, tmp_path, clip, capsys) -> None:  # noqa: F811
    out = tmp_path / "cat.safetensors"
    words = ["--concept", "cat", "--reference", "forest", "--synonym", "kitty"]
    assert main([*arguments, *words, "--out", str(out)]) == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")]
    assert (cells[1], cells[5], cells[7]) == ("cat", "0", str(out))
    adapter = load_adapter(out)
    assert (adapter.card.concept, adapter.card.synonyms, adapter.card.objective) == ("cat", ("kitty",), "closed form")
    node, settings = pack_module("unguide_comfy.erase.concept"), pack_module("unguide_core.closed_form").ClosedForm()
    with torch.inference_mode():
        chosen = node.Words(("cat",), ("forest",), (("kitty",),), shipped=30)
        (lora,), _ = node.erase_concepts(load_narrow_model(), clip, chosen, settings)
    text, theirs = (Calibration.from_card(one.card.calibration).text for one in (adapter, lora.adapter))
    assert text.text.thresholds(0.01) == pytest.approx(theirs.text.thresholds(0.01), rel=0.02)
    assert torch.allclose(text.vector, theirs.vector, atol=0.02 * float(theirs.vector.abs().max()))
    own = renamed(adapter.layers, HOST, "demo")
    assert set(own.values()) == set(lora.adapter.layers)
    for name, layer in adapter.layers.items():
        assert relative(layer.weight_delta(), lora.adapter.layers[own[name]].weight_delta()) < 1e-2


def test_a_list_becomes_a_file_for_each_concept_or_one_for_all(arguments, tmp_path) -> None:
    listed = tmp_path / "concepts.txt"
    listed.write_text("cat, kitty -> forest\n\ndog -> field\n", encoding="utf-8")
    assert main([*arguments, "--list", str(listed), "--out", str(tmp_path / "each")]) == 0
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == ["cat.safetensors", "dog.safetensors"]
    assert main([*arguments, "--list", str(listed), "--joint", "--out", str(tmp_path / "all.safetensors")]) == 0
    card = load_adapter(tmp_path / "all.safetensors").card
    assert (card.concept, card.synonyms) == ("cat", ("kitty", "dog"))
    assert card.settings["pairs"] == 3 * 12


def test_a_file_of_prompts_is_erased_without_a_concept(arguments, tmp_path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of the cat\na kitty on the street -> a photo of the street\n", encoding="utf-8")
    assert main([*arguments, "--prompts", str(prompts), "--out", str(tmp_path / "x.safetensors")]) == 0
    card = load_adapter(tmp_path / "x.safetensors").card
    assert (card.target, card.reference, card.settings["pairs"]) == ("a photo of the cat", "", 2)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--out", "x.safetensors"], "there is no concept"),
        (["--concept", "cat", "--reference", "forest"], "needs --base, the model, and --out"),
        (["--concept", "cat", "--out", "x.safetensors"], "give what to generate instead"),
        (["--concept", "cat", "--reference", "forest", "--out", "folder"], "expected a file ending in .safetensors"),
        (["--concept", "cat", "--reference", "a", "--rank", "0", "--out", "x.safetensors"], "rank is 0"),
        (["--concept", "cat", "--ray", "auto", "--out", "x.safetensors"], "takes neither --config nor --ray"),
        (["--list", "nowhere.txt", "--out", "folder"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_anything_is_loaded(arguments, more, words, capsys) -> None:
    assert main([*arguments, *more]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1


def test_a_wrong_line_of_a_list_is_named(tmp_path) -> None:
    listed = tmp_path / "concepts.txt"
    listed.write_text("cat -> forest\ndog\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2 of"):
        read_list(listed, "object")
    (first, second) = read_list(listed, "person")
    assert (first.reference, second.reference) == ("forest", "a person")
    listed.write_text("Hokusai\n", encoding="utf-8")
    assert read_list(listed, "style")[0].reference == ""
