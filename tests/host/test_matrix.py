"""The matrix of formats and architectures in docs/formats.md, cell by cell: each file is made, loaded and compared.

The reference is the network with the change added to its weights by hand, layer by layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import ROOT, pack_module
from tests.host.families import FAMILIES, Family
from tests.host.test_blending import relative
from tests.host.test_files import replaced
from tests.host.test_foreign import Inputs, adapted, factors

formats, names, adapters = (pack_module(f"unguide_core.{name}") for name in ("formats", "adapter.names", "adapter"))
match = pack_module("unguide_comfy.lora.match")

ARCHITECTURES = {"SD 1.x": "SD 1.x", "SD 2.x": "SD 2.x", "SDXL": "SDXL", "SD 3.x": "SD 3.x", "Flux": "Flux dev"}
FORMATS = ("official", "kohya", "spm", "sliders", "generic", "peft", "diffusers", "diffusers, old", "full")
ATTENTION = r"\.to_([a-z]+)(\.0)?$"
DOCUMENT = ROOT / "docs" / "formats.md"


def documented() -> dict[tuple[str, str], str]:
    """The table of the document."""
    text = DOCUMENT.read_text(encoding="utf-8").partition("## Formats and architectures")[2]
    rows = re.findall(r"^\| `(.+?)` \|(.+)\|$", text.partition("* *tested*")[0], re.MULTILINE)
    return {
        (format, architecture): cell.strip()
        for format, cells in rows
        for architecture, cell in zip(ARCHITECTURES, cells.split("|"), strict=True)
    }


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Iterator[str]:
    family = FAMILIES[ARCHITECTURES[request.param]]
    assert family.model is not None
    yield request.param
    family.__dict__.pop("model", None)


def layers_of(family: Family, linear: bool) -> dict[str, Any]:
    """Random low-rank layers with scale 1, by the family's names."""
    made = {layer: adapters.LowRank(down, up) for layer, (down, up) in factors(family).items()}
    return {layer: one for layer, one in made.items() if not linear or one.down.ndim == 2}


def file_of(format: str, family: Family, layers: dict[str, Any], folder: Path) -> Path:
    """A file as the format's own tool writes it: by hand where no library does."""
    if format in ("official", "kohya", "generic", "peft", "diffusers"):
        path = folder / f"lora{formats.FORMATS[format].suffix}"
        formats.save_adapter(adapters.Adapter(layers), path, format, layout=family.layout)
        return path
    path = folder / "lora.safetensors"
    stems = {names.underscored(layer): one for layer, one in layers.items()}
    tensors: dict[str, torch.Tensor] = {}
    if format in ("spm", "sliders"):
        for stem, one in stems.items():
            tensors |= {f"{stem}.lora_down.weight": one.down, f"{stem}.lora_up.weight": one.up}
            tensors[f"{stem}.alpha"] = torch.tensor(float(one.rank))
        if format == "sliders":
            torch.save(tensors, folder / "lora.pt")
            return folder / "lora.pt"
        save_file(tensors, path, {"prompts": "cat", "rank": "1", "alpha": "1.0"})
        return path
    for layer, one in layers.items():
        dotted = names.dotted(layer)
        if format == "full":
            change = one.weight_delta().reshape(family.weight(layer).shape)
            tensors[dotted.split(".", 1)[1] + ".weight"] = family.weight(layer) + change
        else:
            stem = re.sub(ATTENTION, r".processor.to_\1_lora", dotted)
            tensors |= {f"{stem}.down.weight": one.down, f"{stem}.up.weight": one.up}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_of_each_format_predicts_what_it_says_on_each_architecture(architecture, format, tmp_path):
    family = FAMILIES[ARCHITECTURES[architecture]]
    layers = layers_of(family, linear=format == "official")
    if format == "diffusers, old":
        layers = {layer: one for layer, one in layers.items() if re.search(ATTENTION, names.dotted(layer))}
    if architecture in ("SD 3.x", "Flux") and format == "official":
        with pytest.raises(formats.AdapterError, match="linear layers of a UNet only"):
            file_of(format, family, layers, tmp_path)
        assert documented()[format, architecture] == "refused"
        return
    path = file_of(format, family, layers, tmp_path)
    base = match.base_weights(family.model) if format == "full" else None
    adapter = formats.load_adapter(path, base=base, energy=1.0)
    assert adapter.card.source_format == format
    weights = {
        f"{names.dotted(layer).split('.', 1)[1]}.weight": family.weight(layer)
        + (layers[layer].weight_delta().reshape(family.weight(layer).shape) if layer in layers else 0.0)
        for layer in family.layers
    }
    expected = replaced(family, weights)
    assert relative(adapted(family, adapter), expected) < 1e-5
    assert relative(Inputs(family).ours(), expected) > 1e-3
    assert documented()[format, architecture] == "tested"


def test_the_documents_table_has_the_formats_and_architectures_that_are_tested():
    assert set(documented()) == {(format, architecture) for format in FORMATS for architecture in ARCHITECTURES}
