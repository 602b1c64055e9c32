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
from tests.host.conftest import fixed, ksampler, settings
from tests.host.families import FAMILIES, Family
from tests.host.test_blending import assert_unchanged, relative, state_of

load, before = pack_module("unguide_comfy.lora.load"), pack_module("unguide_comfy.gate.before")
baseline = pack_module("unguide_comfy.probe.baseline")
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
    return load.ErasureLora(path.name, adapter, 1.0, "the concept", family.conditioning(1), family.conditioning(0))


@pytest.fixture(scope="module")
def merged(family: Family) -> Any:
    """The host's own LoRA loader on the same tensors."""
    return comfy.sd.load_lora_for_models(family.model, None, tensors(family), 1.0, 0.0)[0]


def sampled(family: Family, model: Any, steps: int = 2, batch: int = 2) -> torch.Tensor:
    prompts = family.conditioning(1), family.conditioning(0)
    return ksampler(model, *prompts, family.latent(batch), steps=steps)


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
    monkeypatch.setattr(pack_module("unguide_comfy.blend.forward").Call, "_fits", lambda *_: passes == "one batch")
    base, adapted, blended = (
        sampled(family, model, steps=1) for model in (family.model, merged, fixed(family.model, lora, -1.0))
    )
    assert relative(blended, 2.0 * adapted - base) < 1e-5


def test_the_model_is_afterwards_as_it_was(family, lora):
    before = state_of(family.model)
    sampled(family, fixed(family.model, lora, -1.0), steps=1)
    assert_unchanged(before, family.model)


def probed(family: Family, lora: Any, **options: Any) -> tuple[Any, Any]:
    """The decision on the concept's own prompt, whose conditioning has some options more, and the cost."""

    def guider(model: Any) -> Any:
        ((text, more),) = family.conditioning(1)
        return custom.CFGGuider.execute(model, [[text, {**more, **options}]], family.conditioning(0), 4.0)[0]

    chosen = settings(repeats=1, probe_steps=1)
    (decision,), _, cost = before.probe_prompt(family.model, (lora,), chosen, guider, family.latent()["samples"])
    return decision, cost


def test_the_probe_measures_every_statistic_in_finite_numbers(family, lora):
    decision, cost = probed(family, lora)
    found = {statistic.name: statistic for statistic in decision.statistics}
    assert set(found) == {"alignment", "influence", "paper"}
    # the prompt is the concept's own, and the baseline's first noise the probe's
    assert found["alignment"].score == pytest.approx(1.0, abs=1e-3)
    assert found["influence"].concept[0] == pytest.approx(found["influence"].prompt[0], rel=1e-3)
    assert found["paper"].score > 0.0
    assert decision.influence_map.shape == (8, 8)
    assert decision.influence_map.isfinite().all()
    assert decision.detected
    assert json.loads(decision.to_json())["sigma"] == decision.sigma
    assert cost.evaluations["probe"] > 0


@pytest.mark.parametrize(
    ("family", "option"),
    [("SDXL", {"width": 512, "height": 512}), ("Flux dev", {"guidance": 30.0})],
    ids=["SDXL", "Flux dev"],
    indirect=["family"],
    scope="module",
)
def test_a_baseline_is_remembered_by_all_that_the_network_reads_beside_the_text(family, lora, option):
    """Sizes and guidance stay where another prompt takes the text's place."""
    baseline.memory.clear()
    fresh, _ = probed(family, lora, **option)
    baseline.memory.clear()
    other, _ = probed(family, lora)
    again, _ = probed(family, lora, **option)
    assert again.statistics == fresh.statistics
    assert other.statistics != fresh.statistics
