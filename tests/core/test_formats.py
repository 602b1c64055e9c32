import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unguide_core.adapter import Adapter, Card, LowRank, containers
from unguide_core.formats import AdapterError, load_adapter, save_adapter

KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
KOHYA_LDM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
GENERIC = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k"
OFFICIAL = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def randn(generator):
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def file(tmp_path):
    """file(tensors, metadata) writes safetensors and returns the path."""

    def write(tensors, metadata=None, name="cat.safetensors"):
        save_file(tensors, tmp_path / name, metadata)
        return tmp_path / name

    return write


def pair(randn, stem, rank=2, sizes=(7, 5), kernel=(), alpha=None):
    tensors = {
        f"{stem}.lora_down.weight": randn(rank, sizes[0], *kernel),
        f"{stem}.lora_up.weight": randn(sizes[1], rank, *[1] * len(kernel)),
    }
    return tensors if alpha is None else {**tensors, f"{stem}.alpha": torch.tensor(alpha)}


def refused(path, *fragments, **options):
    """The error names the file and every fragment, and ends in a remedy."""
    with pytest.raises(AdapterError) as caught:
        load_adapter(path, **options)
    message = str(caught.value)
    assert message.startswith(f"adapter '{path.name}': ")
    for fragment in fragments:
        assert fragment in message, message
    return message


# Reading


def test_the_real_official_file_loads_with_the_official_scale(golden_c):
    adapter = load_adapter(golden_c.path("train_main_lora_pth"))
    official = torch.load(golden_c.path("train_main_lora_pth"), weights_only=True)
    names = {key.removesuffix(".lora.A") for key in official if key.endswith(".lora.A")}
    assert set(adapter.layers) == {f"diffusion_model.{name}" for name in names}
    for name in names:
        layer = adapter.layers[f"diffusion_model.{name}"]
        assert torch.equal(layer.down, official[f"{name}.lora.A"].T)
        assert torch.equal(layer.up, official[f"{name}.lora.B"].T)
        assert layer.scale == 8.0
    assert (adapter.card.source_format, adapter.card.rank, adapter.card.alpha) == ("official", 1, 8.0)
    assert "alpha = 8 * rank" in adapter.notes[0]


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(1, None, 8.0), (4, None, 8.0), (4, 8.0, 2.0), (4, -2, -0.5)])
def test_the_official_formats_alpha_means_alpha_over_rank(tmp_path, randn, rank, alpha, scale):
    torch.save({f"{OFFICIAL}.lora.A": randn(7, rank), f"{OFFICIAL}.lora.B": randn(rank, 5)}, tmp_path / "lora.pth")
    adapter = load_adapter(tmp_path / "lora.pth", alpha=alpha)
    assert adapter.layers[GENERIC].scale == scale
    assert adapter.card.alpha == scale * rank


@pytest.mark.parametrize(("stem", "source_format"), [(KOHYA, "kohya"), (KOHYA_LDM, "kohya"), (GENERIC, "generic")])
@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
def test_kohya_and_generic_layers_keep_their_names_and_values(file, randn, stem, source_format, kernel):
    tensors = pair(randn, stem, rank=4, kernel=kernel, alpha=2.0)
    adapter = load_adapter(file(tensors))
    layer = adapter.layers[stem]
    assert torch.equal(layer.down, tensors[f"{stem}.lora_down.weight"])
    assert torch.equal(layer.up, tensors[f"{stem}.lora_up.weight"])
    assert layer.scale == 0.5
    assert (adapter.card.source_format, adapter.card.rank, adapter.card.alpha) == (source_format, 4, 2.0)


def test_the_format_is_told_by_the_content_not_by_the_name(tmp_path, file, randn):
    path = file(pair(randn, KOHYA, alpha=1.0))
    path.rename(tmp_path / "lora.pth")
    assert load_adapter(tmp_path / "lora.pth").card.source_format == "kohya"
    torch.save({f"{OFFICIAL}.lora.A": randn(7, 1), f"{OFFICIAL}.lora.B": randn(1, 5)}, path)
    assert load_adapter(path).card.source_format == "official"


def test_a_missing_alpha_means_scale_one_as_in_the_host_and_is_noted(file, randn):
    adapter = load_adapter(file({**pair(randn, KOHYA, rank=4), **pair(randn, KOHYA_LDM, rank=2, alpha=1.0)}))
    assert adapter.layers[KOHYA].scale == 1.0
    assert adapter.layers[KOHYA_LDM].scale == 0.5
    assert "the file's alpha (1 layers)" in adapter.notes[0]
    assert "scale 1, that is alpha = rank" in adapter.notes[0]
    assert "because the file stores none (1 layers)" in adapter.notes[0]
    assert (adapter.card.rank, adapter.card.alpha) == (None, None)


def test_alpha_overrides_every_layers_and_is_noted(file, randn):
    path = file({**pair(randn, KOHYA, rank=4), **pair(randn, KOHYA_LDM, rank=2, alpha=1.0)})
    adapter = load_adapter(path, alpha=8)
    assert [layer.scale for layer in adapter.layers.values()] == [2.0, 4.0]
    assert adapter.notes == ("scale = alpha / rank: alpha 8, as asked for",)


def test_text_encoder_layers_are_left_out_and_noted(file, randn):
    text = pair(randn, "lora_te_text_model_encoder_layers_0_mlp_fc1", alpha=1.0)
    adapter = load_adapter(file({**pair(randn, KOHYA, alpha=1.0), **text}))
    assert list(adapter.layers) == [KOHYA]
    assert "1 text-encoder layers were left out" in adapter.notes[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_stays_as_stored(file, randn, dtype):
    tensors = {key: value.to(dtype) for key, value in pair(randn, KOHYA, alpha=1.0).items()}
    assert load_adapter(file(tensors)).layers[KOHYA].down.dtype == dtype


def test_foreign_metadata_is_kept(file, randn):
    path = file(pair(randn, KOHYA, alpha=1.0), {"rank": "1", "prompts": "cat", "unguide.concept": "cat"})
    card = load_adapter(path).card
    assert card.concept == "cat"
    assert card.extra == {"rank": "1", "prompts": "cat"}


def test_a_loaded_adapter_does_not_hold_on_to_its_file(file, randn):
    path = file(pair(randn, KOHYA, alpha=1.0))
    adapter = load_adapter(path)
    before = adapter.layers[KOHYA].down.clone()
    content = bytearray(path.read_bytes())
    content[-200:] = bytes(200)
    path.write_bytes(content)
    assert torch.equal(adapter.layers[KOHYA].down, before)


# Saving


def mixed_adapter(randn):
    layers = {
        GENERIC: LowRank(randn(1, 7).T.contiguous().T, randn(5, 1), 8.0),
        f"{GENERIC}.conv": LowRank(randn(3, 7, 3, 3), randn(5, 3, 1, 1), 1 / 3),
        f"{GENERIC}.half": LowRank(randn(2, 7).half(), randn(5, 2).half(), -0.1),
        KOHYA: LowRank(randn(49, 7), randn(5, 49), 1 / 49),
    }
    card = Card(concept="cat", synonyms=("kitty",), reference="forest", source_format="official", settings={"lr": 3e-5})
    return Adapter(layers, card)


def test_a_saved_adapter_comes_back_bit_exact_card_included(tmp_path, randn):
    adapter = mixed_adapter(randn)
    save_adapter(adapter, tmp_path / "cat.safetensors")
    back = load_adapter(tmp_path / "cat.safetensors")
    assert set(back.layers) == set(adapter.layers)
    for name, layer in adapter.layers.items():
        assert torch.equal(back.layers[name].down, layer.down)
        assert torch.equal(back.layers[name].up, layer.up)
        assert back.layers[name].down.dtype == layer.down.dtype
        assert back.layers[name].scale == layer.scale
    assert back.fingerprint == adapter.fingerprint
    assert back.card == adapter.card


@pytest.mark.parametrize("rank", [1, 2, 3, 7, 49, 64, 128])
@pytest.mark.parametrize("alpha", [8.0, 1.0, 0.1, 3.3, -2.0, 1e-3])
def test_the_scale_of_every_float32_alpha_comes_back_exactly(tmp_path, rank, alpha):
    scale = torch.tensor(alpha).item() / rank
    save_adapter(
        Adapter({GENERIC: LowRank(torch.ones(rank, 7), torch.ones(5, rank), scale)}), tmp_path / "a.safetensors"
    )
    assert load_adapter(tmp_path / "a.safetensors").layers[GENERIC].scale == scale


def test_official_files_come_back_bit_exact_from_safetensors(golden_c, tmp_path):
    official = load_adapter(golden_c.path("train_main_lora_pth"))
    save_adapter(official, tmp_path / "cat.safetensors")
    back = load_adapter(tmp_path / "cat.safetensors")
    assert (back.fingerprint, back.card) == (official.fingerprint, official.card)


def test_saved_files_have_the_keys_that_the_stock_lora_loader_knows(tmp_path, randn):
    save_adapter(mixed_adapter(randn), tmp_path / "cat.safetensors")
    tensors = load_file(tmp_path / "cat.safetensors")
    for stem in (GENERIC, KOHYA):
        assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"} <= set(tensors)
    assert tensors[f"{GENERIC}.alpha"].item() == 8.0
    with safe_open(tmp_path / "cat.safetensors", "pt") as content:
        assert content.metadata()["unguide.concept"] == "cat"
        assert content.metadata()["format"] == "pt"


def test_an_existing_file_survives_a_failed_save_and_no_temporary_file_stays(tmp_path, randn, monkeypatch):
    path = tmp_path / "cat.safetensors"
    save_adapter(mixed_adapter(randn), path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(containers.os, "fsync", full_disk)
    with pytest.raises(AdapterError, match=r"cannot save .*No space left on device.*that the disk is not full"):
        save_adapter(mixed_adapter(randn), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_saving_replaces_an_existing_file_and_leaves_nothing_else(tmp_path, randn):
    path = tmp_path / "cat.safetensors"
    path.write_bytes(b"old")
    save_adapter(mixed_adapter(randn), path)
    assert len(load_adapter(path).layers) == 4
    assert os.listdir(tmp_path) == [path.name]


def test_trained_layers_are_saved_without_their_gradients(tmp_path):
    layer = LowRank(torch.ones(1, 7, requires_grad=True), torch.ones(5, 1, requires_grad=True), 8.0)
    save_adapter(Adapter({GENERIC: layer}), tmp_path / "cat.safetensors")
    assert not load_adapter(tmp_path / "cat.safetensors").layers[GENERIC].down.requires_grad


def test_a_scale_too_large_for_float32_comes_back(tmp_path):
    small = 1e-20
    adapter = Adapter({GENERIC: LowRank(torch.full((1, 7), small), torch.full((5, 1), small), 1e39)})
    save_adapter(adapter, tmp_path / "cat.safetensors")
    assert load_adapter(tmp_path / "cat.safetensors").layers[GENERIC].scale == 1e39


@pytest.mark.parametrize("name", ["cat.pth", "cat", "cat.safetensors.bak"])
def test_names_that_loaders_would_not_know_are_refused(tmp_path, randn, name):
    with pytest.raises(AdapterError, match=r"expected a name ending in \.safetensors"):
        save_adapter(mixed_adapter(randn), tmp_path / name)


def test_saving_into_a_missing_folder_is_refused(tmp_path, randn):
    (tmp_path / "file").touch()
    for folder in ("missing", "file"):
        with pytest.raises(AdapterError, match="check that the folder exists"):
            save_adapter(mixed_adapter(randn), tmp_path / folder / "cat.safetensors")


# Refusals


def test_a_missing_or_empty_file_is_refused(tmp_path):
    refused(tmp_path / "cat.safetensors", "no such file", "models/loras")
    (tmp_path / "cat.safetensors").touch()
    refused(tmp_path / "cat.safetensors", "the file is empty", "again")
    refused(tmp_path, "no such file")


@pytest.mark.parametrize(
    "content", [b"hello, I am a text file", b"\x00" * 64, b"{", b"PK", struct.pack("<Q", 2) + b"[]"]
)
def test_a_file_that_is_neither_safetensors_nor_torch_is_refused(tmp_path, content):
    (tmp_path / "cat.safetensors").write_bytes(content)
    refused(tmp_path / "cat.safetensors", "neither safetensors nor a torch zip")


@pytest.mark.parametrize("kept", [9, 50, 0.5, 0.99, -1])
def test_truncated_safetensors_are_refused(file, randn, kept):
    path = file({**pair(randn, KOHYA, alpha=1.0), **pair(randn, KOHYA_LDM, alpha=1.0)})
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(path, "truncated", "again")


@pytest.mark.parametrize("kept", [5, 30, 0.5, 0.99, -1])
def test_truncated_torch_files_are_refused(tmp_path, randn, kept):
    path = tmp_path / "lora.pth"
    torch.save({f"{OFFICIAL}.lora.A": randn(700, 1), f"{OFFICIAL}.lora.B": randn(1, 5)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(path, "truncated", "again")


@pytest.mark.parametrize("header", [b"{}", b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}', b'{"a":1}', b"{"])
def test_a_damaged_safetensors_header_is_refused(tmp_path, header):
    path = tmp_path / "cat.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(path)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("i_ran",)


@pytest.mark.parametrize("as_value", [True, False])
def test_pickles_with_code_are_refused_and_do_not_run(tmp_path, randn, monkeypatch, as_value):
    monkeypatch.chdir(tmp_path)
    torch.save({f"{OFFICIAL}.lora.A": Malicious()} if as_value else Malicious(), tmp_path / "lora.pth")
    refused(tmp_path / "lora.pth", "more than tensors, possibly code")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Malicious()))
    refused(tmp_path / "bare.pth", "a bare pickle, which could run code")
    assert not (tmp_path / "i_ran").exists()


def test_old_torch_pickles_are_refused(tmp_path, randn):
    path = tmp_path / "lora.pth"
    torch.save({f"{OFFICIAL}.lora.A": randn(7, 1)}, path, _use_new_zipfile_serialization=False)
    refused(path, "a bare pickle", "save it again with a current torch")


def test_zip_bombs_and_foreign_zips_are_refused(tmp_path):
    path = tmp_path / "lora.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    refused(path, "a compressed zip, which torch does not write")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat.safetensors", b"x")
    refused(path, "a zip without a torch pickle", "unpack it")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": {}}, torch.ones(2)])
def test_torch_files_that_hold_no_dict_of_tensors_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "lora.pth")
    refused(tmp_path / "lora.pth", "where a dict of plain tensors is expected")


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path):
    huge = torch.ones(1).expand(2**20, 2**20)
    torch.save({f"{OFFICIAL}.lora.A": huge, f"{OFFICIAL}.lora.B": huge}, tmp_path / "lora.pth")
    refused(tmp_path / "lora.pth", "damaged or forged")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("diffusion_model.x.diff", "full weight differences"),
        ("lora_unet_x.set_weight", "full replacement weights"),
        ("lora_unet_x.oft_R.weight", "OFT of PEFT"),
        ("lora_unet_x.on_input", "IA3"),
        ("down_blocks.0.vera_lambda_d", "VeRA"),
        ("lora_unet_x.lora_embedding_A", "LoRA of an embedding"),
        ("lora_unet_x.reshape_weight", "reshaped weights"),
        ("lora_unet_x_attn2_to_k.lora_degen.weight", "GLoCE"),
        ("lora_unet_x_attn2_to_k.selector.select_weight.weight", "GLoCE"),
        ("lora_unet_x.attention_gate.encoder_layer.slf_attn.w_qs.weight", "CPE"),
        ("down_blocks.0.attentions.0.down.weight", "Receler"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.adapter.up.bias", "Receler"),
        ("down_blocks.0.to_k.lora_B.bias", "biases"),
        ("base_model.model.conv_out.modules_to_save.weight", "modules_to_save"),
        ("lora_controlnet", "ControlLoRA"),
    ],
)
def test_formats_that_are_no_low_rank_adapters_are_refused_by_name(file, randn, key, name):
    path = file({**pair(randn, KOHYA, alpha=1.0), key: randn(4, 4)})
    refused(path, name, key, "which is refused", "convert it")


def test_full_weights_and_foreign_names_are_refused(file, randn):
    refused(file({"model.diffusion_model.out.2.weight": randn(4, 4)}), "full weights", "connect that model")
    refused(file({"first_stage_model.weight": randn(4, 4)}), "no low-rank layers")
    refused(file(pair(randn, "somewhere.else")), "1 layers of unknown naming, such as 'somewhere.else'", "lora_unet_")
    refused(file({**pair(randn, KOHYA), "note": randn(1)}), "'note', which does not belong to a low-rank layer")
    refused(file({}), "holds no tensors")


def test_a_file_that_changes_only_the_text_encoder_is_refused(file, randn):
    refused(
        file(pair(randn, "lora_te_text_model_encoder_layers_0_mlp_fc1")), "only the text encoder", "use a LoRA that"
    )


@pytest.mark.parametrize("suffix", ["lora_down.weight", "lora_up.weight"])
def test_a_missing_partner_is_refused(file, randn, suffix):
    tensors = pair(randn, KOHYA, alpha=1.0)
    del tensors[f"{KOHYA}.{suffix}"]
    refused(file(tensors), f"has no partner '{KOHYA}.{suffix}'", "incomplete")
    refused(file({f"{KOHYA}.alpha": torch.tensor(1.0), **pair(randn, KOHYA_LDM)}), "has no partner")


def test_factors_of_different_rank_are_refused_with_the_layers_name(file, randn):
    tensors = {f"{KOHYA}.lora_down.weight": randn(2, 7), f"{KOHYA}.lora_up.weight": randn(5, 3)}
    refused(file(tensors), f"layer '{KOHYA}': rank mismatch", "rank 2", "rank 3")


@pytest.mark.parametrize("shape", [(), (4,), (0, 4)])
def test_factors_that_are_no_matrices_are_refused(file, tmp_path, randn, shape):
    refused(file({**pair(randn, KOHYA), f"{KOHYA}.lora_up.weight": torch.ones(shape)}), "expected a matrix")
    torch.save({f"{OFFICIAL}.lora.A": torch.ones(shape), f"{OFFICIAL}.lora.B": randn(1, 5)}, tmp_path / "lora.pth")
    refused(tmp_path / "lora.pth", "expected a matrix")


@pytest.mark.parametrize("wild", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_with_the_layers_name(file, tmp_path, randn, wild):
    tensors = pair(randn, KOHYA, alpha=1.0)
    tensors[f"{KOHYA}.lora_up.weight"][0, 0] = wild
    refused(file(tensors), f"layer '{KOHYA}': up holds NaN or infinite values")
    refused(file(pair(randn, KOHYA, alpha=wild)), f"'{KOHYA}.alpha' is [{wild}]; expected one finite number")
    refused(file(pair(randn, KOHYA)), "overriding alpha", alpha=wild)
    torch.save({f"{OFFICIAL}.lora.A": randn(7, 1) * wild, f"{OFFICIAL}.lora.B": randn(1, 5)}, tmp_path / "lora.pth")
    refused(tmp_path / "lora.pth", f"layer '{OFFICIAL}': down holds NaN or infinite values")


def test_an_alpha_that_is_not_one_real_number_is_refused(file, randn):
    refused(file({**pair(randn, KOHYA), f"{KOHYA}.alpha": torch.tensor(1j)}), "expected one finite number")
    refused(file({**pair(randn, KOHYA), f"{KOHYA}.alpha": torch.ones(2)}), "alpha' is [1.0, 1.0]; expected one")


def test_packed_numbers_of_four_bits_are_refused_as_factors_and_as_full_weights(tmp_path):
    for key in (f"{KOHYA}.lora_down.weight", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"):
        header = f'{{"{key}":{{"dtype":"F4","shape":[4,4],"data_offsets":[0,8]}}}}'.encode()
        path = tmp_path / "cat.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        refused(path, "float4", "save it as float16", base=lambda name: torch.ones(4, 4))


def test_weights_that_are_whole_numbers_are_refused(file, randn):
    refused(file({k: v.to(torch.int8) for k, v in pair(randn, KOHYA).items()}), "dtype torch.int8; expected a floating")


def test_a_broken_card_is_refused_with_its_key(file, randn):
    path = file(pair(randn, KOHYA, alpha=1.0), {"unguide.synonyms": "kitty, feline"})
    refused(path, "the card's key 'unguide.synonyms' is 'kitty, feline'; expected JSON")


def test_a_flipped_bit_in_any_byte_ends_in_an_error_or_a_valid_adapter(file, randn):
    """A first taste of hostile input: no crash, no hang, no other exception."""
    path = file(pair(randn, "lora_unet_x", rank=1, sizes=(2, 2), alpha=1.0), {"unguide.concept": "cat"})
    content = path.read_bytes()
    outcomes = {"loaded": 0, "refused": 0}
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            load_adapter(path)
            outcomes["loaded"] += 1
        except AdapterError:
            outcomes["refused"] += 1
    assert outcomes["loaded"] > 0
    assert outcomes["refused"] > 0
