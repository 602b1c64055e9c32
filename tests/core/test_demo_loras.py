"""The erasure LoRAs that ship with the demo model: that they fit it, and that their cards say what they are."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from demo.captions import CLASSES, SYNONYMS
from demo.erasure import LORAS, PREFIX, RECIPES, narrowed, path_of, widened
from demo.licence import relicense
from demo.narrow import ADAPTED, LATENT, SIGMAS, base_hash
from demo.seed import LICENCE
from demo.shapes import WIDE_WIDTH
from demo.unet import UNet
from unguide_core.adapter import Adapter, initial_low_rank
from unguide_core.formats import load_adapter, save_adapter
from unguide_core.probe.calibration import Calibration

PROBED = float(SIGMAS[894])
"""The noise level of the third of 20 steps, at which gates probe by default."""
FILES = [(objective, concept) for objective in RECIPES for concept in CLASSES]


@pytest.fixture(scope="module")
def wide_shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        unet = UNet(WIDE_WIDTH)
    layers = {name: module for name, module in unet.named_modules() if name.endswith(ADAPTED)}
    return {PREFIX + name: tuple(layer.weight.shape) for name, layer in layers.items()}


@pytest.mark.parametrize(("objective", "concept"), FILES)
def test_a_shipped_lora_fits_every_text_layer_of_the_demo_model(objective, concept, wide_shapes):
    adapter = load_adapter(path_of(LORAS, objective, concept))
    assert {name: layer.weight_shape for name, layer in adapter.layers.items()} == wide_shapes
    assert adapter.card.base_hash == base_hash()


@pytest.mark.parametrize(("objective", "concept"), FILES)
def test_a_shipped_loras_card_says_what_it_erases_and_how_it_was_trained(objective, concept):
    card = load_adapter(path_of(LORAS, objective, concept)).card
    assert (card.concept, card.synonyms, card.objective) == (concept, SYNONYMS[concept], objective)
    assert card.target == f"a photo of the {concept}"
    assert card.licence == LICENCE
    assert card.reference.startswith("a photo of the ")
    assert (card.rank, card.alpha) == (RECIPES[objective].rank, RECIPES[objective].alpha)
    assert card.settings["iterations"] == RECIPES[objective].iterations


@pytest.mark.parametrize(("objective", "concept"), FILES)
def test_a_shipped_loras_calibration_is_its_own_and_covers_the_gates_look(objective, concept):
    adapter = load_adapter(path_of(LORAS, objective, concept))
    calibration = Calibration.from_card(adapter.card.calibration)
    assert (calibration.adapter, calibration.latent) == (adapter.signature, LATENT)
    assert calibration.at("influence", PROBED).baseline > 0.0


@pytest.mark.parametrize("concept", CLASSES)
def test_a_selective_lora_separates_its_concept_from_others_and_a_paper_one_does_not(concept):
    missed = {}
    for objective in RECIPES:
        card = load_adapter(path_of(LORAS, objective, concept)).card
        level = Calibration.from_card(card.calibration).at("influence", PROBED)
        missed[objective] = level.concept.share_below(level.threshold(0.01))
    assert missed["selective"] <= 0.01 < missed["paper"]


def test_widening_an_adapter_keeps_it_but_for_half_precision(generator):
    name = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    layer = initial_low_rank(768, 64, 1, 8.0, generator)
    torch.nn.init.normal_(layer.up, generator=generator)
    again = narrowed(Adapter(widened({name: layer})))[name]
    torch.testing.assert_close(again.weight_delta(), layer.weight_delta().detach(), rtol=2e-3, atol=1e-4)


def test_another_licence_is_rewritten_once_and_nothing_else(tmp_path):
    path = tmp_path / "cat.safetensors"
    shipped = load_adapter(path_of(LORAS, "selective", "cat"))
    extra = {**shipped.card.extra, "modelspec.license": "MIT"}
    save_adapter(replace(shipped, card=replace(shipped.card, licence="MIT", extra=extra)), path)
    assert [relicense(path), relicense(path)] == [True, False]
    again = load_adapter(path)
    assert again.signature == shipped.signature
    assert again.card.calibration == shipped.card.calibration
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["unguide.licence"], metadata["modelspec.license"]) == (LICENCE, LICENCE)
