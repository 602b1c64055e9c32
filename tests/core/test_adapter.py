from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch.nn import functional

from unguide_core.adapter import Adapter, Card, LowRank, initial_low_rank


def randn(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def convolution(generator, *kernel, rank=2):
    return LowRank(randn(generator, rank, 3, *kernel), randn(generator, 5, rank, *[1] * len(kernel)), 0.5)


FULL_CARD = Card(
    concept="cat",
    synonyms=("kitty", "feline"),
    target="a photo of the cat",
    reference="a photo of the forest",
    neutral="a photo",
    objective="selective",
    base_model="demo",
    base_hash="0" * 64,
    rank=1,
    alpha=8.0,
    source_format="official",
    settings={"iterations": 200, "lr": 3e-5, "targets": ["attn2.to_k", "attn2.to_v"]},
    calibration={"version": 3, "repeats": 8, "latent": [4, 8, 8], "cfg": 7.5},
    author="A. N. Author, Łódź",
    licence="CC0-1.0",
    extra={"ss_network_dim": "1", "unguide.from_the_future": "kept", "prompts": "cat"},
)


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 77, 7)])
def test_a_linear_delta_is_what_merging_adds(generator, shape):
    layer = LowRank(randn(generator, 2, 7), randn(generator, 5, 2), 8.0)
    x, weight = randn(generator, *shape), randn(generator, 5, 7)
    merged = functional.linear(x, weight + layer.weight_delta())
    torch.testing.assert_close(functional.linear(x, weight) + layer.delta(x), merged)


@pytest.mark.parametrize(
    ("kernel", "geometry"),
    [
        ((3, 3), {"padding": 1}),
        ((3, 3), {"stride": 2, "padding": (1, 1)}),
        ((3, 3), {"padding": "same", "dilation": 2}),
        ((1, 1), {}),
        ((3,), {"padding": 1}),
        ((1, 3, 3), {"padding": (0, 1, 1)}),
    ],
)
def test_a_convolutions_delta_is_what_merging_adds(generator, kernel, geometry):
    layer = convolution(generator, *kernel)
    convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[len(kernel)]
    x, weight = randn(generator, 2, 3, *[8] * len(kernel)), randn(generator, 5, 3, *kernel)
    merged = convolve(x, weight + layer.weight_delta(), **geometry)
    torch.testing.assert_close(convolve(x, weight, **geometry) + layer.delta(x, **geometry), merged)


def test_rank_and_weight_shape_follow_from_the_tensors(generator):
    layer = convolution(generator, 3, 3, rank=4)
    assert (layer.rank, layer.weight_shape) == (4, (5, 3, 3, 3))


@pytest.mark.parametrize(("shape", "other"), [((5, 3, 1, 1), (5, 3)), ((5, 3, 3, 3), (5, 27)), ((5, 3), (5, 3))])
def test_reshaped_to_the_models_weight_changes_it_alike(generator, shape, other):
    layer = (
        convolution(generator, *shape[2:])
        if len(shape) > 2
        else LowRank(randn(generator, 2, 3), randn(generator, 5, 2))
    )
    there = layer.reshaped(other)
    assert there.weight_shape == other
    assert torch.equal(there.weight_delta().reshape(shape), layer.weight_delta())
    assert torch.equal(there.reshaped(shape).weight_delta(), layer.weight_delta())


def test_weights_of_another_architecture_are_refused_with_both_shapes(generator):
    layer = LowRank(randn(generator, 1, 768), randn(generator, 320, 1))
    for shape in ((320, 1024), (640, 768), (320, 768, 3, 3)):
        with pytest.raises(ValueError, match=r"shape \[320, 768\], and the model's weight has shape"):
            layer.reshaped(shape)


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        ((1, 4), (5, 2), r"rank mismatch: down has shape \[1, 4\], so rank 1, and up \[5, 2\], so rank 2"),
        ((1, 4), (5, 1, 1, 1), r"expected \[rank, in\] and \[out, rank\]"),
        ((1, 4, 3, 3), (5, 1, 3, 3), r"expected \[rank, in\] and \[out, rank\]"),
        ((4,), (5,), r"expected \[rank, in\] and \[out, rank\]"),
        ((1, 4, 1, 1, 1, 1), (5, 1, 1, 1, 1, 1), r"expected \[rank, in\] and \[out, rank\]"),
        ((0, 4), (5, 0), "expected no empty dimension"),
        ((1, 0), (5, 1), "expected no empty dimension"),
    ],
)
def test_tensors_that_are_no_low_rank_pair_are_refused(down, up, message):
    with pytest.raises(ValueError, match=message):
        LowRank(torch.ones(down), torch.ones(up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("wild", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_in_every_precision(dtype, wild):
    layer = LowRank(torch.ones(1, 4), torch.tensor([[1.0], [wild]]).to(dtype))
    with pytest.raises(ValueError, match="up holds NaN or infinite values"):
        layer.require_finite()
    with pytest.raises(ValueError, match="scale is"):
        LowRank(torch.ones(1, 4), torch.ones(5, 1), wild)


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match=r"down has dtype torch\.int8; expected a floating-point one"):
        LowRank(torch.ones(1, 4, dtype=torch.int8), torch.ones(5, 1))


def test_to_moves_and_casts(generator):
    half = LowRank(randn(generator, 1, 4), randn(generator, 5, 1), 8.0).to("cpu", torch.float16)
    assert half.down.dtype == half.up.dtype == torch.float16
    assert half.scale == 8.0


def test_a_fresh_layer_changes_nothing_and_learns(generator):
    layer = initial_low_rank(7, 5, 2, 8.0, generator)
    assert (layer.down.shape, layer.up.shape, layer.scale) == ((2, 7), (5, 2), 8.0)
    x = torch.ones(3, 7)
    assert layer.delta(x).abs().max() == 0.0
    optimiser = torch.optim.Adam([layer.down, layer.up], lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        (layer.delta(x) - 1.0).square().mean().backward()
        optimiser.step()
    assert layer.delta(x).abs().max() > 0.0


def test_a_fresh_layer_has_the_spread_of_the_official_one(generator):
    assert initial_low_rank(10_000, 5, 4, 8.0, generator).down.std().item() == pytest.approx(0.5, rel=0.02)


def test_adapters_and_layers_are_frozen(generator):
    layer = LowRank(randn(generator, 1, 4), randn(generator, 5, 1))
    with pytest.raises(FrozenInstanceError):
        layer.scale = 2.0
    with pytest.raises(FrozenInstanceError):
        Adapter({"a": layer}).card = Card()


def test_an_adapter_without_layers_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        Adapter({})


def test_the_fingerprint_depends_on_what_the_adapter_does_and_on_nothing_else(generator):
    first, second = (LowRank(torch.ones(1, 4), torch.full((5, 1), value), 8.0) for value in (1.0, 2.0))
    adapter = Adapter({"a": first, "b": second}, FULL_CARD)
    same = Adapter({"b": second.to(dtype=torch.float16), "a": first}, Card(), ("a note",))
    assert adapter.fingerprint == same.fingerprint
    others = [
        {"a": second, "b": first},
        {"a": first, "c": second},
        {"a": first},
        {"a": first, "b": replace(second, scale=4.0)},
        {"a": first, "b": second.reshaped((5, 4, 1, 1))},
    ]
    assert len({adapter.fingerprint, *(Adapter(layers).fingerprint for layers in others)}) == 6


def test_the_signature_does_not_depend_on_the_names_of_a_format(generator):
    first, second = (LowRank(torch.ones(1, 4), torch.full((5, 1), value), 8.0) for value in (1.0, 2.0))
    adapter, renamed = Adapter({"a": first, "b": second}), Adapter({"x": second, "y": first})
    assert adapter.signature == renamed.signature
    assert adapter.signature != Adapter({"a": first, "b": replace(second, scale=4.0)}).signature


def test_a_card_survives_metadata_unknown_keys_included():
    metadata = FULL_CARD.to_metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    assert Card.from_metadata(metadata) == FULL_CARD
    assert Card.from_metadata(Card().to_metadata()) == Card()


def test_a_cards_keys_are_versioned_and_readable():
    metadata = FULL_CARD.to_metadata()
    assert metadata["unguide.version"] == "1"
    assert metadata["unguide.concept"] == "cat"
    assert metadata["unguide.synonyms"] == '["kitty", "feline"]'
    assert metadata["ss_network_dim"] == "1"
    assert Card().to_metadata() == {"unguide.version": "1"}


def test_a_newer_cards_version_survives():
    metadata = {**FULL_CARD.to_metadata(), "unguide.version": "2", "unguide.new": "x"}
    assert Card.from_metadata(metadata).to_metadata() == metadata


def test_the_concepts_prompt_is_the_target_or_else_the_concept():
    assert FULL_CARD.concept_prompt == "a photo of the cat"
    assert Card(concept="cat").concept_prompt == "cat"
    assert Card().concept_prompt == ""


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("synonyms", "[", r"key 'unguide\.synonyms' is '\['; expected JSON"),
        ("synonyms", '"kitty"', "expected a tuple of texts"),
        ("synonyms", "[1]", "expected a tuple of texts"),
        ("rank", "0", "expected a whole number from 1 on"),
        ("rank", "1.5", "expected a whole number from 1 on"),
        ("alpha", "NaN", "alpha is nan; expected a finite number"),
        ("alpha", '"8"', "alpha is '8'; expected a finite number"),
        ("version", '"new"', "expected a whole number"),
        ("settings", "[]", "expected a JSON object"),
        ("settings", '{"lr": NaN}', "expected a JSON object of finite numbers"),
        ("calibration", "3", "expected a JSON object"),
    ],
)
def test_a_card_that_breaks_its_own_rules_is_refused(key, text, message):
    with pytest.raises(ValueError, match=message):
        Card.from_metadata({f"unguide.{key}": text})


def test_a_card_refuses_what_is_not_text():
    with pytest.raises(ValueError, match="card's concept is 3; expected text"):
        Card(concept=3)
