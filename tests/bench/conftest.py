"""What the tests of unguide_bench share: the demo model on real ComfyUIs, and a short run on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from dev.host import Host
from dev.models import CHECKPOINT

LORA = "unguide-demo/selective/cat.safetensors"
CAT, KITTY, DOG = "a photo of the cat", "a photo of the kitty", "a photo of the dog"
STEPS = 4
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official prompt file of a concept, with fewer prompts."""
    path = tmp_path_factory.mktemp("prompts") / "cat.json"
    content = {"target": CAT, "reference": "a photo of the forest", "synonyms": [KITTY], "other": [DOG, ""]}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of a few thousand weights a layer, random, in the files of a download."""
    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    config = CLIPConfig(
        text_config={**small, **tokens, "vocab_size": 49408, "max_position_embeddings": 77},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(3)
    model = CLIPModel(config)
    model.visual_projection.weight.data.normal_()
    model.text_projection.weight.data.normal_()
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(Host.from_environment().comfyui / "comfy" / "sd1_tokenizer" / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """InceptionV3's weights, random, in torch-fidelity's file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Empty(FeatureExtractorInceptionV3):
        """The network as it is made, before weights are loaded into it."""

        def load_state_dict(self, *arguments):
            return None

    weights = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save({}, weights)
    torch.manual_seed(0)
    torch.save(Empty("inception-v3-compat", ["2048"], str(weights)).state_dict(), weights)
    return weights


def arguments(prompts: Path, out: Path, *more: str, seeds: int = 2, lora: str = LORA) -> list[str]:
    """The command's arguments for a short run on the demo model."""
    what = ["--checkpoint", CHECKPOINT, "--lora", lora, "--prompts", str(prompts), "--out", str(out)]
    small = ["--steps", str(STEPS), "--cfg", "4", "--size", "64", "--sampler", "euler", "--seeds", str(seeds)]
    return [*what, *small, *more]
