"""What the tests of unguide_bench share: the demo model on real ComfyUIs, and a short run on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev.host import Host
from dev.models import CHECKPOINT
from dev.server import Server, running_server

LORA = "unguide-demo/selective/cat.safetensors"
CAT, KITTY, DOG = "a photo of the cat", "a photo of the kitty", "a photo of the dog"
STEPS = 3


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with running_server(Host.from_environment()) as running:
        yield running


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official prompt file of a concept, with fewer prompts."""
    path = tmp_path_factory.mktemp("prompts") / "cat.json"
    content = {"target": CAT, "reference": "a photo of the forest", "synonyms": [KITTY], "other": [DOG, ""]}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def arguments(prompts: Path, out: Path, *more: str, seeds: int = 2, lora: str = LORA) -> list[str]:
    """The command's arguments for a short run on the demo model."""
    what = ["--checkpoint", CHECKPOINT, "--lora", lora, "--prompts", str(prompts), "--out", str(out)]
    small = ["--steps", str(STEPS), "--cfg", "4", "--size", "64", "--sampler", "euler", "--seeds", str(seeds)]
    return [*what, *small, *more]
