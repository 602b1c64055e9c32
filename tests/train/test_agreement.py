"""unguide_train beside the graph's trainer: the same model, the same prompts, the same adapter."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from tests.conftest import pack_module
from tests.train.conftest import SHAPE, in_the_graph, put_on
from unguide_core.formats import load_adapter, save_adapter
from unguide_core.training.recipe import PRESETS
from unguide_train.config import Config, from_values
from unguide_train.job import train_concept
from unguide_train.model import DiffusersPredictor, load_base

kohya_names = pack_module("unguide_comfy.train.predictor")._kohya_names
# the two programs' float32 arithmetic differs in its order; Adam's first steps amplify it where a gradient is near 0
LIMITS = {"eps": 1e-4, "loss, relative": 1e-3, "change of weights, relative": 1e-2}


@pytest.fixture(scope="module")
def base(checkpoint, tokenizer):
    return load_base(checkpoint, tokenizer)


def test_text_states_and_predictions_are_the_hosts(demo, base):
    z = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0))
    times, prompts = torch.tensor([900, 300]), ["a photo of the cat", ""]
    encoded = base.encode(prompts)
    for prompt in prompts:
        host = demo.encode(prompt)[0][0][0].float()
        assert float((encoded[prompt].states - host).abs().max()) < LIMITS["eps"]
    found = DiffusersPredictor(base.unet, encoded)(z, times, prompts).detach()
    model = demo.model.model
    sigma = model.model_sampling.sigmas[times].float()
    x = z * (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()
    context = torch.cat([demo.encode(prompt)[0][0] for prompt in prompts])
    with torch.inference_mode():
        denoised = model.apply_model(x, sigma, c_crossattn=context)
    eps = (x - denoised.clone()) / sigma.view(-1, 1, 1, 1)
    assert float((found - eps).abs().max()) < LIMITS["eps"]


@pytest.mark.parametrize("preset", ["selective", "paper"])
def test_both_trainers_give_the_same_adapter_from_the_same_seed(demo, settings, preset, capsys):
    recipe = settings["recipe"] if preset == "selective" else {"schedule_steps": 10, "iterations": 3}
    config = from_values({**settings, "preset": preset, "recipe": {**recipe, "seed": 7}})
    summary = train_concept(config, config.concepts[0], quiet=True)
    here, there = load_adapter(summary.path), in_the_graph(demo.model, demo.encode, config)
    graph = {name: layer for name, layer in there.adapter.layers.items()}
    assert summary.evaluations == there.adapter.card.settings["evaluations"]
    assert summary.loss == pytest.approx(there.losses[-1], rel=LIMITS["loss, relative"])
    names = kohya_names(demo.model.model)
    assert {names[path] for path in graph} == set(here.layers)
    largest = 0.0
    for path, layer in graph.items():
        delta, other = layer.weight_delta(), here.layers[names[path]].weight_delta()
        largest = max(largest, float((delta - other).norm() / delta.norm()))
    print(f"{preset}: largest relative difference of a layer's change: {largest:.2e}")
    assert largest < LIMITS["change of weights, relative"]
    assert here.card.base_hash == there.adapter.card.base_hash
    ours, theirs = dict(here.card.settings), dict(there.adapter.card.settings)
    assert ours == theirs
    assert (here.card.target, here.card.reference) == (there.adapter.card.target, there.adapter.card.reference)


def test_each_trainers_file_does_the_same_in_the_other_program(demo, config, tmp_path: Path, checkpoint, tokenizer):
    graph = in_the_graph(demo.model, demo.encode, config).adapter
    save_adapter(load_and_reload(graph, tmp_path / "graph.safetensors"), tmp_path / "again.safetensors")
    ours = load_adapter(train_concept(config, config.concepts[0], quiet=True).path)
    z = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(0))
    times, prompt = torch.tensor([700]), "a photo of the cat"
    moved = {}
    for name, adapter in {"graph": load_adapter(tmp_path / "again.safetensors"), "ours": ours}.items():
        loaded = load_base(checkpoint, tokenizer)
        put_on(loaded.unet, adapter)
        predict = DiffusersPredictor(loaded.unet, loaded.encode([prompt]))
        with torch.no_grad():
            before = predict(z, times, [prompt])
            with predict.adapted():
                moved[name] = predict(z, times, [prompt]) - before
    assert float(moved["ours"].norm()) > 0
    torch.testing.assert_close(moved["graph"], moved["ours"], rtol=0.05, atol=1e-4)
    read = pack_module("unguide_core.formats").load_adapter(tmp_path / "cat.safetensors")
    match = pack_module("unguide_comfy.lora.match").match
    assert len(match(read, demo.model.model, "cat").layers) == len(ours.layers)


def load_and_reload(adapter, path: Path):
    """An adapter of the pack's own modules as one of unguide_core's, by way of a file."""
    pack_module("unguide_core.formats").save_adapter(adapter, path)
    return load_adapter(path)


def test_both_programs_offer_the_same_presets_with_the_same_defaults():
    """What a preset is, is `unguide_core`'s; each program names those that it offers, and which one is the default."""
    node = pack_module("nodes.train").TrainErasureLora.GET_SCHEMA()
    offered = next(part for part in node.inputs if part.id == "preset")
    field = Config.model_fields["preset"]
    assert set(get_args(field.annotation)) == set(offered.options) == set(PRESETS)
    assert field.default == offered.default
