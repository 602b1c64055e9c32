"""Full replacement weights as low-rank adapters: which rank, how much of the change is kept, what is refused."""

import pytest
import torch
from safetensors.torch import save_file

from unguide_core.adapter.formats.full import low_rank_change
from unguide_core.formats import AdapterError, load_adapter

TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
TO_V = TO_K.replace("to_k", "to_v")
CONV = "down_blocks.0.resnets.0.conv1"
NORM = "down_blocks.0.resnets.0.norm1"


@pytest.fixture
def randn(generator):
    return lambda *shape: torch.randn(*shape, generator=generator)


def with_spectrum(randn, rows, columns, squares):
    """A matrix whose squared singular values are the given ones."""
    count = len(squares)
    left, right = torch.linalg.qr(randn(rows, count).double())[0], torch.linalg.qr(randn(columns, count).double())[0]
    return ((left * torch.tensor(squares).double().sqrt()) @ right.T).float()


@pytest.mark.parametrize("shape", [(9, 20), (20, 9)])
@pytest.mark.parametrize(("energy", "rank", "kept"), [(0.5, 1, 0.6), (0.9, 2, 0.9), (0.95, 3, 0.97), (1.0, 4, 1.0)])
def test_the_rank_is_the_smallest_that_keeps_the_energy(randn, shape, energy, rank, kept):
    base, change = randn(*shape), with_spectrum(randn, *shape, [0.6, 0.3, 0.07, 0.03])
    layer, found = low_rank_change(base + change, base, energy - 1e-4 if energy < 1.0 else 1.0 - 1e-6)
    assert layer.rank == rank
    assert found == pytest.approx(kept, abs=1e-4)
    lost = (layer.weight_delta() - change).square().sum() / change.square().sum()
    assert lost.item() == pytest.approx(1.0 - kept, abs=1e-4)


def test_a_convolutions_change_comes_back(randn):
    base, change = randn(6, 4, 3, 3), randn(6, 4, 3, 3)
    layer, kept = low_rank_change(base + change, base, 1.0)
    assert (layer.rank, layer.down.shape[1:], layer.up.shape[2:]) == (6, (4, 3, 3), (1, 1))
    assert torch.allclose(layer.weight_delta(), change, atol=1e-5)
    assert kept == pytest.approx(1.0)


def test_rounding_of_half_precision_is_no_change(randn):
    base = randn(8, 8)
    assert low_rank_change(base.half(), base, 0.99) == (None, 1.0)
    assert low_rank_change(base, base, 0.99) == (None, 1.0)


@pytest.fixture
def base(randn):
    return {
        f"unet.{TO_K}.weight": randn(6, 8),
        f"unet.{TO_V}.weight": randn(6, 8),
        f"unet.{CONV}.weight": randn(6, 4, 3, 3),
        f"unet.{NORM}.weight": randn(4),
        f"unet.{NORM}.bias": randn(4),
    }


def test_esd_uce_and_concept_ablation_files_are_read_and_reported(tmp_path, randn, base):
    """diffusers' names without a prefix, with one, and nested as `delta.bin` is."""
    change = randn(6, 1) @ randn(1, 8)
    weights = {f"{TO_K}.weight": base[f"unet.{TO_K}.weight"] + change, f"{TO_V}.weight": base[f"unet.{TO_V}.weight"]}
    save_file(weights, tmp_path / "uce.safetensors")
    save_file({f"unet.{key}": value for key, value in weights.items()}, tmp_path / "esd.safetensors")
    torch.save({"unet": weights, "modifier_token": {}}, tmp_path / "delta.bin")
    for name in ("uce.safetensors", "esd.safetensors", "delta.bin"):
        adapter = load_adapter(tmp_path / name, base=base.get)
        assert list(adapter.layers) == [f"unet.{TO_K}"]
        layer = adapter.layers[f"unet.{TO_K}"]
        assert (layer.rank, layer.scale, adapter.card.source_format) == (1, 1.0, "full")
        assert torch.allclose(layer.weight_delta(), change, atol=1e-5)
        assert "1 layers differ" in adapter.notes[1]
        assert "ranks 1 to 1; 1 layers are unchanged" in adapter.notes[1]


def test_biases_and_norms_stop_unless_partial_is_allowed_and_are_listed(tmp_path, randn, base):
    changed = {key.removeprefix("unet."): value + 0.1 * randn(*value.shape) for key, value in base.items()}
    save_file({**changed, "down_blocks.7.resnets.0.conv1.weight": randn(2, 2)}, tmp_path / "esd-u.safetensors")
    with pytest.raises(AdapterError, match=r"2 biases and norms.*1 weights have no counterpart.*allow partial matches"):
        load_adapter(tmp_path / "esd-u.safetensors", base=base.get)
    adapter = load_adapter(tmp_path / "esd-u.safetensors", base=base.get, partial=True)
    assert len(adapter.layers) == 3
    assert any(note.startswith("2 biases and norms that differ were left out") for note in adapter.notes)
    assert any(note.startswith("1 weights without a counterpart") for note in adapter.notes)


def test_weights_of_other_parts_are_left_out_and_noted(tmp_path, randn, base):
    weights = {f"{TO_K}.weight": randn(6, 8), "text_encoder.text_model.x.weight": randn(2, 2), "betas": randn(3)}
    save_file(weights, tmp_path / "all.safetensors")
    adapter = load_adapter(tmp_path / "all.safetensors", base=base.get)
    assert adapter.notes[2].startswith("2 weights of text encoder, VAE or schedule were left out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "connect that model to Load Erasure LoRA"),
        ({"base": True, "alpha": 2.0}, "full weights, which have no alpha"),
        ({"base": True, "energy": 0.0}, "the energy to keep is 0.0"),
        ({"base": lambda name: None}, "none of its weights differs"),
        ({"base": lambda name: torch.ones(5, 5)}, "made for another architecture"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, randn, base, options, words):
    save_file({f"{TO_K}.weight": randn(6, 8)}, tmp_path / "esd.safetensors")
    if options.get("base") is True:
        options = {**options, "base": base.get}
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path / "esd.safetensors", **options)
    assert words in str(caught.value)


def test_nan_in_full_weights_is_refused(tmp_path, base):
    save_file({f"{TO_K}.weight": torch.full((6, 8), float("nan"))}, tmp_path / "esd.safetensors")
    with pytest.raises(AdapterError, match="holds values that are not finite numbers"):
        load_adapter(tmp_path / "esd.safetensors", base=base.get)
