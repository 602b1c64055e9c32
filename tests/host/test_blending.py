"""A fixed weight in every host workflow that people build, against the same workflow without UnGuide.

Three claims for each: weight 1 is the base model bit for bit; weight 0 is the adapter merged by the host's loader; and
one Euler step is affine in the blend, so that weight -1 gives 2 * merged - base (there the rows run in one batch).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras.nodes_model_advanced import RescaleCFG
from comfy_extras.nodes_pag import PerturbedAttentionGuidance

import nodes as host
from tests.conftest import pack_module
from tests.host.conftest import fixed

CAT, OTHER, THIRD = "a photo of the cat", "a photo of the dog", "in the forest"
Sample = Callable[..., torch.Tensor]


def latent(batch: int = 1, size: int = 8, **more: Any) -> dict[str, Any]:
    return {"samples": torch.zeros(batch, 4, size, size), **more}


def drawn(size: int = 8) -> dict[str, Any]:
    """A latent with something in it, for img2img."""
    return {"samples": torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(5))}


def ksampler(model: Any, positive: Any, negative: Any, image: Any = None, *, steps: int = 3, **options: Any) -> Any:
    settings = {"sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, **options}
    image = latent() if image is None else image
    (out,) = host.common_ksampler(
        model,
        7,
        steps,
        4.0,
        settings.pop("sampler_name"),
        settings.pop("scheduler"),
        positive,
        negative,
        image,
        **settings,
    )
    return out["samples"]


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
    return ksampler(model, encode(CAT), encode(""), latent(3))


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
    return ksampler(model, encode(CAT), encode(""), drawn(), denoise=0.6)


def inpainting(model, encode, *_):
    return ksampler(model, encode(CAT), encode(""), {**drawn(), "noise_mask": half_mask()})


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


@named
def test_weight_one_is_the_base_model_bit_for_bit(workflow, golden_model, golden_lora, encode, control_net):
    expected = workflow(golden_model, encode, control_net)
    assert torch.equal(workflow(fixed(golden_model, golden_lora, 1.0), encode, control_net), expected)
    assert expected.isfinite().all()


@named
def test_a_watched_run_that_finds_nothing_is_the_base_model_bit_for_bit(
    workflow, golden_model, golden_lora, encode, control_net
):
    """It is looked at on the way, with the concept's prompt, against a threshold that nothing reaches."""
    gating, deciding = pack_module("unguide_comfy.gating"), pack_module("unguide_comfy.deciding")
    lora = dataclasses.replace(golden_lora, concept=encode(THIRD), neutral=encode(""))
    settings = deciding.ProbeSettings(statistic="alignment", threshold=100.0)
    reports: list[Any] = []
    gate = gating.Gate(gating.TRAJECTORY, settings)
    watched = gating.guided(golden_model, (lora,), gate, observer=reports.append)
    assert torch.equal(workflow(watched, encode, control_net), workflow(golden_model, encode, control_net))
    (outcome,) = reports[-1].outcomes
    assert reports[-1].evaluations["adapted"] == 0
    assert outcome.decisions
    assert not any(decision.detected for decision in outcome.decisions)


@named
def test_weight_zero_is_the_merged_adapter(workflow, golden_model, merged_model, golden_lora, encode, control_net):
    expected = workflow(merged_model, encode, control_net)
    found = workflow(fixed(golden_model, golden_lora, 0.0), encode, control_net)
    assert relative(found, expected) < 1e-5
    assert relative(workflow(golden_model, encode, control_net), expected) > 1e-3


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
    monkeypatch.setattr(pack_module("unguide_comfy.blending").Call, "fits", lambda *_: passes == "one batch")
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
    import dataclasses

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
    blending = pack_module("unguide_comfy.blending")

    class Executor:
        class_obj = golden_model.model

    with pytest.raises(RuntimeError, match="outside a sampling run"):
        blending.blended_prediction(Executor(), torch.zeros(1, 4, 8, 8), torch.ones(1))
