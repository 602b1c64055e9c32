"""Loading and saving erasure LoRAs in the host: partial matches, full weights, the report, the output folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import awaited, load_pack, pack_module
from tests.host.conftest import guided
from tests.host.families import FAMILIES, Family
from tests.host.test_blending import relative
from tests.host.test_foreign import Inputs, adapted, factors
from tests.host.test_refusals import LAYER, pair

formats, names = (pack_module(f"unguide_core.{name}") for name in ("formats", "adapter.names"))
match = pack_module("unguide_comfy.lora.match").match
AdapterError = formats.AdapterError
LACKING = LAYER.replace("input_blocks.1.", "input_blocks.11.")


@pytest.fixture
def lora_folder(tmp_path: Path) -> Iterator[Path]:
    """A `loras` folder of the host's for one test."""
    known = folder_paths.folder_names_and_paths["loras"]
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    yield tmp_path
    known[0].remove(str(tmp_path))


@pytest.fixture
def output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(folder))
    return folder


def nodes() -> dict[str, Any]:
    async def listed() -> list[Any]:
        return await (await load_pack().comfy_entrypoint()).get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in awaited(listed())}


def load(name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """What the node gives: the erasure LoRA, and the report."""
    (lora,), report = nodes()["UnGuideLoadErasureLora"].execute(name, options.pop("strength", 1.0), **options).result
    return lora, json.loads(report)


# partial matches


def test_a_partial_match_stops_and_names_what_would_let_it_go_on(golden_model, lora_folder):
    save_file({**pair(), **pair(LACKING)}, lora_folder / "part.safetensors")
    with pytest.raises(AdapterError, match=r"matches 1 of 2 layers.*input_blocks\.11.*or allow partial matches"):
        load("part.safetensors", model=golden_model)
    lora, _ = load("part.safetensors")
    with pytest.raises(AdapterError, match="matches 1 of 2 layers"):
        guided(golden_model, lora)


def test_an_allowed_partial_match_goes_on_and_is_counted_and_listed(golden_model, lora_folder):
    save_file({**pair(), **pair(LACKING)}, lora_folder / "part.safetensors")
    lora, report = load("part.safetensors", model=golden_model, allow_partial=True)
    assert report["model"]["matched"] == 1
    assert report["model"]["lacking_in_the_model"] == {"count": 1, "layers": [LACKING]}
    lacking = report["model"]["lacking_in_the_file"]
    assert lacking["count"] == len(lacking["layers"]) > 0
    assert all(path.endswith("attn2.to_k") for path in lacking["layers"])
    (branch,) = guided(golden_model, lora).get_wrappers("sampler_sample", "unguide")[0].branches
    assert list(branch.layers) == [LAYER]


def test_no_match_at_all_stops_even_where_partial_ones_are_allowed(golden_model, lora_folder):
    save_file(pair(LACKING), lora_folder / "none.safetensors")
    with pytest.raises(AdapterError, match="matches 0 of 1 layers"):
        load("none.safetensors", model=golden_model, allow_partial=True)


def test_two_layers_for_one_weight_are_refused(golden_model, lora_folder):
    stem = LAYER.replace("diffusion_model.", "lora_unet_").replace(".", "_")
    save_file({**pair(), **pair(stem)}, lora_folder / "twice.safetensors")
    with pytest.raises(AdapterError, match=r"has two layers for .*keep one adapter"):
        load("twice.safetensors", model=golden_model)


def test_the_report_says_which_rule_gave_the_scale(lora_folder):
    save_file(pair(), lora_folder / "bare.safetensors")
    _, report = load("bare.safetensors")
    assert report["notes"][0].startswith("scale = alpha / rank: scale 1, that is alpha = rank")
    assert (report["format"], report["layers"], report["ranks"], report["scales"]) == ("generic", 1, [1], [1.0])
    assert "model" not in report
    _, report = load("bare.safetensors", alpha=8.0)
    assert report["notes"] == ["scale = alpha / rank: alpha 8.0, as asked for"]


# full weights


@pytest.fixture(scope="module", params=["SD 1.x", "SD 3.x", "Flux dev"])
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    known = FAMILIES[request.param]
    assert known.model is not None
    yield known
    known.__dict__.pop("model", None)


def test_full_weights_against_the_loaded_model_predict_what_the_replaced_model_does(family, lora_folder):
    """As ESD writes them: diffusers' names, whole weights; fused q, k, v of SD3 and Flux as parts."""
    weights = {}
    for layer, (down, up) in factors(family).items():
        before = family.weight(layer)
        path = names.dotted(layer).split(".", 1)[1]
        weights[f"{path}.weight"] = before + (up.flatten(1) @ down.flatten(1)).reshape(before.shape)
    save_file(weights, lora_folder / "esd.safetensors")
    with pytest.raises(AdapterError, match="connect that model to Load Erasure LoRA"):
        load("esd.safetensors")
    lora, report = load("esd.safetensors", model=family.model, energy=1.0)
    assert report["format"] == "full"
    assert report["model"]["matched"] == len(family.layers)
    assert "of each one's energy is kept" in report["notes"][1]
    expected = replaced(family, weights)
    assert relative(adapted(family, lora.adapter), expected) < 1e-5
    assert relative(Inputs(family).ours(), expected) > 1e-2


def replaced(family: Family, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The host's network with the weights put into it."""
    before = {}
    for layer in family.layers:
        weight = family.weight(layer)
        before[layer] = weight.clone()
        weight.copy_(weights[names.dotted(layer).split(".", 1)[1] + ".weight"])
    try:
        return Inputs(family).ours()
    finally:
        for layer, value in before.items():
            family.weight(layer).copy_(value)


def test_kohyas_own_flux_names_act_on_the_fused_weight(lora_folder):
    """kohya has one layer for q, k and v: [3 * hidden, rank] up."""
    flux = FAMILIES["Flux dev"]
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    generator = torch.Generator().manual_seed(2)
    down, up = torch.randn(2, 128, generator=generator), 0.1 * torch.randn(384, 2, generator=generator)
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}, lora_folder / "flux.safetensors")
    lora, report = load("flux.safetensors", model=flux.model)
    assert report["model"]["matched"] == 1
    weight = flux.model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight
    found, before = adapted(flux, lora.adapter), weight.clone()
    weight.add_(up @ down)
    assert relative(found, Inputs(flux).ours()) < 1e-5
    weight.copy_(before)
    assert relative(found, Inputs(flux).ours()) > 1e-3


# saving


def save(loras: tuple[Any, ...], prefix: str = "loras/unguide_erasure", format: str = "kohya") -> list[str]:
    return nodes()["UnGuideSaveErasureLora"].execute(loras, prefix, format).ui["text"]


@pytest.mark.parametrize("format", list(formats.FORMATS))
def test_a_saved_file_is_found_and_loaded_again_in_every_format(golden_model, lora_folder, output_folder, format):
    folder_paths.add_model_folder_path("loras", str(output_folder / "loras"))
    save_file({**pair(), f"{LAYER}.alpha": torch.tensor(4.0)}, lora_folder / "cat.safetensors")
    lora, _ = load("cat.safetensors", concept="a photo of the cat")
    (name,) = save((lora,), format=format)
    assert name == f"loras/unguide_erasure_00001_{formats.FORMATS[format].suffix}"
    listed = name.removeprefix("loras/") + ("" if formats.FORMATS[format].suffix else "/adapter_model.safetensors")
    assert listed in folder_paths.get_filename_list("loras")
    again, report = load(listed, model=golden_model)
    assert report["model"]["matched"] == 1
    assert again.adapter.card.concept_prompt == "a photo of the cat"
    found, expected = (next(iter(match(x.adapter, golden_model.model, x.name).layers.values())) for x in (again, lora))
    assert torch.equal(found.weight_delta(), expected.weight_delta())


def test_no_file_is_ever_replaced_and_a_stack_gets_a_file_each(lora_folder, output_folder):
    save_file(pair(), lora_folder / "cat.safetensors")
    lora, _ = load("cat.safetensors")
    names = [name for _ in range(2) for name in save((lora, lora))]
    assert names == [f"loras/unguide_erasure_{n:05}_.safetensors" for n in range(1, 5)]
    assert len({(output_folder / name).stat().st_ino for name in names}) == 4


@pytest.mark.parametrize("format", ["official", "peft"])
def test_of_a_stack_that_cannot_be_saved_whole_nothing_is_saved(format, lora_folder, output_folder):
    import dataclasses

    save_file(pair(), lora_folder / "cat.safetensors")
    lora, _ = load("cat.safetensors")
    strange = dataclasses.replace(lora.adapter, layers={"strange": next(iter(lora.adapter.layers.values()))})
    with pytest.raises(AdapterError, match="strange"):
        save((lora, dataclasses.replace(lora, adapter=strange)), format=format)
    assert [path for path in output_folder.rglob("*") if path.name.startswith("unguide_erasure")] == []


def test_strength_goes_into_the_scale_and_takes_the_calibration_with_it(lora_folder, output_folder, demo_lora):
    import dataclasses

    half = dataclasses.replace(demo_lora, strength=0.5)
    full, halved = (formats.load_adapter(output_folder / save((lora,))[0]) for lora in (demo_lora, half))
    kept = demo_lora.adapter.card
    assert full.card == dataclasses.replace(kept, calibration=json.loads(json.dumps(kept.calibration)))
    assert halved.card.calibration == {}
    assert full.card.calibration
    for one, other in zip(full.layers.values(), halved.layers.values(), strict=True):
        assert other.scale == 0.5 * one.scale
        assert torch.equal(one.up, other.up)


def test_a_name_outside_the_output_folder_is_refused(lora_folder, output_folder):
    save_file(pair(), lora_folder / "cat.safetensors")
    lora, _ = load("cat.safetensors")
    with pytest.raises(Exception, match="outside the output folder"):
        save((lora,), "../../evil")
    assert not any(output_folder.parent.parent.glob("evil*"))


def test_what_a_format_cannot_hold_is_an_error_and_no_file(lora_folder, output_folder):
    save_file({**pair(), f"{LAYER}.alpha": torch.tensor(3.0)}, lora_folder / "cat.safetensors")
    lora, _ = load("cat.safetensors")
    with pytest.raises(AdapterError, match="not a power of two"):
        save((lora,), format="official")
    assert not list(output_folder.rglob("*.pth"))
