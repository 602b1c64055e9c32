"""unguide_train beside the graph's trainer: the same model, the same prompts, the same adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from tests.conftest import pack_module
from tests.train.conftest import QUICK, SHAPE, in_the_graph, put_on, quick_settings
from unguide_core.adapter import Adapter
from unguide_core.formats import load_adapter, save_adapter
from unguide_core.training.recipe import PRESETS
from unguide_train.config import Config, from_values
from unguide_train.job import Summary, train_concept
from unguide_train.model import DiffusersPredictor, load_base

kohya_names = pack_module("unguide_comfy.train.predictor")._kohya_names
# the two programs' float32 arithmetic differs in its order; Adam's first steps amplify it where a gradient is near 0
LIMITS = {
    "eps": 1e-4,
    "loss, relative": 1e-3,
    "change of weights, relative": 1e-2,
    "change of a prediction, relative": 1e-2,
}


@pytest.fixture(scope="module")
def base(shipped, tokenizer):
    return load_base(shipped, tokenizer)


def host_eps(wide: Any, z: torch.Tensor, times: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The host's prediction of the noise."""
    model = wide.model.model
    sigma = model.model_sampling.sigmas[times].float()
    x = z * (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()
    context = torch.cat([wide.encode(prompt)[0][0] for prompt in prompts])
    with torch.inference_mode():
        denoised = model.apply_model(x, sigma, c_crossattn=context)
    return (x - denoised.clone()) / sigma.view(-1, 1, 1, 1)


def test_text_states_and_predictions_are_the_hosts(wide, base):
    z = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0))
    times, prompts = torch.tensor([900, 300]), ["a photo of the cat", ""]
    encoded = base.encode(prompts)
    for prompt in prompts:
        host = wide.encode(prompt)[0][0][0].float()
        assert float((encoded[prompt].states - host).abs().max()) < LIMITS["eps"]
    found = DiffusersPredictor(base.unet, encoded)(z, times, prompts).detach()
    eps = host_eps(wide, z, times, prompts)
    assert float((found - eps).abs().max()) < LIMITS["eps"]


@dataclass(frozen=True)
class Both:
    """One configuration, trained by both programs.

    Args:
        summary: of unguide_train.
        here: its adapter, from the file it wrote.
        there: what the graph trained.
    """

    summary: Summary
    here: Adapter
    there: Any


@pytest.fixture(scope="module", params=["selective", "paper"])
def both(request, wide, shipped, tokenizer, tmp_path_factory) -> Both:
    recipe = QUICK if request.param == "selective" else {"schedule_steps": 10, "iterations": 3}
    folder = tmp_path_factory.mktemp(request.param)
    values = quick_settings(shipped, tokenizer, folder)
    config = from_values({**values, "preset": request.param, "recipe": {**recipe, "seed": 7}})
    with torch.inference_mode(False), torch.enable_grad():
        summary = train_concept(config, config.concepts[0], quiet=True)
        return Both(summary, load_adapter(summary.path), in_the_graph(wide.model, wide.encode, config))


def test_both_trainers_give_the_same_adapter_from_the_same_seed(wide, both):
    here, there = both.here, both.there
    assert both.summary.evaluations == there.adapter.card.settings["evaluations"]
    assert both.summary.loss == pytest.approx(there.losses[-1], rel=LIMITS["loss, relative"])
    names = kohya_names(wide.model.model)
    assert {names[path] for path in there.adapter.layers} == set(here.layers)
    largest = 0.0
    for path, layer in there.adapter.layers.items():
        delta, other = layer.weight_delta(), here.layers[names[path]].weight_delta()
        largest = max(largest, float((delta - other).norm() / delta.norm()))
    print(f"largest relative difference of a layer's change: {largest:.2e}")
    assert largest < LIMITS["change of weights, relative"]
    assert here.card.base_hash == there.adapter.card.base_hash
    assert dict(here.card.settings) == dict(there.adapter.card.settings)
    assert (here.card.target, here.card.reference) == (there.adapter.card.target, there.adapter.card.reference)


def test_each_trainers_file_does_the_same_in_the_other_program(wide, both, tmp_path, shipped, tokenizer):
    """What an adapter changes of one prediction: by diffusers and by the host, of each trainer's file."""
    save_adapter(load_and_reload(both.there.adapter, tmp_path / "graph.safetensors"), tmp_path / "again.safetensors")
    z = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(0))
    for path in (tmp_path / "again.safetensors", Path(both.summary.path)):
        one, other = moved_in_diffusers(path, z, shipped, tokenizer), moved_in_the_host(path, z, wide)
        assert float(one.norm()) > 0
        assert float((one - other).norm()) < LIMITS["change of a prediction, relative"] * float(one.norm())


TIMES, PROMPT = torch.tensor([700]), "a photo of the cat"


def moved_in_diffusers(path: Path, z: torch.Tensor, shipped: Path, tokenizer: Path) -> torch.Tensor:
    loaded = load_base(shipped, tokenizer)
    put_on(loaded.unet, load_adapter(path))
    predict = DiffusersPredictor(loaded.unet, loaded.encode([PROMPT]))
    with torch.no_grad():
        before = predict(z, TIMES, [PROMPT])
        with predict.adapted():
            return predict(z, TIMES, [PROMPT]) - before


def moved_in_the_host(path: Path, z: torch.Tensor, wide: Any) -> torch.Tensor:
    model = wide.model.model
    read = pack_module("unguide_core.formats").load_adapter(path)
    layers = pack_module("unguide_comfy.lora.match").match(read, model, path.name).layers
    assert len(layers) == len(read.layers)
    modules = {place: model.get_submodule(place) for place in layers}
    before = host_eps(wide, z, TIMES, [PROMPT])
    with pack_module("unguide_comfy.lora.inject").adapted_rows(modules, [(slice(None), layers)], len(z)):
        return host_eps(wide, z, TIMES, [PROMPT]) - before


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
