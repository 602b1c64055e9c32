"""A fixed weight in every host workflow that people build, against the same workflow without UnGuide.

Three claims for each: weight 1 is the base model bit for bit; weight 0 is the adapter merged by the host's loader; and
one Euler step is affine in the blend, so that weight -1 gives 2 * merged - base (there the rows run in one batch).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import comfy.cldm.cldm
import comfy.conds
import comfy.controlnet
import comfy.model_management
import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras.nodes_model_advanced import RescaleCFG
from comfy_extras.nodes_pag import PerturbedAttentionGuidance

import nodes as host
from tests.conftest import pack_module
from tests.host.conftest import CAT, Observer, fixed, guided, ksampler, latent

THIRD = "in the forest"
Sample = Callable[..., torch.Tensor]


def filled() -> dict[str, Any]:
    """A latent with something in it, for image to image."""
    return {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))}


def half_mask(size: int = 64) -> torch.Tensor:
    mask = torch.zeros(1, size, size)
    mask[:, : size // 2] = 1.0
    return mask


@pytest.fixture(scope="session")
def control_net(golden_model, tmp_path_factory: pytest.TempPathFactory):
    """A ControlNet for the golden network with random weights, from a file and by the host's loader."""
    config = {
        k: v
        for k, v in golden_model.model.model_config.unet_config.items()
        if k not in ("out_channels", "disable_self_attentions")
    }
    network = comfy.cldm.cldm.ControlNet(
        **{**config, "hint_channels": 3, "dtype": torch.float32}, operations=comfy.ops.disable_weight_init
    )
    generator = torch.Generator().manual_seed(3)
    state = {
        f"control_model.{name}": torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5
        for name, value in network.state_dict().items()
    }
    path = tmp_path_factory.mktemp("control") / "control.safetensors"
    comfy.utils.save_torch_file(state, str(path))
    return comfy.controlnet.load_controlnet(str(path))


def plain(model, encode, *_):
    return ksampler(model, encode(CAT), encode(""))


def batch_of_three(model, encode, *_):
    return ksampler(model, encode(CAT), encode(""), batch=3)


def prompts_of_unequal_length(model, encode, *_):
    return ksampler(model, encode(CAT, 154), encode(""))


def combined_conditioning(model, encode, *_):
    return ksampler(model, encode(CAT) + encode(THIRD), encode(""))


def area_conditioning(model, encode, *_):
    (area,) = host.ConditioningSetArea().append(encode(CAT), 32, 64, 0, 32, 1.0)
    return ksampler(model, encode(THIRD) + area, encode(""))


def masked_conditioning(model, encode, *_):
    (masked,) = host.ConditioningSetMask().append(encode(CAT), half_mask(), "default", 0.8)
    return ksampler(model, encode(THIRD) + masked, encode(""))


def image_to_image(model, encode, *_):
    return ksampler(model, encode(CAT), encode(""), filled(), denoise=0.6)


def inpainting(model, encode, *_):
    return ksampler(model, encode(CAT), encode(""), {**filled(), "noise_mask": half_mask()})


def controlled(model, encode, control_net):
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(4))
    positive, negative = host.ControlNetApplyAdvanced().apply_controlnet(
        encode(CAT), encode(""), control_net, hint, 0.7, 0.0, 1.0
    )
    return ksampler(model, positive, negative)


def perturbed_attention(model, encode, *_):
    return ksampler(PerturbedAttentionGuidance.execute(model, 2.0)[0], encode(CAT), encode(""))


def ksampler_advanced(model, encode, *_):
    """Two halves, the second taking over the first's noise."""
    node = host.KSamplerAdvanced()
    arguments = ("enable", 7, 3, 4.0, "euler", "normal", encode(CAT), encode(""))
    (first,) = node.sample(model, *arguments, latent(), 0, 1, "enable")
    (second,) = node.sample(model, "disable", *arguments[1:], first, 1, 3, "disable")
    return second["samples"]


def custom_parts(model, steps=3):
    sigmas = custom.BasicScheduler.execute(model, "normal", steps, 1.0)[0]
    return custom.KSamplerSelect.execute("euler")[0], sigmas


def sampler_custom(model, encode, *_):
    return custom.SamplerCustom.execute(model, True, 7, 4.0, encode(CAT), encode(""), *custom_parts(model), latent())[
        0
    ]["samples"]


def advanced_with(guider: Any, model: Any) -> torch.Tensor:
    noise = custom.RandomNoise.execute(7)[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, *custom_parts(model), latent())[0]["samples"]


def sampler_custom_advanced(model, encode, *_):
    return advanced_with(custom.CFGGuider.execute(model, encode(CAT), encode(""), 4.0)[0], model)


def basic_guider(model, encode, *_):
    return advanced_with(custom.BasicGuider.execute(model, encode(CAT))[0], model)


def dual_guider(model, encode, *_):
    guider = custom.DualCFGGuider.execute(model, encode(CAT), encode(THIRD), encode(""), 4.0, 2.0, "regular")[0]
    return advanced_with(guider, model)


LINEAR = [
    plain, batch_of_three, prompts_of_unequal_length, combined_conditioning, area_conditioning, masked_conditioning,
    image_to_image, inpainting, controlled, perturbed_attention, ksampler_advanced, sampler_custom,
    sampler_custom_advanced, basic_guider, dual_guider,
]  # fmt: skip


def rescaled(model, encode, *_):
    return ksampler(RescaleCFG().patch(model, 0.7)[0], encode(CAT), encode(""))


def with_sampler(name: str) -> Sample:
    def sample(model, encode, *_):
        return ksampler(model, encode(CAT), encode(""), sampler_name=name, steps=4)

    sample.__name__ = name
    return sample


SAMPLERS = [
    "euler_ancestral",
    "euler_cfg_pp",
    "dpmpp_2m",
    "dpmpp_2m_cfg_pp",
    "dpmpp_sde",
    "heun",
    "uni_pc",
    "ddim",
    "lcm",
]
ALL = [*LINEAR, rescaled, *map(with_sampler, SAMPLERS)]
named = pytest.mark.parametrize("workflow", ALL, ids=lambda workflow: workflow.__name__)


@pytest.fixture(scope="module")
def by_the_base(golden_model, encode, control_net):
    """What a workflow gives with the base model, computed once."""
    return cache(lambda workflow: workflow(golden_model, encode, control_net))


@named
def test_weight_one_is_the_base_model_bit_for_bit(
    workflow, golden_model, golden_lora, encode, control_net, by_the_base
):
    expected = by_the_base(workflow)
    assert torch.equal(workflow(fixed(golden_model, golden_lora, 1.0), encode, control_net), expected)
    assert expected.isfinite().all()


@named
def test_a_gate_that_detects_nothing_leaves_the_base_model_bit_for_bit(
    workflow, golden_model, golden_lora, encode, control_net, by_the_base
):
    """It probes half way, with the concept's prompt, against a threshold that nothing reaches."""
    lora, observer = dataclasses.replace(golden_lora, concept=encode(THIRD), neutral=encode("")), Observer()
    model = guided(golden_model, lora, observer=observer, statistic="alignment", threshold=100.0, probe_steps=10)
    assert torch.equal(workflow(model, encode, control_net), by_the_base(workflow))
    assert observer.cost.evaluations["adapted"] == 0
    assert observer.verdicts[0].decisions
    assert not observer.decision.detected


@named
def test_weight_zero_is_the_merged_adapter(
    workflow, golden_model, merged_model, golden_lora, encode, control_net, by_the_base
):
    expected = workflow(merged_model, encode, control_net)
    found = workflow(fixed(golden_model, golden_lora, 0.0), encode, control_net)
    assert relative(found, expected) < 1e-5
    assert relative(by_the_base(workflow), expected) > 1e-3


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("weight", [-1.0, 0.5, 2.0])
@pytest.mark.parametrize("passes", ["one batch", "two passes"])
@pytest.mark.parametrize(
    "conditioned", [plain, batch_of_three, area_conditioning, controlled], ids=lambda workflow: workflow.__name__
)
def test_one_step_is_the_blend_of_base_and_merged(
    conditioned, passes, weight, golden_model, merged_model, golden_lora, encode, control_net, monkeypatch
):
    monkeypatch.setattr(pack_module("unguide_comfy.blend.forward").Call, "_fits", lambda *_: passes == "one batch")
    monkeypatch.setitem(ksampler.__kwdefaults__, "steps", 1)
    base, merged, blended = (
        conditioned(model, encode, control_net)
        for model in (golden_model, merged_model, fixed(golden_model, golden_lora, weight))
    )
    assert relative(blended, weight * base + (1.0 - weight) * merged) < 1e-5


def test_adapters_add_up(golden_model, golden_lora, encode):
    """base + (1 - 0.5) d + (1 - 0.25) d = base + 1.25 d, one node after the other or as a stack."""
    once = ksampler(fixed(golden_model, golden_lora, -0.25), encode(CAT), encode(""), steps=1)
    nested = fixed(fixed(golden_model, golden_lora, 0.5), golden_lora, 0.25)
    assert relative(ksampler(nested, encode(CAT), encode(""), steps=1), once) < 1e-5


def test_another_merged_lora_is_part_of_the_base(golden_model, merged_model, golden_lora, encode):
    expected = ksampler(merged_model, encode(CAT), encode(""))
    assert torch.equal(ksampler(fixed(merged_model, golden_lora, 1.0), encode(CAT), encode("")), expected)


def test_strength_scales_the_adapter(golden_model, golden_lora, encode):
    halved = dataclasses.replace(golden_lora, strength=0.5)
    base = ksampler(golden_model, encode(CAT), encode(""))
    full, half = (
        relative(ksampler(fixed(golden_model, lora, 0.0), encode(CAT), encode("")), base)
        for lora in (golden_lora, halved)
    )
    assert 0.2 * full < half < 0.8 * full


# the model afterwards


def state_of(model: Any) -> dict[str, Any]:
    network = model.model.diffusion_model
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    forwards = {name: module.__dict__.get("forward") for name, module in network.named_modules()}
    return {"weights": weights, "forwards": forwards, "options": repr(sorted(model.model_options))}


def assert_unchanged(before: dict[str, Any], model: Any) -> None:
    after = state_of(model)
    assert all(torch.equal(before["weights"][name], after["weights"][name]) for name in before["weights"])
    assert before["forwards"] == after["forwards"]
    assert before["options"] == after["options"]


class Stop(Exception):
    pass


def test_a_run_leaves_the_model_as_it_was(golden_model, golden_lora, encode):
    before = state_of(golden_model)
    ksampler(fixed(golden_model, golden_lora, -1.0), encode(CAT), encode(""))
    assert_unchanged(before, golden_model)


@pytest.mark.parametrize("kind", ["error", "cancel"])
def test_a_run_that_ends_early_leaves_the_model_as_it_was(kind, golden_model, golden_lora, encode):
    """The third network call of the run fails inside a touched layer, as a cancel or an out-of-memory error does."""
    before = state_of(golden_model)
    error = Stop if kind == "error" else comfy.model_management.InterruptProcessingException
    calls = 0

    def fail(executor, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        return executor(*args, **kwargs)

    from comfy.patcher_extension import WrappersMP

    model = fixed(golden_model, golden_lora, -1.0)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "failing", fail)
    with pytest.raises(error):
        ksampler(model, encode(CAT), encode(""), steps=4)
    assert calls == 3
    assert_unchanged(before, golden_model)
    once = ksampler(fixed(golden_model, golden_lora, -1.0), encode(CAT), encode(""))
    again = ksampler(fixed(golden_model, golden_lora, -1.0), encode(CAT), encode(""))
    assert torch.equal(once, again)


def test_calling_the_model_outside_a_sampling_run_is_refused(golden_model, golden_lora, encode):
    wrapper = pack_module("unguide_comfy.blend.wrapper")

    class Executor:
        class_obj = golden_model.model

    with pytest.raises(RuntimeError, match="outside a sampling run"):
        wrapper.blended_prediction(Executor(), torch.zeros(1, 4, 8, 8), torch.ones(1))


# rows that cannot be told apart


class Constant(comfy.conds.CONDRegular):
    """A conditioning whose first dimension is not the batch."""

    def process_cond(self, batch_size: int, **kwargs: Any) -> Constant:
        return self

    def can_concat(self, other: Any) -> bool:
        return True

    def concat(self, others: Any) -> torch.Tensor:
        return self.cond


def with_constants(conditioning: Any) -> Any:
    return [[text, {**more, "model_conds": {"unused": Constant(torch.ones(5))}}] for text, more in conditioning]


def with_flat_text(model: Any) -> Any:
    """The model with one layer whose input has tokens in its first dimension, and not samples."""
    attention = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2

    def forward(x, context=None, value=None, mask=None, transformer_options=None):
        flat = context.flatten(0, 1)
        k, v = (layer(flat).unflatten(0, context.shape[:2]) for layer in (attention.to_k, attention.to_v))
        return attention.to_out(optimized_attention(attention.to_q(x), k, v, attention.heads))

    clone = model.clone()
    clone.add_object_patch("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.forward", forward)
    return clone


def of_two_prompts(demo: Any, lora: Any, flat: bool, constants: bool, low_memory: bool) -> tuple[torch.Tensor, Any]:
    """A batch of two prompts of which one is detected, and the gate's verdict."""
    ((cat, options),), ((dog, _),) = demo.encode(CAT), demo.encode("a photo of the dog")
    prompts = [[torch.cat([cat, dog]), {**options, "pooled_output": None}]], demo.encode("")
    prompts = [with_constants(prompt) if constants else prompt for prompt in prompts]
    observer = Observer()
    chosen = {"statistic": "influence", "threshold": 0.5, "weight_detected": -1.0, "low_memory": low_memory}
    model = guided(with_flat_text(demo.model) if flat else demo.model, lora, observer=observer, **chosen)
    return ksampler(model, *prompts, batch=2, steps=8, last_step=3), observer.verdicts[0]


@pytest.fixture(scope="module")
def two_prompts(demo, demo_lora):
    with torch.inference_mode():
        return of_two_prompts(demo, demo_lora, flat=False, constants=False, low_memory=False)


@pytest.mark.parametrize("awkward", [{"flat"}, {"constants"}, {"flat", "constants"}, {"constants", "low_memory"}])
def test_rows_that_cannot_be_told_apart_are_computed_one_adapter_after_the_other(awkward, two_prompts, demo, demo_lora):
    options = {name: name in awkward for name in ("flat", "constants", "low_memory")}
    found, verdict = of_two_prompts(demo, demo_lora, **options)
    assert verdict.weights == two_prompts[1].weights == (-1.0, 1.0)
    assert relative(found, two_prompts[0]) < 1e-4
