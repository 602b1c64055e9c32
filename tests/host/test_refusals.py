"""Bad input stops with a sentence that names the file, what was found, what was expected and the remedy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_custom_sampler as custom
from safetensors.torch import save_file

from tests.conftest import pack_module
from tests.host.conftest import Demo, guided, latent, settings

load_erasure_lora = pack_module("unguide_comfy.lora.load").load_erasure_lora
AdapterError = pack_module("unguide_core.formats").AdapterError
LAYER = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def lora_folder(tmp_path: Path):
    """A `loras` folder of the host's for one test."""
    known = folder_paths.folder_names_and_paths["loras"]
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    yield tmp_path
    known[0].remove(str(tmp_path))


def pair(layer: str = LAYER, rank: int = 1, width: int = 768, out: int = 320) -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_down.weight": torch.ones(rank, width), f"{layer}.lora_up.weight": torch.ones(out, rank)}


def attached(model: Any, folder: Path, tensors: dict[str, torch.Tensor]) -> Any:
    save_file(tensors, folder / "bad.safetensors")
    return guided(model, load_erasure_lora("bad.safetensors", 1.0))


def test_an_adapter_for_another_architecture(golden_model, lora_folder):
    sdxl = pair("lora_unet_input_blocks_4_1_transformer_blocks_9_attn2_to_k", width=2048, out=640)
    with pytest.raises(
        AdapterError, match=r"'bad.safetensors' matches 0 of 1 layers of this model.*another architecture"
    ):
        attached(golden_model, lora_folder, sdxl)


def test_an_adapter_that_matches_in_part(golden_model, lora_folder):
    with pytest.raises(AdapterError, match=r"matches 1 of 2 layers of this model.*input_blocks.11"):
        attached(golden_model, lora_folder, {**pair(), **pair(LAYER.replace("input_blocks.1.", "input_blocks.11."))})


def test_an_adapter_of_another_width(golden_model, lora_folder):
    with pytest.raises(AdapterError, match=r"shape \[320, 1024\].*shape \[320, 768\].*another architecture"):
        attached(golden_model, lora_folder, pair(width=1024))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite(value, golden_model, lora_folder):
    tensors = pair()
    tensors[f"{LAYER}.lora_up.weight"][3] = value
    with pytest.raises(AdapterError, match=r"bad.safetensors.*NaN or infinite"):
        attached(golden_model, lora_folder, tensors)


@pytest.mark.parametrize("length", [0, 40, 2000])
def test_a_file_that_is_empty_or_cut_off(length, lora_folder):
    save_file(pair(), lora_folder / "whole.safetensors")
    (lora_folder / "cut.safetensors").write_bytes((lora_folder / "whole.safetensors").read_bytes()[:length])
    with pytest.raises(AdapterError, match=r"cut.safetensors"):
        load_erasure_lora("cut.safetensors", 1.0)


def test_a_name_outside_the_folder(lora_folder):
    outside = lora_folder.parent / "outside.safetensors"
    save_file(pair(), outside)
    with pytest.raises(FileNotFoundError):
        load_erasure_lora("../outside.safetensors", 1.0)
    outside.unlink()


def test_numbers_too_large_for_the_models_precision(demo_lora):
    state = pack_module("unguide_comfy.blend.state")
    layers = {
        name: dataclasses.replace(layer, up=layer.up.float() * 1e8) for name, layer in demo_lora.adapter.layers.items()
    }
    run = state.Run((demo_lora,), (layers,))
    assert run.cast(0, torch.device("cpu"), torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"cat.safetensors' holds numbers that are too large for torch.float16.*bfloat"
    ):
        run.cast(0, torch.device("cpu"), torch.float16)


def sampled(model: Any, guider: Any) -> Any:
    sigmas = custom.BasicScheduler.execute(model, "normal", 2, 1.0)[0]
    sampler = custom.KSamplerSelect.execute("euler")[0]
    return custom.SamplerCustomAdvanced.execute(custom.RandomNoise.execute(3)[0], guider, sampler, sigmas, latent())


def test_a_statistic_without_what_it_needs(demo, demo_lora):
    bare = dataclasses.replace(demo_lora, concept=None, neutral=None)
    for statistic, missing in (("alignment", "the concept's own prompt"), ("paper", "a neutral prompt")):
        model = guided(demo.model, bare, statistic=statistic)
        guider = custom.BasicGuider.execute(model, demo.encode("a photo of the dog"))[0]
        with pytest.raises(ValueError, match=rf"{statistic}.*cat.safetensors.*needs {missing}.*connect"):
            sampled(model, guider)


def prompted(demo: Demo, model: Any) -> Any:
    return custom.CFGGuider.execute(model, demo.encode("a photo of the dog"), demo.encode(""), 4.0)[0]


def test_a_concept_prompt_that_is_the_neutral_one(demo, demo_lora):
    empty = dataclasses.replace(demo_lora, concept=demo_lora.neutral)
    model = guided(demo.model, empty, statistic="alignment")
    with pytest.raises(ValueError, match="the same prediction as the neutral prompt"):
        sampled(model, prompted(demo, model))


def test_a_model_that_predicts_nan(demo, demo_lora):
    model = guided(demo.model, demo_lora)
    model.add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, "broken", lambda executor, *args, **kwargs: executor(*args, **kwargs) * float("nan")
    )
    with pytest.raises(ValueError, match="expected finite numbers: the model predicted NaN"):
        sampled(model, prompted(demo, model))


def test_resisting_adversarial_text_without_the_concepts_prompt(demo, demo_lora):
    bare = dataclasses.replace(demo_lora, concept=None)
    with pytest.raises(ValueError, match=r"cat.safetensors', encoded: connect a CLIP to Load Erasure LoRA"):
        guided(demo.model, bare, resist_adversarial=True)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"probe_steps": 20, "probe_schedule_steps": 20}, "probe_steps is 20 and probe_schedule_steps 20"),
        ({"repeats": 0}, "repeats is 0"),
        ({"recheck_every": -1}, "recheck_every is -1"),
        ({"false_positive_rate": 0.0}, "false_positive_rate is 0.0; expected a share between 0 and 1"),
        ({"weight_detected": float("nan")}, "weight_detected is nan; expected a finite number"),
        ({"threshold": float("inf")}, "threshold is inf; expected a finite number"),
        ({"statistic": "patch"}, "statistic is 'patch'; expected one of automatic, influence, alignment, paper"),
        ({"decide": "probe"}, "decide is 'probe'; expected one of during sampling, before sampling, as the paper"),
        ({"on_detection": "stop"}, "on_detection is 'stop'; expected one of automatic, continue, restart"),
        ({"resist_adversarial": True, "decide": "as the paper"}, "the paper's rule cannot resist adversarial text"),
        ({"resist_adversarial": True, "statistic": "paper"}, "resist_adversarial decides by influence or alignment"),
    ],
)
def test_settings_that_make_no_sense(chosen, message):
    with pytest.raises(ValueError, match=message):
        settings(**chosen)
