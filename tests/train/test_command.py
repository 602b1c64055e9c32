"""`python -m unguide_train` as a person runs it: files, tables, interruption, and what it says of bad input."""

from __future__ import annotations

import math
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.conftest import ROOT
from tests.train.conftest import QUICK
from unguide_core.formats import load_adapter
from unguide_core.training.trainer import TrainingError
from unguide_train import checkpoint as checkpoints
from unguide_train import job
from unguide_train.cli import main
from unguide_train.config import ConfigError, from_values
from unguide_train.model import ModelError, load_base

FULL = 10_000
"""Bytes; a LoRA of the demo model has some 90,000."""


@pytest.fixture
def arguments(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> list[str]:
    words = ["--concept", "cat", "--reference", "forest", "--preset", "paper", "--iterations", "2"]
    files = ["--base", str(checkpoint), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "cat.safetensors")]
    return [*words, *files, "--size", "64", "--schedule-steps", "10", "--no-calibration"]


def command(arguments: list[str], folder: Path) -> float:
    """Runs the command in a process of its own and returns the loss in its table."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "unguide_train", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return float(re.search(r"\| cat \| 2 \| ([\d.]+) \|", run.stdout).group(1))


def test_the_documented_command_writes_the_file_with_its_card_in_any_precision(
    arguments: list[str], tmp_path: Path
) -> None:
    """In processes of their own, for accelerate keeps one precision for a process."""
    loss = command([*arguments, "--synonym", "kitty", "--logs", str(tmp_path / "logs")], tmp_path)
    adapter = load_adapter(tmp_path / "cat.safetensors")
    card = adapter.card
    assert (card.concept, card.synonyms, card.objective) == ("cat", ("kitty",), "paper")
    assert (card.target, card.reference) == ("a photo of the cat", "a photo of the forest")
    assert card.base_model == "unguide-demo"
    assert all(torch.count_nonzero(layer.up) for layer in adapter.layers.values())
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))
    assert [path.name for path in tmp_path.glob(".*")] == []
    mixed = command([*arguments, "--precision", "bf16"], tmp_path)
    layers = load_adapter(tmp_path / "cat.safetensors").layers.values()
    assert {layer.up.dtype for layer in layers} == {torch.float32}
    assert mixed == pytest.approx(loss, rel=0.05)
    assert mixed != loss


def test_a_yaml_file_trains_many_concepts_into_one_table_on_a_base_model_that_is_loaded_once(
    settings: dict[str, Any], tmp_path: Path, capsys, monkeypatch
) -> None:
    loads: list[Path] = []

    def counted(path: Path, *arguments: Any) -> Any:
        loads.append(path)
        return load_base(path, *arguments)

    monkeypatch.setattr(job, "load_base", counted)
    job.loaded_base.cache_clear()
    settings["concepts"] = [
        {"concept": "cat", "reference": "forest"},
        {"concept": "dog", "reference": "field", "out": "other.safetensors"},
    ]
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    (tmp_path / "many.yaml").write_text(
        yaml.safe_dump(
            {**plain, "preset": "paper", "recipe": {"iterations": 1, "schedule_steps": 10, "rate_up": "3e-4"}}
        ),
        encoding="utf-8",
    )
    assert main(["--config", str(tmp_path / "many.yaml")]) == 0
    table = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| cat", "| dog"]
    assert load_adapter(tmp_path / "cat.safetensors").card.concept == "cat"
    other = load_adapter(tmp_path / "other.safetensors")  # relative to the file, not to where it was run
    assert (other.card.concept, other.card.settings["rate_up"]) == ("dog", 3e-4)
    assert len(loads) == 1
    # the second concept is trained as if there had been no first
    alone = from_values(
        {**settings, "out": tmp_path / "alone", "preset": "paper", "concepts": settings["concepts"][1:]}
        | {"recipe": {"iterations": 1, "schedule_steps": 10, "rate_up": 3e-4}}
    )
    fresh = load_base(alone.base, alone.tokenizer)
    path = job.train_concept(alone, alone.concepts[0].model_copy(update={"out": None}), fresh, quiet=True).path
    assert load_adapter(path).fingerprint == other.fingerprint
    assert not any(hasattr(module, "lora_A") for module in fresh.unet.modules())


def test_a_base_model_is_loaded_in_the_precision_that_is_asked_for(checkpoint, tokenizer) -> None:
    wide, half = (load_base(checkpoint, tokenizer, dtype) for dtype in (torch.float32, torch.float16))
    assert half.hash == wide.hash
    state = half.unet.state_dict()
    for name, value in wide.unet.state_dict().items():
        assert state[name].dtype == torch.float16
        assert torch.equal(state[name], value.half())


def test_a_training_that_was_cut_off_goes_on_and_ends_with_the_same_bits(settings, tmp_path, monkeypatch) -> None:
    whole = from_values({**settings, "out": tmp_path / "whole"})
    expected = job.train_concept(whole, whole.concepts[0], quiet=True)
    config = from_values(settings)
    cut_off(config, monkeypatch)
    assert not (tmp_path / "cat.safetensors").exists()
    resumed = job.train_concept(config, config.concepts[0], quiet=True)
    assert resumed.resumed_at == QUICK["refresh"]
    assert resumed.iterations == expected.iterations
    assert load_adapter(resumed.path).fingerprint == load_adapter(expected.path).fingerprint
    assert list(tmp_path.glob(".*")) == []


def test_a_checkpoint_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    state = {
        "task": {"recipe": {"seed": 1}},
        "base": "abc",
        "layers": {"a.b": [torch.randn(1, 3), torch.randn(2, 1)]},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(1, 3)}},
            "param_groups": [{"lr": 1}],
        },
        "generator": torch.Generator().manual_seed(3).get_state(),
        "state": {"iteration": 3},
    }
    checkpoints.save(state, tmp_path / "x.safetensors")
    again = checkpoints.load(tmp_path / "x.safetensors")
    assert (again["task"], again["base"]) == (state["task"], state["base"])
    assert again["state"] == state["state"]
    assert torch.equal(again["generator"], state["generator"])
    assert all(torch.equal(a, b) for a, b in zip(again["layers"]["a.b"], state["layers"]["a.b"], strict=True))
    assert torch.equal(again["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])


def cut_off(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains until the first checkpoint is written, and stops there."""
    save = checkpoints.save

    def saved_and_cut_off(state: dict[str, Any], path: Path) -> None:
        save(state, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(checkpoints, "save", saved_and_cut_off)
        with pytest.raises(KeyboardInterrupt):
            job.train_concept(config, config.concepts[0], quiet=True)


def test_a_checkpoint_of_another_training_is_refused_by_its_path(settings, tmp_path, monkeypatch) -> None:
    config = from_values(settings)
    cut_off(config, monkeypatch)
    (unfinished,) = tmp_path.glob(".*.safetensors")
    other = from_values({**settings, "concepts": [{"concept": "cat", "reference": "sea"}]})
    with pytest.raises(ValueError, match=f"{re.escape(str(unfinished))}.*other values of prompts; remove it"):
        job.train_concept(other, other.concepts[0], quiet=True)
    base = load_base(config.base, config.tokenizer)
    with pytest.raises(ValueError, match=f"{re.escape(str(unfinished))}.*another base model"):
        job.train_concept(config, config.concepts[0], replace(base, hash="another"), quiet=True)
    assert unfinished.exists()


def test_a_training_that_diverges_takes_its_checkpoint_along(settings, tmp_path, monkeypatch) -> None:
    config = from_values(settings)
    cut_off(config, monkeypatch)
    (unfinished,) = tmp_path.glob(".*.safetensors")
    state = checkpoints.load(unfinished)
    state["layers"] = {name: [down * math.nan, up] for name, (down, up) in state["layers"].items()}
    checkpoints.save(state, unfinished)
    with pytest.raises(TrainingError, match="diverged"):
        job.train_concept(config, config.concepts[0], quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_at_a_checkpoint_is_said_and_training_goes_on(settings, tmp_path, monkeypatch, caplog) -> None:
    config = from_values(settings)

    def full(state: dict[str, Any], path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save", full)
    assert job.train_concept(config, config.concepts[0], quiet=True).iterations == QUICK["iterations"]
    assert "No space left on device" in caplog.text
    assert load_adapter(tmp_path / "cat.safetensors").card.concept == "cat"


def test_a_full_disk_ends_in_a_sentence_and_leaves_nothing_half_written(arguments: list[str], tmp_path: Path) -> None:
    """The operating system refuses every file beyond a size that the result does not fit in."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "unguide_train", *arguments, "--iterations", "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, FULL)),
    )
    assert run.returncode == 1
    (said,) = [line for line in run.stderr.splitlines() if line.startswith("unguide_train:")]
    assert re.search(r"cat: .*cat\.safetensors.*File too large.*disk is not full", said), said
    assert list(tmp_path.iterdir()) == []


def test_a_diffusers_folder_is_the_same_base_as_its_checkpoint_file(checkpoint, tokenizer, tmp_path) -> None:
    base = load_base(checkpoint, tokenizer)
    base.unet.save_pretrained(tmp_path / "unet")
    (text,) = base.texts
    text.model.save_pretrained(tmp_path / "text_encoder")
    text.tokenizer.save_pretrained(tmp_path / "tokenizer")
    folder = load_base(tmp_path)
    assert folder.hash == base.hash
    prompt = "a photo of the cat"
    assert torch.equal(folder.encode([prompt])[prompt].states, base.encode([prompt])[prompt].states)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"concepts": []}, "concepts"),
        ({"concepts": [{"concept": "cat", "reference": "cat"}]}, "nothing to learn"),
        ({"concepts": [{"concept": "cat", "reference": ""}]}, "no reference"),
        ({"concepts": [{"concept": "cat"}]}, "concepts.0.reference"),
        ({"base": Path("nowhere.safetensors")}, "does not exist"),
        ({"recipe": {"speed": 3}}, "speed.*the names are loop, iterations"),
        ({"recipe": {"rate_up": -1.0}}, "rate_up is -1.0"),
        ({"recipe": {"rate_up": "fast"}}, "recipe: rate_up: Input should be a valid number"),
        ({"recipe": {"iterations": 10.5}}, "recipe: iterations: Input should be a valid integer"),
        ({"layers": "faces"}, "expected one of object"),
        ({"size": 100}, "size"),
        ({"colour": "red"}, "colour"),
        ({"concepts": [{"concept": "cat", "reference": "sea"}] * 2}, "two concepts"),
        ({"concepts": [{"concept": "cat", "reference": "sea", "out": "x.pth"}]}, "must end in .safetensors"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_values({**settings, **changes})


@pytest.mark.parametrize(("changes", "alpha"), [({}, 64.0), ({"rank": 2}, 16.0), ({"rank": 2, "alpha": 4.0}, 4.0)])
def test_another_rank_keeps_the_scale_unless_alpha_is_given_too(settings, changes, alpha) -> None:
    recipe = from_values({**settings, "recipe": {**QUICK, **changes}}).full_recipe
    assert (recipe.rank, recipe.alpha) == (changes.get("rank", 8), alpha)
    assert recipe.iterations == QUICK["iterations"]


def test_paths_are_absolute_for_a_worker_on_ray_runs_in_a_folder_of_its_own(settings, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.safetensors").touch()
    concept = {"concept": "cat", "reference": "sea", "out": "here.safetensors"}
    config = from_values({**settings, "base": "base.safetensors", "out": "there", "concepts": [concept]})
    assert (config.base, config.out) == (tmp_path / "base.safetensors", tmp_path / "there")
    assert config.path_of(config.concepts[0]) == tmp_path / "here.safetensors"


def test_a_reference_without_its_concept_beside_a_file_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "many.yaml").write_text("recipe:\nconcepts: []\n", encoding="utf-8")
    assert main(["--config", str(tmp_path / "many.yaml"), "--reference", "sea", "--iterations", "3"]) == 2
    assert "give --concept too" in capsys.readouterr().err


def test_wrong_settings_are_one_line_on_the_command_line(arguments: list[str], capsys) -> None:
    at = arguments.index("--reference") + 1
    arguments[at] = "cat"
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "nothing to learn" in said
    assert len(said.splitlines()) == 1


def test_a_learning_rate_that_diverges_ends_in_a_sentence_and_no_file(arguments, tmp_path, capsys) -> None:
    assert main([*arguments, "--learning-rate", "1e9", "--iterations", "20"]) == 1
    assert "training diverged at iteration" in capsys.readouterr().err
    assert list(tmp_path.glob("*.safetensors")) == []


@pytest.mark.parametrize(
    ("name", "tensors", "words"),
    [
        ("x.ckpt", None, "not a .safetensors file"),
        ("x.safetensors", {"a": torch.zeros(2)}, "holds no UNet"),
        ("x.safetensors", {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)}, "holds no CLIP under"),
    ],
)
def test_a_file_that_is_no_base_model_is_refused_by_name(name, tensors, words, tmp_path, tokenizer) -> None:
    path = tmp_path / name
    if tensors is None:
        path.write_bytes(b"pickle")
    else:
        save_file(tensors, path)
    with pytest.raises(ModelError, match=words):
        load_base(path, tokenizer)


def test_the_tokenizer_is_that_of_the_comfyui_that_the_checkpoint_lies_in(checkpoint, tokenizer, tmp_path) -> None:
    inside = tmp_path / "ComfyUI" / "models" / "checkpoints" / "model.safetensors"
    inside.parent.mkdir(parents=True)
    inside.symlink_to(checkpoint.resolve())
    (tmp_path / "ComfyUI" / "comfy").mkdir()
    (tmp_path / "ComfyUI" / "comfy" / "sd1_tokenizer").symlink_to(tokenizer)
    found, given = load_base(inside), load_base(checkpoint, tokenizer)
    prompts = ["a photo of the cat", ""]
    for prompt, encoded in found.encode(prompts).items():
        assert torch.equal(encoded.states, given.encode(prompts)[prompt].states)


def test_a_checkpoint_file_without_a_tokenizer_is_refused_with_the_remedy(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="--tokenizer"):
        load_base(checkpoint)
