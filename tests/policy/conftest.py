"""A policy in this process, on the narrow demo model: armed for a test, and taken off again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.studio import Studio, studio
from tests.conftest import pack_module, start_host

start_host()

import comfy.model_base  # noqa: E402  (the host's options come first)
import comfy.samplers  # noqa: E402

SEED = 3


@pytest.fixture(autouse=True)
def inference_mode():
    """The host executes nodes under inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def paint() -> Studio:
    with torch.inference_mode():
        return studio()


@pytest.fixture(scope="session")
def cat(paint: Studio) -> Any:
    """The erasure LoRA that the policy has, for the narrow model."""
    with torch.inference_mode():
        return paint.lora("selective", "cat")


@dataclass
class Armed:
    """The policy in force, and its log."""

    policy: Any
    file: Path

    def lines(self) -> list[dict[str, Any]]:
        return pack_module("unguide_policy.log").read_log(self.file)


@pytest.fixture
def arm(paint: Studio, cat: Any, tmp_path: Path) -> Iterator[Any]:
    """A function that puts a policy in force; its arguments change the policy and the adapter's entry."""
    module = pack_module("unguide_policy.policy")
    before = comfy.samplers.CFGGuider.sample, comfy.model_base.BaseModel.apply_model

    def armed(adapter: dict[str, Any] | None = None, patched: str = "refuse", **chosen: Any) -> Armed:
        weights = pack_module("unguide_comfy.model.key").base_hash(paint.model)
        policy = module.Policy(
            file=tmp_path / "policy.yaml",
            adapters={"cat": module.PolicyAdapter("cat.safetensors", "", cat.concept_prompt, **(adapter or {}))},
            models={"demo": module.PolicyModel(weights, ("cat",), patched=patched)},
            loras={("demo", "cat"): replace(cat, name="cat")},
            **chosen,
        )
        pack_module("unguide_policy.hooks").arm(pack_module("unguide_policy.guard").Guard(policy))
        return Armed(policy, policy.log_file)

    yield armed
    comfy.samplers.CFGGuider.sample, comfy.model_base.BaseModel.apply_model = before


@pytest.fixture(scope="session")
def generate(paint: Studio) -> Any:
    """A function that generates latents of a prompt, [1, 4, 8, 8]."""

    def generated(prompt: str, model: Any = None, **options: Any) -> torch.Tensor:
        return paint.generate(model or paint.model, paint.encode(prompt), [SEED], **options).latents

    return generated
