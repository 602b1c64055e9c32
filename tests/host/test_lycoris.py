"""Adapters that are not two matrices per layer predict what the host's own LoRA loader merges into the weights.

tests/core/test_formats_composed.py compares them with LyCORIS' and PEFT's own forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import comfy.sd
import comfy.utils
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import pack_module
from tests.host.families import FAMILIES, Family
from tests.host.test_blending import relative
from tests.host.test_foreign import LIMIT, Inputs, adapted

formats, adapters = (pack_module(f"unguide_core.{name}") for name in ("formats", "adapter"))
match = pack_module("unguide_comfy.lora.match")

Parts = dict[str, torch.Tensor]
Random = Callable[..., torch.Tensor]


def lora(randn: Random, out: int, rest: tuple[int, ...]) -> Parts:
    return {
        "lora_down.weight": randn(2, *rest) / rest[0] ** 0.5,
        "lora_up.weight": randn(out, 2) if len(rest) == 1 else randn(out, 2, 1, 1),
        "alpha": torch.tensor(1.5),
    }


def flat_up(randn: Random, out: int, rest: tuple[int, ...]) -> Parts:
    """A convolution's `up` stored as a matrix."""
    return {**lora(randn, out, rest), "lora_up.weight": randn(out, 2)}


def third_factor(randn: Random, out: int, rest: tuple[int, ...]) -> Parts:
    """LoCon's, of convolutions only."""
    if len(rest) == 1:
        return lora(randn, out, rest)
    return {**lora(randn, out, (rest[0], 1, 1)), "lora_mid.weight": randn(2, 2, *rest[1:])}


def loha(randn: Random, out: int, rest: tuple[int, ...]) -> Parts:
    width = int(torch.tensor(rest).prod())
    named = {f"hada_w{i}_a": randn(out, 2) for i in (1, 2)} | {f"hada_w{i}_b": randn(2, width) for i in (1, 2)}
    return {**named, "hada_w1_b": named["hada_w1_b"] / width**0.5, "alpha": torch.tensor(1.5)}


def loha_core(randn: Random, out: int, rest: tuple[int, ...]) -> Parts:
    """With CP decomposition, of convolutions only."""
    if len(rest) == 1:
        return loha(randn, out, rest)
    parts = {f"hada_t{i}": randn(2, 2, *rest[1:]) for i in (1, 2)}
    for i in (1, 2):
        parts |= {f"hada_w{i}_a": randn(2, out), f"hada_w{i}_b": randn(2, rest[0]) / 8}
    return parts


def lokr(randn: Random, out: int, rest: tuple[int, ...]) -> Parts:
    return {"lokr_w1": randn(2, 4), "lokr_w2": randn(out // 2, rest[0] // 4, *rest[1:]) / rest[0] ** 0.5}


def lokr_factors(randn: Random, out: int, rest: tuple[int, ...]) -> Parts:
    width = int(torch.tensor(rest).prod()) // 4
    one = {"lokr_w1_a": randn(2, 1), "lokr_w1_b": randn(1, 4), "alpha": torch.tensor(0.5)}
    return one | {"lokr_w2_a": randn(out // 2, 1), "lokr_w2_b": randn(1, width) / width**0.5}


def glora(randn: Random, out: int, rest: tuple[int, ...]) -> Parts:
    width = int(torch.tensor(rest).prod())
    return {
        "a1.weight": randn(rest[0], 2) / 8,
        "a2.weight": randn(2, rest[0]) / 8,
        "b1.weight": randn(out, 2),
        "b2.weight": randn(2, width) / width**0.5,
        "alpha": torch.tensor(1.5),
    }


def oft(randn: Random, out: int, rest: tuple[int, ...]) -> Parts:
    return {"oft_blocks": randn(out // 4, 4, 4) / 4, "alpha": torch.tensor(0.0)}


def boft(randn: Random, out: int, rest: tuple[int, ...]) -> Parts:
    return {"oft_blocks": randn(2, out // 4, 4, 4) / 4, "alpha": torch.tensor(0.0)}


def dora(made: Callable[..., Parts], rows: bool) -> Callable[..., Parts]:
    def decomposed(randn: Random, out: int, rest: tuple[int, ...]) -> Parts:
        shape = (out, *[1] * len(rest)) if rows else (1, rest[0], *[1] * (len(rest) - 1))
        return {**made(randn, out, rest), "dora_scale": 1.0 + randn(*shape).abs()}

    return decomposed


KINDS = {
    "LoRA, up as a matrix": flat_up,
    "LoCon with a third factor": third_factor,
    "LoHa": loha,
    "LoHa with cores": loha_core,
    "LoKr": lokr,
    "LoKr in factors": lokr_factors,
    "GLoRA": glora,
    "OFT": oft,
    "BOFT": boft,
    "DoRA by rows": dora(lora, rows=True),
    "DoRA by columns": dora(lora, rows=False),
    "DoRA of LoHa": dora(loha, rows=False),
}


@pytest.fixture(scope="module", params=["SD 1.x", "SD 3.x", "Flux dev"])
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    known = FAMILIES[request.param]
    yield known
    known.__dict__.pop("model", None)


def file_of(kind: str, family: Family, folder: Path) -> Path:
    """A file of a kind, with random values, for the family's layers."""
    generator = torch.Generator().manual_seed(9)
    tensors: Parts = {}
    for layer in family.layers:
        out, *rest = family.weight(layer).shape
        parts = KINDS[kind](lambda *shape: torch.randn(*shape, generator=generator), out, tuple(rest))
        tensors |= {f"{layer}.{end}": value.contiguous() for end, value in parts.items()}
    save_file(tensors, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def merged(family: Family, path: Path, strength: float) -> torch.Tensor:
    """The prediction with the file merged by the host's own loader."""
    model, _ = comfy.sd.load_lora_for_models(family.model, None, comfy.utils.load_torch_file(str(path)), strength, 0.0)
    model.patch_model()
    try:
        return Inputs(family).ours()
    finally:
        model.unpatch_model()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_predicts_what_the_host_merges_at_any_strength(family, kind, tmp_path):
    path = file_of(kind, family, tmp_path)
    adapter = formats.load_adapter(path, base=match.base_weights(family.model))
    base = Inputs(family).ours()
    # the host squares the strength of OFT, and raises each stage of BOFT to it
    for strength in (1.0,) if kind in ("OFT", "BOFT") else (1.0, -0.6):
        expected = merged(family, path, strength)
        scaled = {
            name: adapters.LowRank(layer.down, layer.up, layer.scale * strength)
            for name, layer in adapter.layers.items()
        }
        assert relative(base, expected) > 1e-2
        assert relative(adapted(family, adapters.Adapter(scaled)), expected) < LIMIT
