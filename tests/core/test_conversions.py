"""Adapters from one format into another and back, and what the command line makes of them."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unguide_core.adapter import Adapter, Card, LowRank, names
from unguide_core.adapter.card import read_card
from unguide_core.adapter.formats.cli import main
from unguide_core.adapter.formats.comparing import differences, distance
from unguide_core.formats import FORMATS, AdapterError, NameTakenError, load_adapter, save_adapter

REPOSITORY = Path(__file__).resolve().parents[2]
CARD = Card(
    concept="cat",
    synonyms=("kitty", "feline"),
    target="a photo of the cat",
    reference="a photo of the forest",
    objective="paper",
    base_model="SD 1.4",
    base_hash="ab" * 32,
    settings={"rate": 3e-5, "steps": [1, 2]},
    calibration={"mean": 2.0, "anything": {"nested": [0.1]}},
    author="someone",
    licence="MIT",
    extra={"a tool's own key": "kept", "modelspec.date": "2026-11-22"},
)
# positions of the attention layers of each layout, all of them: (down, up) in diffusers' numbers
PLACES = {
    "sd": (((0, 2), (1, 2), (2, 2)), ((1, 3), (2, 3), (3, 3))),
    "sdxl": (((1, 2), (2, 2)), ((0, 3), (1, 3))),
    "koala": (((1, 1), (2, 1)), ((0, 2), (1, 2))),
    "demo": (((0, 1), (1, 1)), ((0, 2), (1, 2))),
}


def attention_paths(layout):
    down, up = PLACES[layout]
    blocks = [f"down_blocks.{level}.attentions.{i}" for level, count in down for i in range(count)]
    blocks += [f"up_blocks.{level}.attentions.{i}" for level, count in up for i in range(count)]
    return [f"{block}.transformer_blocks.0.attn2.to_k" for block in (*blocks, "mid_block.attentions.0")]


@pytest.fixture
def randn(generator):
    return lambda *shape: torch.randn(*shape, generator=generator)


def unet_adapter(randn, layout="sd", ranks=(1, 2, 4), scales=(8.0, 2.0, -0.5)):
    """Linear layers of every attention, ranks and scales that differ; scales that every format can say."""
    layers = {
        f"unet.{path}": LowRank(randn(rank, 7), randn(5, rank), scale)
        for path, rank, scale in zip(
            attention_paths(layout), itertools.cycle(ranks), itertools.cycle(scales), strict=False
        )
    }
    return Adapter(layers, CARD)


def saved(adapter, folder, format, name="cat"):
    path = folder / f"{name}{FORMATS[format].suffix}"
    save_adapter(adapter, path, format)
    return path


@pytest.mark.parametrize(("first", "second"), itertools.permutations(FORMATS, 2))
def test_a_round_trip_between_two_formats_is_bit_exact(tmp_path, randn, first, second):
    """Tensors and scales of fp32, and the card; only through `official` may a power of two move from scale to `up`."""
    start = load_adapter(saved(unet_adapter(randn), tmp_path, first))
    there = load_adapter(saved(start, tmp_path, second, "there"))
    back = load_adapter(saved(there, tmp_path, first, "back"))
    assert set(back.layers) == set(start.layers)
    for name, layer in start.layers.items():
        same = back.layers[name]
        moved = 1.0 if "official" not in (first, second) else same.scale / layer.scale
        assert torch.equal(same.down, layer.down)
        assert torch.equal(same.up * moved, layer.up)
        assert same.scale == layer.scale * moved
        assert torch.equal(same.weight_delta(), layer.weight_delta())
        assert "official" in (first, second) or moved == 1.0
    assert replace(back.card, alpha=None) == replace(start.card, alpha=None)
    assert back.card.source_format == first


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_keeps_values_scales_and_the_card(tmp_path, randn, format):
    adapter = unet_adapter(randn)
    back = load_adapter(saved(adapter, tmp_path, format))
    found = list(differences(adapter, back))
    assert len(found) == len(adapter.layers)
    assert {one.distance for one in found} == {0.0}
    assert replace(back.card, source_format="", rank=None, alpha=None) == CARD


@pytest.mark.parametrize("rank", [1, 3, 7, 49])
@pytest.mark.parametrize("alpha", [8.0, 0.1, 3.3, -2.0])
@pytest.mark.parametrize("format", ["kohya", "generic", "diffusers", "peft"])
def test_the_scale_of_every_float32_alpha_comes_back_exactly(tmp_path, randn, format, rank, alpha):
    scale = torch.tensor(alpha).item() / rank
    adapter = unet_adapter(randn, ranks=(rank,), scales=(scale, scale * 2))
    back = load_adapter(saved(adapter, tmp_path, format))
    assert sorted(layer.scale for layer in back.layers.values()) == sorted(x.scale for x in adapter.layers.values())


def test_the_official_format_refuses_what_it_cannot_say_exactly(tmp_path, randn):
    with pytest.raises(AdapterError, match=r"stores no alpha.*scale 3.*not a power of two.*choose another format"):
        saved(unet_adapter(randn, scales=(3.0,)), tmp_path, "official")
    layer = LowRank(randn(2, 7, 3, 3), randn(5, 2, 1, 1), 8.0)
    with pytest.raises(AdapterError, match="linear layers of a UNet only"):
        saved(Adapter({"diffusion_model.input_blocks.1.0.in_layers.2": layer}), tmp_path, "official")
    assert list(tmp_path.iterdir()) == []


def test_the_official_scripts_read_what_we_write_as_they_read_their_own(tmp_path, randn, golden_c):
    """`torch.load` gives the dict of A and B; the metadata beside it are invisible to them."""
    official = load_adapter(golden_c.path("train_main_lora_pth"))
    save_adapter(official, tmp_path / "lora.pth", "official")
    theirs, ours = (
        torch.load(path, weights_only=True) for path in (golden_c.path("train_main_lora_pth"), tmp_path / "lora.pth")
    )
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_fused_and_host_names_have_no_diffusers_names(tmp_path, randn):
    layer = LowRank(randn(2, 7), randn(5, 2), 1.0)
    adapter = Adapter({"diffusion_model.double_blocks.0.img_attn.qkv": layer})
    for format in ("diffusers", "peft"):
        with pytest.raises(AdapterError, match=r"have no name in the other naming.*choose a format that keeps"):
            saved(adapter, tmp_path, format)
    assert load_adapter(saved(adapter, tmp_path, "generic")).layers.keys() == adapter.layers.keys()


@pytest.mark.parametrize("layout", PLACES)
def test_names_of_a_whole_unet_find_their_layout_and_come_back(layout):
    theirs = [f"unet.{path}" for path in attention_paths(layout)]
    # KOALA's names are a part of SDXL's, in diffusers' naming
    host = names.renamed(theirs, names.HOST, layout if layout == "koala" else None)
    parts = {name.split(".")[1] for name in host.values()}
    assert parts == {"input_blocks", "output_blocks", "middle_block"}
    assert names.renamed(host.values(), names.UNET) == {name: path for path, name in host.items()}
    stems = names.renamed(theirs, names.KOHYA)
    assert names.renamed(stems.values(), names.UNET) == {stem: path for path, stem in stems.items()}


def test_two_names_of_one_layer_are_refused_and_none_is_lost(tmp_path, randn):
    layer = LowRank(randn(2, 7), randn(5, 2), 1.0)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    twice = Adapter({f"unet.{path}": layer, f"lora_unet_{path.replace('.', '_')}": layer})
    for format in ("kohya", "diffusers", "generic"):
        with pytest.raises(AdapterError, match="are one layer"):
            saved(twice, tmp_path, format)
    with pytest.raises(AdapterError, match="two of its layers are the same one"):
        save_adapter(twice, tmp_path / "cat.safetensors")
    mixed = Adapter({f"unet.{path}": layer, "transformer.transformer_blocks.0.attn.to_q": layer})
    with pytest.raises(AdapterError, match="diffusers has no name for the layer"):
        saved(mixed, tmp_path, "diffusers")


def test_names_that_fit_several_layouts_are_refused_unless_the_layout_is_named():
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    with pytest.raises(ValueError, match="give the layout"):
        names.renamed([path], names.HOST)
    found = {layout: names.renamed([path], names.HOST, layout)[path].split(".")[2] for layout in names.LAYOUTS}
    assert found == {"sd": "4", "sdxl": "4", "koala": "3", "demo": "3"}


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("lora_unet_down_blocks_1_resnets_0_time_emb_proj", "unet.down_blocks.1.resnets.0.time_emb_proj"),
        ("lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"),
        ("lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0", None),
        ("lora_unet_input_blocks_3_0_op", "diffusion_model.input_blocks.3.0.op"),
        ("lora_unet_output_blocks_5_2_conv", "diffusion_model.output_blocks.5.2.conv"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv"),
        ("lora_unet_joint_blocks_3_x_block_attn_qkv", "diffusion_model.joint_blocks.3.x_block.attn.qkv"),
        ("lora_unet_final_layer_adaLN_modulation_1", "diffusion_model.final_layer.adaLN_modulation.1"),
        ("lora_transformer_single_transformer_blocks_2_proj_mlp", "transformer.single_transformer_blocks.2.proj_mlp"),
        ("lycoris_transformer_blocks_0_attn_add_q_proj", "transformer.transformer_blocks.0.attn.add_q_proj"),
    ],
)  # fmt: skip
def test_kohya_stems_come_apart_at_the_right_underscores(stem, name):
    expected = name or "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"
    assert names.dotted(stem) == expected


# the card in other programs' keys


def test_a_saved_file_has_the_keys_that_other_programs_show(tmp_path, randn):
    layers = {f"unet.{path}": LowRank(randn(4, 768), randn(320, 4), 2.0) for path in attention_paths("sd")}
    path = saved(Adapter(layers, replace(CARD, rank=4, alpha=8.0)), tmp_path, "kohya")
    with safe_open(path, "pt") as content:
        metadata = content.metadata()
    assert metadata["unguide.version"] == "1"
    assert (metadata["ss_network_module"], metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (
        "networks.lora",
        "4",
        "8",
    )
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (metadata["modelspec.title"], metadata["modelspec.author"]) == ("erase cat", "someone")
    assert metadata["modelspec.license"] == "MIT"
    assert metadata["modelspec.date"] == "2026-11-22"
    assert metadata["a tool's own key"] == "kept"
    assert read_card(path).synonyms == ("kitty", "feline")


def test_keys_of_other_programs_survive_and_the_rank_is_the_files_own(tmp_path, randn):
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{stem}.lora_down.weight": randn(2, 7), f"{stem}.lora_up.weight": randn(5, 2)}
    foreign = {"modelspec.title": "My eraser", "ss_tag_frequency": "{}", "ss_network_dim": "99", "prompts": "van gogh"}
    save_file(tensors, tmp_path / "leco.safetensors", foreign)
    adapter = load_adapter(tmp_path / "leco.safetensors", alpha=4.0)
    save_adapter(adapter, tmp_path / "again.safetensors")
    with safe_open(tmp_path / "again.safetensors", "pt") as content:
        metadata = content.metadata()
    assert {key: metadata[key] for key in foreign} == {**foreign, "ss_network_dim": "2"}
    assert (metadata["ss_network_alpha"], metadata["unguide.concept"]) == ("4", "van gogh")


# the command line


@pytest.fixture
def run(capsys):
    """run(arguments) runs a command in this process: its status and what it printed."""

    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=printed.out, stderr=printed.err)

    return call


def test_the_command_line_is_a_module(golden_c):
    command = [sys.executable, "-m", "unguide_core.formats", "inspect", str(golden_c.path("train_main_lora_pth"))]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert "source_format: official" in shown.stdout


def test_inspect_shows_the_card_and_how_the_file_was_read(run, golden_c, tmp_path, randn):
    shown = run("inspect", golden_c.path("train_main_lora_pth"))
    assert shown.returncode == 0
    assert "source_format: official" in shown.stdout
    assert "alpha = 8 * rank, the official scripts' constant" in shown.stdout
    listed = run("inspect", saved(unet_adapter(randn), tmp_path, "peft"), "--layers").stdout
    assert "concept: cat" in listed
    assert "  unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k: rank 1, scale 8" in listed


def test_convert_then_diff_finds_no_difference_and_no_file_is_ever_lost(run, tmp_path, randn):
    source, target = saved(unet_adapter(randn), tmp_path, "diffusers"), tmp_path / "lora.pth"
    assert run("convert", source, target, "--format", "official").returncode == 0
    compared = run("diff", source, target)
    assert (compared.returncode, compared.stdout.splitlines()[0]) == (0, "16 layers are equal, 0 differ")
    before = target.read_bytes()
    again = run("convert", source, target, "--format", "official")
    assert again.returncode == 2
    assert "it exists already; choose another name" in again.stderr
    assert "Traceback" not in again.stderr
    assert target.read_bytes() == before


def test_diff_tells_which_layers_differ_and_by_how_much(run, tmp_path, randn):
    adapter = unet_adapter(randn)
    first = next(iter(adapter.layers))
    changed = {**adapter.layers, first: replace(adapter.layers[first], scale=4.0)}
    changed.pop("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    paths = [saved(adapter, tmp_path, "kohya", "a"), saved(replace(adapter, layers=changed), tmp_path, "kohya", "b")]
    compared = run("diff", *paths)
    assert compared.returncode == 1
    assert "0.5  lora_unet_down_blocks_0_attentions_0" in compared.stdout
    assert "only in one  lora_unet_mid_block" in compared.stdout
    assert "14 layers are equal, 2 differ" in compared.stdout


def test_errors_on_the_command_line_are_one_sentence(run, tmp_path):
    failed = run("inspect", tmp_path / "nothing.safetensors")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: adapter 'nothing.safetensors': no such file")
    assert len(failed.stderr.splitlines()) == 1


def test_full_weights_are_converted_against_a_checkpoint_on_the_command_line(run, tmp_path, randn):
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    base, change = randn(5, 7), randn(5, 2) @ randn(2, 7)
    host = names.LAYOUTS["sd"].renamed(path, names.HOST)
    save_file({f"model.diffusion_model.{host}.weight": base}, tmp_path / "sd.ckpt")
    save_file({f"{path}.weight": base + change}, tmp_path / "esd.safetensors")
    source, target = tmp_path / "esd.safetensors", tmp_path / "lora.safetensors"
    assert "connect that model" in run("inspect", source).stderr
    options = ("--base", tmp_path / "sd.ckpt", "--energy", "1")
    assert run("convert", source, target, "--format", "kohya", *options).returncode == 0
    (layer,) = load_adapter(target).layers.values()
    assert layer.rank == 2
    assert torch.allclose(layer.weight_delta(), change, atol=1e-5)


# writing


def test_saving_without_replacing_keeps_the_existing_file_and_folder(tmp_path, randn):
    for format in FORMATS:
        path = saved(unet_adapter(randn), tmp_path, format, format)
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(NameTakenError, match="it exists already"):
            save_adapter(unet_adapter(randn), path, format, replace=False)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_unknown_format_is_refused(tmp_path, randn):
    with pytest.raises(AdapterError, match="unknown format 'zip'; expected one of generic, kohya"):
        save_adapter(unet_adapter(randn), tmp_path / "a.zip", "zip")


def test_distances_are_of_the_changes_not_of_their_factors(randn):
    layer = LowRank(randn(2, 7), randn(5, 2), 2.0)
    same = LowRank(layer.down * 4.0, layer.up / 4.0, 2.0)
    assert distance(layer, same) < 1e-12
    assert distance(layer, replace(layer, scale=1.0)) == pytest.approx(0.5)
    assert distance(layer, LowRank(randn(2, 8), randn(5, 2))) == float("inf")


# PEFT's configuration


def peft_folder(tmp_path, randn, **changed):
    adapter = unet_adapter(randn)
    folder = saved(adapter, tmp_path, "peft")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    return folder


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'; expected one of LORA, LOHA, LOKR"),
        ({"peft_type": "LOHA"}, "no 'hada_' in its tensors' names"),
        ({"use_dora": True}, "no 'lora_magnitude_vector' in its tensors' names"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; expected a finite number"),
        ({"r": 0}, "expected a whole number from 1 on"),
        ({"r": 64, "rank_pattern": {}}, "but 64 in the configuration"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "regular expression '(a+)+b'; expected plain names"),
        ({"alpha_pattern": [1]}, "alpha_pattern is a list"),
    ],
)
def test_a_configuration_that_is_no_plain_loras_is_refused(tmp_path, randn, changed, words):
    with pytest.raises(AdapterError) as caught:
        load_adapter(peft_folder(tmp_path, randn, **changed))
    assert words in str(caught.value)


def test_the_ends_of_paths_name_exceptions_as_in_peft(tmp_path, randn):
    folder = peft_folder(tmp_path, randn, alpha_pattern={"attn2.to_k": 3.0}, lora_alpha=1)
    scales = {layer.scale * layer.rank for layer in load_adapter(folder).layers.values()}
    assert scales == {3.0}


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="a folder is an adapter only if PEFT saved it"):
        load_adapter(tmp_path)


def test_the_files_of_a_folder_are_what_peft_and_the_stock_tools_expect(tmp_path, randn):
    folder = saved(unet_adapter(randn), tmp_path, "peft")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    keys = set(load_file(folder / "adapter_model.safetensors"))
    assert all(key.startswith("base_model.model.") for key in keys)
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
