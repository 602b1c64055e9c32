"""SDXL in unguide_train: a tiny random one, beside the host's own classes with the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.conftest import pack_module
from tests.train.conftest import QUICK, SHAPE, in_the_graph
from unguide_core.formats import load_adapter
from unguide_train.cli import main
from unguide_train.config import Config, from_values
from unguide_train.job import train_concept
from unguide_train.model import Base, DiffusersPredictor, ModelError, load_base

WIDTHS = 64, 128
LAYERS = 3
TABLE = "{}embeddings.token_embedding.weight"
PROMPTS = ("a photo of the cat", "")
# Adam turns rounding into another sign where a gradient is near 0, so the change of weights is compared entry by entry:
# those of the two programs differ by 3e-5 at the median; where the model does not get its pooled states, by 2e-3
LIMITS = {"text": 1e-5, "eps": 1e-4, "loss, relative": 1e-3, "half of the entries": 3e-4, "nine of ten entries": 3e-3}


@dataclass(frozen=True)
class Tiny:
    """A tiny SDXL: a diffusers folder, the same as a checkpoint file of the host's making, and the host's model."""

    folder: Path
    file: Path
    model: Any

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    def conditioning(self, prompt: str) -> list[list[Any]]:
        """The host's CONDITIONING of a prompt, of the host's own text encoders."""
        states, pooled = host_text(self, prompt)
        return [[states, {"pooled_output": pooled}]]


def tokenizer_files(folder: Path) -> Path:
    """A CLIP tokenizer of single letters."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def text_model(kind: Any, width: int, tokenizer: Any, activation: str) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=LAYERS,
        num_attention_heads=width // 64, projection_dim=width, hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = kind(config)
    model.state_dict()[TABLE.format("" if kind is CLIPTextModel else "text_model.")].normal_()  # so that words matter
    return model


def host_config() -> Any:
    made = comfy.supported_models.SDXL(
        {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "channel_mult": (1, 2),
            "num_res_blocks": [1, 1], "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2],
            "transformer_depth_middle": 2, "use_spatial_transformer": True, "use_linear_in_transformer": True,
            "use_temporal_attention": False, "num_classes": "sequential", "adm_in_channels": WIDTHS[1] + 6 * 256,
            "context_dim": sum(WIDTHS), "num_heads": -1, "num_head_channels": 64, "legacy": False,
            "dtype": torch.float32,
        }
    )  # fmt: skip
    made.set_inference_dtype(torch.float32, None)
    return made


def host_model(weights: Mapping[str, Tensor]) -> Any:
    prefix, config = "model.diffusion_model.", host_config()
    model = config.get_model(weights, prefix, device=torch.device("cpu"))
    model.load_model_weights(dict(weights), prefix)
    return comfy.model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Made in float32, outside of the host's inference mode."""
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(0)
        return made(tmp_path_factory.mktemp("sdxl"))


def made(place: Path) -> Tiny:
    folder = place / "tiny-sdxl"
    words = tokenizer_files(folder / "tokenizer")
    first = CLIPTokenizer.from_pretrained(words)
    second = CLIPTokenizer.from_pretrained(words, pad_token="!")
    second.save_pretrained(folder / "tokenizer_2")
    texts = (
        text_model(CLIPTextModel, WIDTHS[0], first, "quick_gelu"),
        text_model(CLIPTextModelWithProjection, WIDTHS[1], second, "gelu"),
    )
    for name, text in zip(("text_encoder", "text_encoder_2"), texts, strict=True):
        text.save_pretrained(folder / name)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=sum(WIDTHS),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=WIDTHS[1] + 6 * 256,
    )  # fmt: skip
    for name, weight in unet.state_dict().items():
        if "attn2.to_v" in name:
            weight.mul_(10)  # so that prompts matter: gradients near 0 leave the signs of Adam's steps to rounding
    unet.save_pretrained(folder / "unet")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    theirs, config = unet.state_dict(), host_config()
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    weights = {f"model.diffusion_model.{ours}": theirs[name] for name, ours in names.items() if name in theirs}
    assert len(weights) == len(theirs)
    file = place / "tiny-sdxl.safetensors"
    save_file({name: value.contiguous() for name, value in {**weights, **saved_by_the_host(texts)}.items()}, file)
    return Tiny(folder, file, host_model(weights))


def saved_by_the_host(texts: tuple[Any, Any]) -> dict[str, Tensor]:
    """The text encoders' weights as the host names them in a checkpoint file."""
    state: dict[str, Tensor] = {}
    for name, text in zip(("clip_l", "clip_g"), texts, strict=True):
        for key, value in text.state_dict().items():
            inner = key if key.startswith("text_") else f"text_model.{key}"
            state[f"{name}.transformer.{inner}"] = value
    return host_config().process_clip_state_dict_for_saving(state)


def host_text(tiny: Tiny, prompt: str) -> tuple[Tensor, Tensor]:
    """The text states and the pooled state, as the host's SDXL text encoders compute them."""
    out = []
    for number, (width, activation) in enumerate(zip(WIDTHS, ("quick_gelu", "gelu"), strict=True)):
        words = CLIPTokenizer.from_pretrained(tiny.folder / ("tokenizer", "tokenizer_2")[number])
        tokens = words(prompt, padding="max_length", max_length=77)["input_ids"]
        shape = {
            "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": LAYERS,
            "num_attention_heads": width // 64, "hidden_act": activation, "max_position_embeddings": 77,
            "eos_token_id": words.eos_token_id,
        }  # fmt: skip
        special = {"start": words.bos_token_id, "end": words.eos_token_id, "pad": words.pad_token_id}
        encoder = comfy.sd1_clip.SDClipModel(
            layer="hidden", layer_idx=-2, layer_norm_hidden_state=False, textmodel_json_config=shape,
            special_tokens=special, dtype=torch.float32,
        )  # fmt: skip
        weights = {
            key.split("transformer.", 1)[1]: value
            for key, value in comfy.utils.load_torch_file(str(host_named(tiny, number)), safe_load=True).items()
        }
        table = TABLE.format("text_model.")
        weights[table] = torch.nn.functional.pad(weights[table], (0, 0, 0, 49408 - len(words)))  # the host's is fixed
        missing = encoder.transformer.load_state_dict(weights, strict=False).missing_keys
        assert set(missing) <= {"text_projection.weight"} if number == 0 else not missing
        out.append(encoder.encode_token_weights([[(token, 1.0) for token in tokens]]))
    return torch.cat([out[0][0], out[1][0]], dim=-1), out[1][1]


def host_named(tiny: Tiny, number: int) -> Path:
    """The weights of one text encoder as the host reads them out of the checkpoint file, kept in a file."""
    path = tiny.file.with_name(f"text_{number}.safetensors")
    if not path.exists():
        state = comfy.utils.load_torch_file(str(tiny.file), safe_load=True)
        clip = host_config().process_clip_state_dict(state)
        prefix = ("clip_l.", "clip_g.")[number]
        save_file({key: value.contiguous() for key, value in clip.items() if key.startswith(prefix)}, path)
    return path


@pytest.fixture(scope="module")
def base(tiny: Tiny) -> Base:
    return load_base(tiny.folder)


@pytest.fixture
def config(tiny: Tiny, tmp_path: Path) -> Config:
    concept = {"concept": "cat", "reference": "forest", "synonyms": ["kitty"]}
    kept = ["", "a photo of the dog"]
    values = {"base": tiny.folder, "out": tmp_path, "size": 64, "recipe": QUICK, "kept": kept, "concepts": [concept]}
    return from_values({**values, "calibrate": False})


def test_text_and_pooled_states_are_the_hosts(tiny: Tiny, base: Base) -> None:
    encoded = base.encode(PROMPTS)
    for prompt in PROMPTS:
        states, pooled = host_text(tiny, prompt)
        assert float((encoded[prompt].states - states[0]).abs().max()) < LIMITS["text"]
        assert float((encoded[prompt].pooled - pooled[0]).abs().max()) < LIMITS["text"]
    assert not torch.allclose(encoded[PROMPTS[0]].pooled, encoded[PROMPTS[1]].pooled)


def host_eps(model: Any, z: Tensor, times: Tensor, conditionings: list[Any]) -> Tensor:
    """The host's prediction for whole prompts, each a row; sizes are given it as its own sampling does."""
    sigma = model.model_sampling.sigmas[times].float()
    x = z * (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()
    height, width = (8 * side for side in z.shape[-2:])
    text = torch.cat([states for [[states, _]] in conditionings])
    pooled = torch.cat([options["pooled_output"] for [[_, options]] in conditionings])
    adm = model.encode_adm(pooled_output=pooled, width=width, height=height)
    with torch.inference_mode():
        denoised = model.apply_model(x, sigma, c_crossattn=text, y=adm)
    return (x - denoised.clone()) / sigma.view(-1, 1, 1, 1)


def test_predictions_are_the_hosts_at_any_size(tiny: Tiny, base: Base) -> None:
    times, encoded = torch.tensor([900, 300]), base.encode(PROMPTS)
    for shape in ((4, 8, 8), (4, 8, 16)):
        z = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
        found = DiffusersPredictor(base.unet, encoded)(z, times, PROMPTS).detach()
        expected = host_eps(tiny.model.model, z, times, [tiny.conditioning(prompt) for prompt in PROMPTS])
        assert float((found - expected).abs().max()) < LIMITS["eps"]


def test_a_checkpoint_file_of_the_hosts_making_is_the_same_base_as_the_folder(tiny: Tiny, base: Base) -> None:
    file = load_base(tiny.file, tiny.tokenizer)
    assert (file.hash, file.size) == (base.hash, 1024)
    one, other = file.encode(PROMPTS), base.encode(PROMPTS)
    for prompt in PROMPTS:
        torch.testing.assert_close(one[prompt].states, other[prompt].states)
        torch.testing.assert_close(one[prompt].pooled, other[prompt].pooled)
    z, times = torch.randn(2, *SHAPE), torch.tensor([900, 300])
    same = [DiffusersPredictor(b.unet, one)(z, times, PROMPTS).detach() for b in (file, base)]
    torch.testing.assert_close(*same)


def assert_alike(pairs: Iterable[tuple[Any, Any]]) -> None:
    """Compare pairs of layers: the differences of the entries of `up`, relative to the layer's root mean square."""
    apart = torch.cat([((one.up - other.up).abs() / one.up.square().mean().sqrt()).flatten() for one, other in pairs])
    half, most = (float(apart.quantile(share)) for share in (0.5, 0.9))
    print(f"SDXL: relative difference of the entries: half below {half:.1e}, nine of ten below {most:.1e}")
    assert half < LIMITS["half of the entries"]
    assert most < LIMITS["nine of ten entries"]


def test_both_trainers_give_the_same_adapter_and_its_file_fits_the_hosts_model(tiny: Tiny, config: Config) -> None:
    summary = train_concept(config, config.concepts[0], quiet=True)
    here, there = load_adapter(summary.path), in_the_graph(tiny.model, tiny.conditioning, config)
    assert summary.evaluations == there.adapter.card.settings["evaluations"]
    assert summary.loss == pytest.approx(there.losses[-1], rel=LIMITS["loss, relative"])
    names = pack_module("unguide_comfy.train.predictor")._kohya_names(tiny.model.model)
    assert {names[path] for path in there.adapter.layers} == set(here.layers)
    assert_alike((layer, here.layers[names[path]]) for path, layer in there.adapter.layers.items())
    assert here.card.base_hash == there.adapter.card.base_hash
    read = pack_module("unguide_core.formats").load_adapter(Path(summary.path))
    matched = pack_module("unguide_comfy.lora.match").match(read, tiny.model.model, "cat").layers
    assert len(matched) == len(read.layers) == 2 * 2 * 4


@pytest.mark.parametrize("layers", ["explicit content", "style"])
def test_every_preset_chooses_the_same_layers_in_both_programs(tiny: Tiny, config: Config, layers: str) -> None:
    recipe = {**QUICK, "iterations": 1, "check": 0}
    chosen = config.model_copy(update={"layers": layers, "recipe": recipe})
    read = load_adapter(train_concept(chosen, chosen.concepts[0], quiet=True).path)
    own = tiny.model.model
    paths = pack_module("unguide_core.training.layers").chosen_layers(
        [n for n, m in own.diffusion_model.named_modules() if isinstance(m, torch.nn.Linear)], layers
    )
    names = pack_module("unguide_comfy.train.predictor")._kohya_names(own)
    assert {names[f"diffusion_model.{path}"] for path in paths} == set(read.layers)
    assert not any("embedding" in name for name in read.layers)


def test_the_command_line_trains_it_from_a_folder_and_from_a_file(tiny: Tiny, tmp_path: Path, capsys: Any) -> None:
    words = ["--concept", "cat", "--reference", "forest", "--preset", "paper", "--iterations", "1"]
    quick = ["--schedule-steps", "10", "--size", "64"]
    sources = {"folder": [str(tiny.folder)], "file": [str(tiny.file), "--tokenizer", str(tiny.tokenizer)]}
    for name, source in sources.items():
        out = str(tmp_path / f"{name}.safetensors")
        alone = ["--no-calibration"] if name == "folder" else []
        assert main([*words, *quick, *alone, "--base", *source, "--out", out]) == 0, capsys.readouterr().err
    folder, file = (load_adapter(tmp_path / f"{name}.safetensors") for name in sources)
    assert_alike((layer, file.layers[name]) for name, layer in folder.layers.items())
    assert folder.card.base_model == file.card.base_model == "tiny-sdxl"
    assert not folder.card.calibration
    assert file.card.calibration["model"] == file.card.base_hash


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"v_pred": torch.zeros(1)}, "predicts something else.*'v_pred'.*Train Erasure LoRA"),
        ({"conditioner.embedders.1.model.text_projection": None}, "lacks its 'text_projection'"),
        ({"conditioner.embedders.1.model.ln_final.weight": None}, "lacks 1 weights"),
    ],
)
def test_a_file_that_cannot_be_trained_here_is_refused(tiny, tmp_path, change, words) -> None:
    weights = {**comfy.utils.load_torch_file(str(tiny.file), safe_load=True), **change}
    save_file({name: value.clone() for name, value in weights.items() if value is not None}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=words):
        load_base(tmp_path / "x.safetensors", tiny.tokenizer)


def test_a_folder_that_predicts_velocities_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    for part in tiny.folder.iterdir():
        if part.name != "scheduler":
            (tmp_path / part.name).symlink_to(part)
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ModelError, match="predicts 'v_prediction'; expected the noise"):
        load_base(tmp_path)


def test_a_folder_of_another_architecture_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """As SD 2.x: one text encoder, of another width than SD 1.x has."""
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / part).symlink_to(tiny.folder / part)
    down, up = ("CrossAttnDownBlock2D",), ("CrossAttnUpBlock2D",)
    shape = {"block_out_channels": (32,), "layers_per_block": 1, "down_block_types": down, "up_block_types": up}
    UNet2DConditionModel(**shape, cross_attention_dim=WIDTHS[0]).save_pretrained(tmp_path / "unet")
    with pytest.raises(ModelError, match=r"neither a Stable Diffusion 1\.x .* nor an SDXL"):
        load_base(tmp_path)


def test_a_unet_without_its_second_text_encoder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    for part in tiny.folder.iterdir():
        if part.name != "text_encoder_2":
            (tmp_path / part.name).symlink_to(part)
    with pytest.raises(ModelError, match="text states of width 192 and text encoders of 64"):
        load_base(tmp_path)
