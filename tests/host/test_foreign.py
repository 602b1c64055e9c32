"""Adapters of other programs: files that peft and diffusers wrote themselves, and how they read files that we write.

Each comparison is of one forward pass: the library's own model with its own adapter, against the host's model with the
same weights and the adapter as our loader reads it.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import diffusers
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import pack_module
from tests.host.families import FAMILIES, Family
from tests.host.test_blending import relative

formats, names, adapters = (pack_module(f"unguide_core.{name}") for name in ("formats", "adapter.names", "adapter"))
inject, match = (pack_module(f"unguide_comfy.lora.{name}") for name in ("inject", "match"))

LIMIT = 1e-5
COMPARED = [name for name, family in FAMILIES.items() if family.diffusers is not None]
UNETS = [name for name in COMPARED if not name.startswith(("SD 3", "Flux"))]
of_unets = pytest.mark.parametrize("family", UNETS, indirect=True, scope="module")
LOADERS = {
    "SD 3.x": diffusers.loaders.SD3LoraLoaderMixin,
    "Flux dev": diffusers.loaders.FluxLoraLoaderMixin,
    "SDXL": diffusers.loaders.StableDiffusionXLLoraLoaderMixin,
}


@pytest.fixture(scope="module", params=COMPARED)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    known = FAMILIES[request.param]
    with torch.inference_mode(False):
        assert known.theirs is not None
    yield known
    for made in ("model", "theirs"):
        known.__dict__.pop(made, None)


@pytest.fixture
def theirs(family: Family) -> Iterator[Any]:
    """A copy of diffusers' model, for an adapter of its own."""
    with torch.inference_mode(False):
        yield copy.deepcopy(family.theirs)


class Inputs:
    """One random input of the network, in the host's form and in diffusers'."""

    def __init__(self, family: Family):
        generator = torch.Generator().manual_seed(4)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.family = family
        self.x, self.text = randn(2, family.channels, 8, 8), randn(2, 7, family.text)
        self.pooled, self.times = randn(2, family.pooled), torch.tensor([64.0, 64.0, 0.0, 0.0, 64.0, 64.0])
        self.t = torch.tensor([0.3, 0.3]) if family.name == "Flux dev" else torch.tensor([301.0, 301.0])

    def ours(self) -> torch.Tensor:
        network = self.family.model.model.diffusion_model
        more = {"y": self.pooled} if self.family.pooled else {}
        if self.family.name == "SDXL":
            embedded = self.family.model.model.embedder(self.times).flatten()
            more["y"] = torch.cat((self.pooled, embedded.expand(2, -1)), 1)
        if self.family.name == "Flux dev":
            more["guidance"] = torch.tensor([3.5, 3.5])
        return network(self.x, self.t, context=self.text, **more)

    def of(self, model: Any) -> torch.Tensor:
        if self.family.name == "SD 3.x":
            return model(self.x, self.text, self.pooled, self.t).sample
        if self.family.name == "Flux dev":
            return self._flux(model)
        more = {}
        if self.family.name == "SDXL":
            more["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": self.times.expand(2, -1)}
        return model(self.x, self.t, self.text, **more).sample

    def _flux(self, model: Any) -> torch.Tensor:
        packed = self.x.reshape(2, 16, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 64)
        rows, columns = (grid.flatten() for grid in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
        ids = torch.stack((torch.zeros(16), rows, columns), dim=1).float()
        out = model(
            packed, self.text, self.pooled, self.t, ids, torch.zeros(7, 3), guidance=torch.tensor([3.5, 3.5])
        ).sample
        return out.reshape(2, 4, 4, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 16, 8, 8)


def adapted(family: Family, adapter: Any) -> torch.Tensor:
    """The host's network with the adapter, unmerged."""
    layers = match.match(adapter, family.model.model, "tested").layers
    modules = {path: family.model.model.get_submodule(path) for path in layers}
    with inject.adapted_rows(modules, [(slice(None), layers)], 2):
        return Inputs(family).ours()


def agree(family: Family, path: Path, model: Any, **options: Any) -> Any:
    """Our loader's prediction is the library's own, and not the base model's; returns the adapter."""
    adapter = formats.load_adapter(path, **options)
    expected, base = Inputs(family).of(model), Inputs(family).ours()
    deviation = relative(adapted(family, adapter), expected.detach())
    print(f"\n{family.name}, {adapter.card.source_format}: {deviation:.1e}", end="")
    assert deviation < LIMIT
    assert relative(base, expected) > 1e-2
    return adapter


def paths(family: Family) -> list[str]:
    """diffusers' module paths of the family's layers."""
    return [names.dotted(layer).split(".", 1)[1] for layer in family.layers]


def config(family: Family, **changed: Any) -> Any:
    layers = paths(family)
    settings = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": layers,
        "rank_pattern": {layers[0]: 2},
        "alpha_pattern": {layers[1]: 7},
        **changed,
    }
    return peft.LoraConfig(**settings)


def trained(model: Any) -> Any:
    """The adapter in the model with random values, as after training."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_B." in name:
                value.copy_(0.5 * torch.randn(value.shape, generator=generator))
    return model


def test_the_host_and_diffusers_have_the_same_base_model(family):
    assert relative(Inputs(family).ours(), Inputs(family).of(family.theirs)) < LIMIT


@pytest.mark.parametrize("stabilised", [False, True])
def test_a_folder_that_peft_saved(family, theirs, tmp_path, stabilised):
    model = trained(peft.get_peft_model(theirs, config(family, use_rslora=stabilised)))
    model.save_pretrained(tmp_path / "adapter")
    adapter = agree(family, tmp_path / "adapter", model)
    assert adapter.card.source_format == "peft"
    assert "adapter_config.json's lora_alpha" in adapter.notes[0]
    # as ComfyUI's list of files has it
    agree(family, tmp_path / "adapter" / "adapter_model.safetensors", model)


def test_pefts_file_alone_has_scale_one_and_says_so(family, theirs, tmp_path):
    model = trained(peft.get_peft_model(theirs, config(family, lora_alpha=3, rank_pattern={}, alpha_pattern={})))
    model.save_pretrained(tmp_path / "adapter")
    shutil.copy(tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "renamed.safetensors")
    adapter = agree(family, tmp_path / "renamed.safetensors", model)
    assert "scale 1, that is alpha = rank" in adapter.notes[0]
    agree(family, tmp_path / "renamed.safetensors", model, alpha=3.0)


def saved_by_pipeline(family: Family, model: Any, folder: Path) -> Path:
    """diffusers' own `save_lora_weights`, with its own metadata."""
    loader = LOADERS.get(family.name, diffusers.loaders.StableDiffusionLoraLoaderMixin)
    part = "transformer" if family.name in ("SD 3.x", "Flux dev") else "unet"
    metadata = diffusers.training_utils._collate_lora_metadata({part: model})
    loader.save_lora_weights(folder, **{f"{part}_lora_layers": peft.get_peft_model_state_dict(model)}, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


def test_a_file_that_diffusers_saved_with_its_metadata(family, theirs, tmp_path):
    theirs.add_adapter(config(family))
    adapter = agree(family, saved_by_pipeline(family, trained(theirs), tmp_path), theirs)
    assert adapter.card.source_format == "diffusers"
    assert "lora_alpha in diffusers' metadata" in adapter.notes[0]
    assert "lora_adapter_metadata" not in adapter.card.extra


def test_a_file_that_a_diffusers_model_saved_by_itself(family, theirs, tmp_path):
    theirs.add_adapter(config(family))
    trained(theirs).save_lora_adapter(tmp_path)
    agree(family, tmp_path / "pytorch_lora_weights.safetensors", theirs)


def test_a_file_of_diffusers_without_metadata_has_scale_one(family, theirs, tmp_path):
    theirs.add_adapter(config(family, lora_alpha=3, rank_pattern={}, alpha_pattern={}))
    path = saved_by_pipeline(family, trained(theirs), tmp_path)
    save_file(load_file(path), tmp_path / "bare.safetensors")
    assert "scale 1" in agree(family, tmp_path / "bare.safetensors", theirs).notes[0]


# names that REFERENCE tools write, read by diffusers itself


def factors(family: Family) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random factors by layer; ranks differ."""
    generator = torch.Generator().manual_seed(9)
    made = {}
    for number, layer in enumerate(family.layers):
        out, *rest = family.weight(layer).shape
        rank = 1 + number % 3
        down = torch.randn(rank, *rest, generator=generator) / rest[0] ** 0.5
        made[layer] = down, 0.4 * torch.randn(out, rank, *[1] * (len(rest) - 1), generator=generator)
    return made


def load_into(family: Family, model: Any, path: Path) -> Any:
    """diffusers' own LoRA loading, as its pipelines do it."""
    if family.name in ("SD 3.x", "Flux dev"):
        loader = LOADERS[family.name]
        found = (
            loader.lora_state_dict(path, return_lora_metadata=True, return_alphas=True)
            if (family.name == "Flux dev")
            else loader.lora_state_dict(path, return_lora_metadata=True)
        )
        state, alphas, metadata = found if len(found) == 3 else (found[0], None, found[1])
        more = {} if family.name == "SD 3.x" else {"network_alphas": alphas}
        loader.load_lora_into_transformer(state, transformer=model, metadata=metadata, **more)
        return model
    loader = LOADERS.get(family.name, diffusers.loaders.StableDiffusionLoraLoaderMixin)
    state, alphas, metadata = loader.lora_state_dict(path, unet_config=model.config, return_lora_metadata=True)
    loader.load_lora_into_unet(state, network_alphas=alphas, unet=model, metadata=metadata)
    return model


@of_unets
@pytest.mark.parametrize("maker", ["leco", "spm", "sliders"])
def test_kohya_names_as_leco_spm_and_sliders_write_them(family, theirs, tmp_path, maker):
    tensors = {}
    for layer, (down, up) in factors(family).items():
        tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        tensors[f"{layer}.alpha"] = torch.tensor(1.5)
    metadata = {"leco": {"prompts": "van gogh"}, "spm": {"prompts": "van gogh", "rank": "1", "alpha": "1.5"}}
    save_file(tensors, tmp_path / "lora.safetensors", metadata.get(maker))
    path = tmp_path / "lora.safetensors"
    model = load_into(family, theirs, path)
    if maker == "sliders":
        path = tmp_path / "lora.pt"
        torch.save(tensors, path)
    adapter = agree(family, path, model)
    assert adapter.card.source_format == {"leco": "kohya"}.get(maker, maker)
    assert adapter.card.concept == ("" if maker == "sliders" else "van gogh")
    assert "the file's alpha" in adapter.notes[0]


@of_unets
def test_diffusers_old_attention_names(family, theirs, tmp_path):
    tensors = {}
    for layer, (down, up) in factors(family).items():
        path = names.dotted(layer)
        if ".attn" in path:
            block, _, module = path.rpartition(".to_")
            stem = f"{block}.processor.to_{module.removesuffix('.0')}_lora"
            tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    save_file(tensors, tmp_path / "old.safetensors")
    adapter = agree(family, tmp_path / "old.safetensors", load_into(family, theirs, tmp_path / "old.safetensors"))
    assert adapter.card.source_format == "diffusers, old"


# what we write


@pytest.fixture
def ours(family: Family) -> Any:
    """An adapter in the naming of the family's layers, with ranks and scales that differ."""
    scales = (0.5, 1.0, 4.0, 0.3, 8.0, -1.0, 2.0)
    layers = {
        layer: adapters.LowRank(down, up, scale)
        for (layer, (down, up)), scale in zip(factors(family).items(), scales, strict=True)
    }
    return adapters.Adapter(layers, adapters.Card(concept="cat"))


def written(ours: Any, folder: Path, format: str, family: Family) -> Path:
    path = folder / f"ours{formats.FORMATS[format].suffix}"
    formats.save_adapter(ours, path, format, layout=family.layout)
    assert relative(adapted(family, formats.load_adapter(path)), adapted(family, ours)) < 1e-6
    return path


def test_diffusers_loads_what_we_save_and_predicts_the_same(family, theirs, ours, tmp_path):
    path = written(ours, tmp_path, "diffusers", family)
    agree(family, path, load_into(family, theirs, path))


@of_unets
def test_diffusers_loads_the_kohya_file_that_we_save_and_predicts_the_same(family, theirs, ours, tmp_path):
    """One alpha for all layers: of kohya files, diffusers 0.42 reads no other."""
    layers = {name: dataclasses.replace(layer, scale=1.5 / layer.rank) for name, layer in ours.layers.items()}
    path = written(dataclasses.replace(ours, layers=layers), tmp_path, "kohya", family)
    agree(family, path, load_into(family, theirs, path))


def test_peft_loads_what_we_save_and_predicts_the_same(family, theirs, ours, tmp_path):
    path = written(ours, tmp_path, "peft", family)
    agree(family, path, peft.PeftModel.from_pretrained(theirs, path))


@pytest.mark.parametrize("format", ["generic", "kohya"])
def test_the_hosts_loader_takes_what_we_save_and_predicts_the_same(family, ours, tmp_path, format):
    path = written(ours, tmp_path, format, family)
    merged, _ = comfy.sd.load_lora_for_models(family.model, None, comfy.utils.load_torch_file(str(path)), 1.0, 0.0)
    merged.patch_model()
    try:
        found = Inputs(family).ours()
    finally:
        merged.unpatch_model()
    assert relative(adapted(family, ours), found) < LIMIT
    assert relative(Inputs(family).ours(), found) > 1e-2
