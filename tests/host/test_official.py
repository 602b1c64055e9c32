"""The gate mode "official" against the official code's numbers (golden section C), through the host's own nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from safetensors.torch import load_file

from tests.conftest import pack_module
from tests.host.conftest import GOLDEN
from tests.host.test_golden_network import LATENT_SCALE, TRAJECTORY_LIMIT, compare

gating, deciding, official, probe = (
    pack_module(f"{folder}.{name}")
    for folder, name in (
        ("unguide_comfy", "gating"),
        ("unguide_comfy", "deciding"),
        ("unguide_comfy", "official"),
        ("unguide_core", "probe"),
    )
)
NORM_LIMIT = 1e-3
CAT = "a photo of the cat"


class Given:
    """A NOISE that is given, not drawn."""

    seed = 0

    def __init__(self, noise: torch.Tensor):
        self.noise = noise

    def generate_noise(self, latent: dict[str, Any]) -> torch.Tensor:
        return self.noise


@pytest.fixture(scope="module")
def trajectory():
    return load_file(GOLDEN / "c_traj_S10.safetensors")


@pytest.fixture(scope="module")
def drawn():
    return load_file(GOLDEN / "c_probe.safetensors")


def sampled(model: Any, positive: Any, negative: Any, noise: torch.Tensor, sampler: str = "euler") -> torch.Tensor:
    """Ten steps by SamplerCustomAdvanced, the latent as the network sees it."""
    guider = custom.CFGGuider.execute(model, positive, negative, 7.5)[0]
    sigmas = custom.BasicScheduler.execute(model, "normal", 10, 1.0)[0]
    chosen = custom.KSamplerSelect.execute(sampler)[0]
    out = custom.SamplerCustomAdvanced.execute(
        Given(noise), guider, chosen, sigmas, {"samples": torch.zeros_like(noise)}
    )[0]
    return out["samples"] * LATENT_SCALE


def gated(model: Any, lora: Any, neutral: Any, start: Any, reports: list[Any], decisions: Any = None) -> Any:
    settings = deciding.ProbeSettings(probe_steps=2, schedule_steps=10)
    gate = gating.Gate(gating.OFFICIAL, settings, neutral, start=start)
    return gating.guided(model, (lora,), gate, decisions, observer=reports.append)


@pytest.fixture(scope="module")
def start(drawn):
    return official.Start(drawn["start_codes"][:, 0], drawn["t_enc_ddpm"][:, 0])


def test_golden_probe_norms_and_decisions(golden_model, golden_lora, encode, manifest, drawn, start, trajectory):
    prompts = manifest["probe"]["prompts_in_order"]
    for number, prompt in enumerate(prompts):
        if not prompt:
            continue
        reports: list[Any] = []
        model = gated(golden_model, golden_lora, encode(""), start, reports)
        sampled(model, encode(prompt), encode(""), trajectory["x_T"])
        decision = reports[0].outcomes[0].decision
        found, neutral = torch.tensor(decision.prompt), torch.tensor(decision.neutral)
        compare(f"C probe norms, {prompt}", found, drawn["norms"][:, number, 0], NORM_LIMIT)
        compare(f"C probe norms, neutral beside {prompt}", neutral, drawn["norms"][:, prompts.index(""), 0], NORM_LIMIT)
        assert decision.weight == manifest["probe"]["decide_w"][prompt]


@pytest.mark.parametrize("weight", [-1.0, 2.0])
def test_golden_trajectory_out_of_the_mode(weight, golden_model, golden_lora, encode, trajectory, start):
    key = pack_module("unguide_comfy.identity").model_key(golden_model)
    statistics = (probe.paper_statistic(2.0, 1.0),)
    given = probe.Decision(weight, statistics, model_key=key, adapter_key=golden_lora.key)
    reports: list[Any] = []
    model = gated(golden_model, golden_lora, encode(""), start, reports, [given])
    final = sampled(model, encode(CAT), encode(""), trajectory["x_T"])
    golden = trajectory[f"auto_w={weight:g}/final"]
    limit = TRAJECTORY_LIMIT * float(golden.abs().max())
    compare(f"C trajectory, weight {weight:g}, official mode", final, golden, limit)
    assert reports[0].plain == 2 * 9  # the noisiest of ten steps is dropped


def test_the_official_weights_follow_from_the_decision(demo, demo_lora):
    weights = []
    for prompt in ("a photo of the cat", ""):
        reports: list[Any] = []
        model = gated(demo.model, demo_lora, None, None, reports)
        sampled(model, demo.encode(prompt), demo.encode(""), torch.zeros(1, 4, 8, 8))
        weights.append(reports[0].outcomes[0].weights)
    assert weights == [(-1.0,), (2.0,)]


def test_a_picture_to_start_from_is_refused(demo, demo_lora):
    import nodes

    model = gated(demo.model, demo_lora, None, None, [])
    image = {"samples": torch.ones(1, 4, 8, 8)}
    with pytest.raises(ValueError, match="draws from noise alone"):
        nodes.common_ksampler(
            model, 1, 10, 4.0, "euler", "normal", demo.encode(CAT), demo.encode(""), image, denoise=0.5
        )
