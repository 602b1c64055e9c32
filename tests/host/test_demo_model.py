"""UnGuide Demo Model: it builds the unpacked checkpoint, and the cards of its erasure LoRAs hold for it."""

from __future__ import annotations

import folder_paths
import pytest
import torch
from safetensors import safe_open

import nodes
from demo.captions import CLASSES
from tests.conftest import pack_module
from tests.host.conftest import CAT, CHECKPOINT, Demo, ksampler


@pytest.fixture(scope="module")
def built() -> Demo:
    with torch.inference_mode():
        return Demo(*pack_module("nodes.demo").DemoModel.execute().result)


def test_the_node_builds_the_checkpoints_model(built: Demo) -> None:
    """The layers of the text encoder that the node skips change nothing."""
    key = pack_module("unguide_comfy.model.key")
    loaded = Demo(*nodes.CheckpointLoaderSimple().load_checkpoint(CHECKPOINT))
    assert key.model_key(built.model) == key.model_key(loaded.model)
    assert key.base_hash(built.model) == key.base_hash(loaded.model)
    assert torch.equal(built.encode(CAT)[0][0], loaded.encode(CAT)[0][0])
    state, other = (one.clip.cond_stage_model.state_dict() for one in (built, loaded))
    assert set(state) == set(other)
    latent = torch.linspace(-2, 2, 256).reshape(1, 4, 8, 8)
    assert torch.equal(built.vae.decode(latent), loaded.vae.decode(latent))


def test_the_unpacked_checkpoint_credits_the_artwork() -> None:
    with safe_open(folder_paths.get_full_path("checkpoints", CHECKPOINT), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["licence"] == "CC-BY-4.0"
    assert all(name in metadata["credit"] for name in ("Twemoji", "Noto Emoji", "Fluent Emoji", "FxEmojis"))


def test_the_model_denoises_a_prompt(built: Demo) -> None:
    samples = ksampler(built.model, built.encode(CAT), built.encode(""), steps=2)
    assert samples.isfinite().all()
    assert built.vae.decode(samples).shape == (1, 64, 64, 3)


def test_the_ten_demo_loras_follow_the_users_own_in_this_loader_and_stand_in_no_other_list() -> None:
    own = folder_paths.get_filename_list("loras")
    (lora_name, *_) = pack_module("nodes.loader").LoadErasureLora.define_schema().inputs
    assert lora_name.options == [*own, *(f"demo/{name}" for name in sorted(CLASSES))]
    assert not [name for name in own if name.startswith("demo/")]


@pytest.mark.parametrize("concept", CLASSES)
def test_the_calibration_of_a_demo_lora_holds_for_the_nodes_model(built: Demo, concept: str) -> None:
    loader = pack_module("nodes.loader").LoadErasureLora
    lora, *_ = loader.execute(f"demo/{concept}", 1.0).result[0]
    key = pack_module("unguide_comfy.model.key")
    assert lora.adapter.card.base_hash == key.base_hash(built.model)
    measured = lora.adapter.card.calibration
    assert measured["model"] == key.model_key(built.model)
    assert measured["adapter"] == lora.adapter.signature


@pytest.mark.parametrize("name", ["demo/../paper/cat", "demo/../../README", "demo/cat.safetensors", "demo/", "/cat"])
def test_no_other_file_can_be_named(name: str) -> None:
    with pytest.raises(FileNotFoundError):
        pack_module("nodes.loader").LoadErasureLora.execute(name, 1.0)
