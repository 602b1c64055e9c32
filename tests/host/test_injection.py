"""Low-rank layers on single modules: what is added to the output is what the merged weight would give."""

from __future__ import annotations

import threading
import time

import comfy.ops
import pytest
import torch

from tests.conftest import pack_module

LowRank, Adapter = (getattr(pack_module("unguide_core.adapter"), name) for name in ("LowRank", "Adapter"))
AdapterError = pack_module("unguide_core.formats").AdapterError
adapted_rows = pack_module("unguide_comfy.lora.inject").adapted_rows
match = pack_module("unguide_comfy.lora.match")
Evaluations = pack_module("unguide_comfy.blend.state").Evaluations

ops = comfy.ops.disable_weight_init
CONVOLUTIONS = {
    "plain": (ops.Conv2d, {"padding": 1}),
    "strided and dilated": (ops.Conv2d, {"padding": 2, "stride": 2, "dilation": 2}),
    "grouped": (ops.Conv2d, {"padding": 1, "groups": 2}),
    "depthwise": (ops.Conv2d, {"padding": 1, "groups": 4}),
    "circular": (ops.Conv2d, {"padding": 1, "padding_mode": "circular"}),
    "reflected and grouped": (ops.Conv2d, {"padding": 1, "padding_mode": "reflect", "groups": 2}),
    "of one dimension, replicated": (ops.Conv1d, {"padding": 1, "padding_mode": "replicate"}),
    "of three dimensions, grouped": (ops.Conv3d, {"padding": 1, "groups": 2}),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_of_any_kind_adds_what_its_merged_weight_adds(kind):
    made, options = CONVOLUTIONS[kind]
    generator = torch.Generator().manual_seed(1)
    module = made(4, 8, 3, **options)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    _, inputs, *kernel = module.weight.shape
    down, up = torch.randn(2, inputs, *kernel, generator=generator), torch.randn(8, 2, generator=generator)
    layer = LowRank(down, up.reshape(8, 2, *[1] * len(kernel)), 0.5)
    x = torch.randn(2, 4, *[6] * len(kernel), generator=generator)
    before = module(x)
    with adapted_rows({"conv": module}, [(slice(1, 2), {"conv": layer})], 2):
        found = module(x)
    module.weight.data += layer.weight_delta()
    assert torch.equal(found[0], before[0])
    assert not torch.allclose(before[1], module(x)[1], atol=1e-2)
    assert torch.allclose(found[1], module(x)[1], atol=1e-4)


def test_a_transposed_convolution_is_refused():
    layer = LowRank(torch.ones(1, 4), torch.ones(4, 1))
    module = torch.nn.ConvTranspose2d(4, 4, 1)
    with pytest.raises(AdapterError, match=r"'x' changes 'conv', a transposed convolution"):
        match._layer(Adapter({"conv": layer}), [(match.Place("conv"), "conv")], module, "conv", "x")


class Slow(int):
    """A number whose sums take so long that other threads run in their midst."""

    def __sub__(self, other: int) -> Slow:
        return Slow(int(self) - other)

    def __radd__(self, other: int) -> int:
        time.sleep(1e-3)
        return other + int(self)


def test_counts_of_several_gpus_threads_are_complete():
    evaluations = Evaluations()

    def work() -> None:
        for _ in range(10):
            evaluations.ask(Slow(2))
            evaluations.count(Slow(3), adapted=Slow(1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert evaluations.plain == 80
    assert (evaluations.spent["base"], evaluations.spent["adapted"]) == (80, 40)
