"""Blending, probing and restoring on every architecture, each with its own prediction type. Tiny random models that the
host detects and builds itself; the reference is the adapter merged by the host's own LoRA loader.
"""

from __future__ import annotations

import json
from typing import Any

import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from safetensors.torch import save_file

from tests.conftest import pack_module
from tests.host.conftest import fixed
from tests.host.families import FAMILIES, Family
from tests.host.test_blending import assert_unchanged, relative, state_of

erasure, gating, deciding, matching = (
    pack_module(f"unguide_comfy.{name}") for name in ("erasure", "gating", "deciding", "matching")
)
formats = pack_module("unguide_core.formats")


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    """Models are made one at a time, and forgotten."""
    known = FAMILIES[request.param]
    with torch.inference_mode():
        assert known.model is not None
    yield known
    known.__dict__.pop("model", None)


def tensors(family: Family, rank: int = 2, alpha: float = 3.0, size: float = 0.3) -> dict[str, torch.Tensor]:
    """A LoRA file's tensors for the family's layers, strong enough to be seen."""
    generator = torch.Generator().manual_seed(9)
    made = {}
    for layer in family.layers:
        out, *rest = family.weight(layer).shape
        ones = [1] * (len(rest) - 1)
        made[f"{layer}.lora_down.weight"] = torch.randn(rank, *rest, generator=generator) / rest[0] ** 0.5
        made[f"{layer}.lora_up.weight"] = size * torch.randn(out, rank, *ones, generator=generator)
        made[f"{layer}.alpha"] = torch.tensor(alpha)
    return made


@pytest.fixture(scope="module")
def lora(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("lora") / "tiny.safetensors"
    save_file(tensors(family), path)
    adapter = formats.load_adapter(path)
    return erasure.ErasureLora(path.name, adapter, 1.0, "the concept", family.conditioning(1), family.conditioning(0))


@pytest.fixture(scope="module")
def merged(family: Family) -> Any:
    """The host's own LoRA loader on the same tensors."""
    return comfy.sd.load_lora_for_models(family.model, None, tensors(family), 1.0, 0.0)[0]


def sampled(family: Family, model: Any, steps: int = 2, batch: int = 2) -> torch.Tensor:
    import nodes as host

    (out,) = host.common_ksampler(
        model, 7, steps, 4.0, "euler", "normal", family.conditioning(1), family.conditioning(0), family.latent(batch)
    )
    return out["samples"]


def test_the_host_detects_the_architecture_and_its_prediction_type(family):
    assert type(family.model.model).__name__ == family.model_class
    assert family.model.model.model_type.name == family.model_type


def test_weight_one_is_the_base_model_bit_for_bit(family, lora):
    assert torch.equal(sampled(family, fixed(family.model, lora, 1.0)), sampled(family, family.model))


def test_weight_zero_is_the_adapter_merged_by_the_host(family, lora, merged):
    expected = sampled(family, merged)
    assert relative(sampled(family, fixed(family.model, lora, 0.0)), expected) < 1e-5
    assert relative(sampled(family, family.model), expected) > 1e-3


@pytest.mark.parametrize("passes", ["one batch", "two passes"])
def test_one_step_is_the_blend_of_base_and_merged(family, lora, merged, passes, monkeypatch):
    monkeypatch.setattr(pack_module("unguide_comfy.blending").Call, "fits", lambda *_: passes == "one batch")
    base, adapted, blended = (
        sampled(family, model, steps=1) for model in (family.model, merged, fixed(family.model, lora, -1.0))
    )
    assert relative(blended, 2.0 * adapted - base) < 1e-5


def test_the_model_is_afterwards_as_it_was(family, lora):
    before = state_of(family.model)
    sampled(family, fixed(family.model, lora, -1.0), steps=1)
    assert_unchanged(before, family.model)


def test_the_probe_measures_alignment_and_influence_in_finite_numbers(family, lora):
    def guider(model: Any) -> Any:
        return custom.CFGGuider.execute(model, family.conditioning(1), family.conditioning(0), 4.0)[0]

    settings = deciding.ProbeSettings(repeats=1, probe_steps=1)
    (decision,), report = gating.probe_prompt(family.model, (lora,), settings, guider, family.latent()["samples"])
    found = {statistic.name: statistic for statistic in decision.statistics}
    assert set(found) == {"alignment", "influence", "patch", "paper"}
    # the prompt is the concept's own, and the baseline's first noise the probe's
    assert found["alignment"].score == pytest.approx(1.0, abs=1e-3)
    for name in ("influence", "patch"):
        assert found[name].concept[0] == pytest.approx(found[name].prompt[0], rel=1e-3)
    assert found["paper"].score > 0.0
    assert decision.detected
    assert json.loads(decision.to_json())
    assert report.evaluations["probe"] > 0
