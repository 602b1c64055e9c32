"""What the tests of unguide_train share: the demo checkpoint, the host's tokenizer, and a quick recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dev.host import Host
from experiments.training import write_narrow_checkpoint
from tests.conftest import pack_module
from tests.host.conftest import CHECKPOINT, Demo, demo, inference_mode, trained_adapter, wide  # noqa: F401
from unguide_core.adapter import Adapter
from unguide_core.adapter.names import UNET, renamed
from unguide_train import calibration
from unguide_train.config import Config, from_values
from unguide_train.model import inject

QUICK = {
    "iterations": 4,
    "schedule_steps": 2,
    "trajectories": 2,
    "kept_trajectories": 2,
    "batch": 1,
    "preserved": 1,
    "refresh": 2,
    "check": 2,
}
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module", autouse=True)
def few_images():
    """Calibrations fit their image probes to a few rough images, in seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for name, few in {"CONCEPT_IMAGES": 8, "OTHER_IMAGES": 8, "IMAGE_STEPS": 2}.items():
            patch.setattr(calibration, name, few)
        yield


def in_the_graph(model: Any, encode: Callable[[str], Any], config: Config) -> Any:
    """What the node trains, of a configuration of unguide_train.

    Args:
        encode: a prompt's CONDITIONING.
    """
    core, recipes = pack_module("unguide_core.training.prompts"), pack_module("unguide_core.training.recipe")
    card = pack_module("unguide_core.adapter").Card
    (concept,) = config.concepts
    theirs = config.prompts_of(concept)
    pairs = tuple(core.Pair(pair.target, pair.reference) for pair in theirs.erased)
    prompts = core.TrainingPrompts(pairs, theirs.kept, theirs.neutral)
    recipe = recipes.Recipe(**config.full_recipe.__dict__)
    texts = {"target": pairs[0].target, "reference": pairs[0].reference, "neutral": theirs.neutral}
    conditionings = {name: encode(name) for name in prompts.names}
    job = pack_module("unguide_comfy.train.job").Job(recipe, prompts, conditionings, card(**texts))
    with torch.inference_mode():
        return trained_adapter(model, job, torch.zeros(1, *SHAPE))


def put_on(unet: Any, adapter: Adapter) -> None:
    """Puts a trained adapter on the demo model's UNet, in whichever naming its layers are."""
    paths = renamed(adapter.layers, UNET, "demo")
    inject(unet, {paths[name].removeprefix(UNET): layer for name, layer in adapter.layers.items()})


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The demo checkpoint."""
    return Host.from_environment().base_directory / "models" / "checkpoints" / CHECKPOINT


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its narrow twin, the same function at an eighth of the work."""
    path = tmp_path_factory.mktemp("checkpoints") / CHECKPOINT
    write_narrow_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Path:
    return Host.from_environment().comfyui / "comfy" / "sd1_tokenizer"


@pytest.fixture
def settings(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> dict[str, Any]:
    return quick_settings(checkpoint, tokenizer, tmp_path)


def quick_settings(checkpoint: Path, tokenizer: Path, out: Path) -> dict[str, Any]:
    """Values of a quick training of one concept at 64 x 64 pixels."""
    return {
        "base": checkpoint,
        "tokenizer": tokenizer,
        "out": out,
        "size": 64,
        "calibrate": False,
        "recipe": dict(QUICK),
        "kept": ["", "a photo of the dog"],
        "scenes": ["sea", "snow"],  # encoding a prompt takes longer than a step here
        "concepts": [{"concept": "cat", "reference": "forest", "synonyms": ["kitty"]}],
    }


@pytest.fixture
def config(settings: dict[str, Any]) -> Config:
    return from_values(settings)


@pytest.fixture(autouse=True)
def ordinary_mode(inference_mode):  # noqa: F811
    """unguide_train runs in a process of its own, not under the host's inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


__all__ = ["QUICK", "SHAPE", "Demo", "asdict", "in_the_graph"]
