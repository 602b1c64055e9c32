"""The command line: every mistake is reported in one sentence, without a traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dev.workspace import PACK
from experiments.commands import EXPERIMENTS

Dev = Callable[..., "subprocess.CompletedProcess[str]"]


def assert_one_sentence(result: subprocess.CompletedProcess[str], status: int, words: str) -> None:
    lines = result.stderr.strip().splitlines()
    assert result.returncode == status, result.stderr
    assert lines[-1].startswith("dev: ")
    assert words in lines[-1]
    assert all(line.startswith("[") for line in lines[:-1])  # progress, and nothing else


def test_help_lists_every_command(dev: Dev) -> None:
    result = dev("--help")
    assert result.returncode == 0
    for command in ("test", "serve", "setup", "lint", *EXPERIMENTS):
        assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiments_help_is_its_parsers_and_needs_no_package(name: str) -> None:
    command = [sys.executable, "-S", "dev", name, "--help"]
    result = subprocess.run(command, cwd=PACK, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"usage: python3 dev {name}" in result.stdout
    assert EXPERIMENTS[name].summary.split()[0] in result.stdout


def test_a_wrong_option_of_an_experiment_is_refused_before_anything_is_set_up(dev: Dev) -> None:
    result = dev("training", "--concept", "unicorn")
    assert result.returncode == 2
    assert "invalid choice: 'unicorn'" in result.stderr


def test_every_experiment_is_in_the_table_of_contributing() -> None:
    table = (PACK / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(f"\n| `{name}` |" in table for name in EXPERIMENTS)


def test_an_unknown_command_is_answered_with_the_known_ones(dev: Dev) -> None:
    assert_one_sentence(dev("tset"), 2, "there is no command 'tset': choose from")


@pytest.mark.usefixtures("no_network")
def test_no_network_is_one_sentence(dev: Dev, home: Path) -> None:
    assert_one_sentence(dev("setup"), 1, "found no package index: check the network")
    assert_one_sentence(dev("test"), 1, "found no package index: check the network")


@pytest.mark.usefixtures("home")
def test_an_unknown_comfyui_is_one_sentence(dev: Dev) -> None:
    assert_one_sentence(dev("serve", "--comfyui", "9.9"), 2, "choose from 0.30.0")


@pytest.mark.usefixtures("home")
def test_a_wrong_comfyui_path_is_one_sentence(dev: Dev, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", "/nowhere/at/all")
    assert_one_sentence(dev("setup"), 2, "no ComfyUI (main.py, comfy/) stands there")


@pytest.mark.usefixtures("home")
def test_a_wrong_device_is_one_sentence(dev: Dev, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNGUIDE_DEVICE", "tpu")
    assert_one_sentence(dev("setup"), 2, "set it to one of auto, cpu, gpu")


def test_a_cache_folder_that_cannot_be_made_is_one_sentence(
    dev: Dev, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("UNGUIDE_DEV_HOME", str(tmp_path / "file" / "home"))
    assert_one_sentence(dev("setup"), 1, "set UNGUIDE_DEV_HOME to another folder")
