"""The official code's numbers (golden section C), out of the host's own model, guider and sampler."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import pack_module
from tests.host.conftest import GOLDEN, conditioning, fixed

EPS_LIMIT, TRAJECTORY_LIMIT = 5e-5, 2e-4
LATENT_SCALE = 0.18215


class Evaluation(comfy.samplers.Sampler):
    """One prediction instead of sampling: eps of the positive conditioning at a timestep, through the whole stack."""

    def __init__(self, x: torch.Tensor, timestep: int):
        self.x, self.timestep = x, timestep

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
        model = model_wrap.inner_model
        sigma = model.model_sampling.sigma(torch.tensor([float(self.timestep)]))
        scaled = self.x * (1.0 + sigma**2).sqrt()
        options = extra_args["model_options"]
        x0 = comfy.samplers.calc_cond_batch(model, [model_wrap.conds["positive"]], scaled, sigma, options)[0]
        return (scaled - x0) / sigma


def sample(
    model: Any, positive: Any, negative: Any, cfg: float, sampler: Any, sigmas: torch.Tensor, noise: torch.Tensor
):
    """The host's guider and sampler; latents as the network sees them."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    latent = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0)
    return latent * LATENT_SCALE


def compare(what: str, found: torch.Tensor, golden: torch.Tensor, limit: float) -> None:
    difference = float((found - golden).abs().max())
    print(f"golden {what}: max abs diff {difference:.3g} (limit {limit:.3g})")
    assert difference <= limit


@pytest.fixture(scope="module")
def data() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "c_eval.safetensors")


def eps(model: Any, data: dict[str, torch.Tensor], row: int, timestep: int) -> torch.Tensor:
    x, context = data["x"][row : row + 1], conditioning(data["context"][row])
    return sample(model, context, context, 1.0, Evaluation(x, timestep), torch.ones(2), x)


def test_base_eps_is_the_official_one(golden_model, data):
    for row, timestep in enumerate(data["t"].tolist()):
        compare(f"C eps, base, row {row}", eps(golden_model, data, row, timestep)[0], data["eps_base"][row], EPS_LIMIT)


def test_adapted_eps_is_the_official_one(golden_model, golden_lora, data):
    model = fixed(golden_model, golden_lora, 0.0)
    for row, timestep in enumerate(data["t"].tolist()):
        found = eps(model, data, row, timestep)[0]
        compare(f"C eps, adapted, row {row}", found, data["eps_lora_injected"][row], EPS_LIMIT)
        assert not torch.allclose(found, data["eps_base"][row], atol=1e-3)


@pytest.mark.parametrize("weight", [-1.0, 2.0, None], ids=["detected", "otherwise", "base"])
def test_trajectory_is_the_official_one(golden_model, golden_lora, data, manifest, weight):
    trajectory = load_file(GOLDEN / "c_traj_S10.safetensors")
    prefix = "default_cfg=7.5/" if weight is None else f"auto_w={weight:g}/"
    core = pack_module("unguide_core.schedule")
    sigmas = core.official_run(10).sigmas(core.sd_alphas_cumprod()).float()
    start = trajectory["x_T"] * (1.0 + sigmas[0] ** 2).sqrt() / sigmas[0]  # the host multiplies by sigma again
    model = golden_model if weight is None else fixed(golden_model, golden_lora, weight)
    positive, negative = conditioning(data["ctx/a photo of the cat"]), conditioning(data["ctx/"])
    final = sample(model, positive, negative, 7.5, comfy.samplers.ksampler("euler"), sigmas, start)
    golden = trajectory[prefix + "final"]
    final_vp = final / (1.0 + sigmas[-1] ** 2).sqrt()
    compare(f"C trajectory, {prefix}final", final_vp, golden, TRAJECTORY_LIMIT * float(golden.abs().max()))
