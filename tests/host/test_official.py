"""Deciding "as the paper" against the official code's numbers (golden section C), through the host's own nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from safetensors.torch import load_file

from tests.conftest import pack_module
from tests.host.conftest import CAT, GOLDEN, Observer, ksampler, settings
from tests.host.test_golden_network import LATENT_SCALE, TRAJECTORY_LIMIT, compare

attach, official = (pack_module(f"unguide_comfy.gate.{name}") for name in ("attach", "official"))
probe = pack_module("unguide_core.probe")
NORM_LIMIT = 1e-3


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


def sampled(model: Any, positive: Any, negative: Any, noise: torch.Tensor, steps: int = 10) -> torch.Tensor:
    """Some steps by SamplerCustomAdvanced, the latent as the network sees it."""
    guider = custom.CFGGuider.execute(model, positive, negative, 7.5)[0]
    sigmas = custom.BasicScheduler.execute(model, "normal", steps, 1.0)[0]
    chosen = custom.KSamplerSelect.execute("euler")[0]
    out = custom.SamplerCustomAdvanced.execute(
        Given(noise), guider, chosen, sigmas, {"samples": torch.zeros_like(noise)}
    )[0]
    return out["samples"] * LATENT_SCALE


def as_paper(model: Any, lora: Any, observer: Any, neutral: Any = None, start: Any = None, given: Any = None) -> Any:
    """A model that decides as the paper, with a probe of two of ten steps; `given` decisions take its place."""
    chosen = settings(decide="as the paper", probe_steps=2, probe_schedule_steps=10, neutral=neutral)
    return attach.guided(model, (lora,), chosen, given, observer, start)


@pytest.fixture(scope="module")
def start(drawn):
    return official.Start(drawn["start_codes"][:, 0], drawn["t_enc_ddpm"][:, 0])


def test_golden_probe_norms_and_decisions(golden_model, golden_lora, encode, manifest, drawn, start, trajectory):
    prompts = manifest["probe"]["prompts_in_order"]
    for number, prompt in enumerate(prompts):
        if not prompt:
            continue
        observer = Observer()
        model = as_paper(golden_model, golden_lora, observer, encode(""), start)
        sampled(model, encode(prompt), encode(""), trajectory["x_T"], steps=2)
        (statistic,) = observer.decision.statistics
        found, neutral = torch.tensor(statistic.prompt), torch.tensor(statistic.neutral)
        compare(f"C probe norms, {prompt}", found, drawn["norms"][:, number, 0], NORM_LIMIT)
        compare(f"C probe norms, neutral beside {prompt}", neutral, drawn["norms"][:, prompts.index(""), 0], NORM_LIMIT)
        assert observer.decision.weight == manifest["probe"]["decide_w"][prompt]


@pytest.mark.parametrize("weight", [-1.0, 2.0])
def test_golden_trajectory_by_given_decisions(weight, golden_model, golden_lora, encode, trajectory, start):
    key = pack_module("unguide_comfy.model.key").model_key(golden_model)
    statistics = (probe.paper_statistic(2.0, 1.0),)
    given = probe.Decision(weight, statistics, model_key=key, adapter_key=golden_lora.key)
    observer = Observer()
    model = as_paper(golden_model, golden_lora, observer, encode(""), start, [given])
    final = sampled(model, encode(CAT), encode(""), trajectory["x_T"])
    golden = trajectory[f"auto_w={weight:g}/final"]
    limit = TRAJECTORY_LIMIT * float(golden.abs().max())
    compare(f"C trajectory, weight {weight:g}, as the paper", final, golden, limit)
    assert observer.cost.plain == 2 * 9  # the noisiest of ten steps is dropped


def test_the_papers_weights_follow_from_the_decision(demo, demo_lora):
    weights = []
    for prompt in (CAT, ""):
        observer = Observer()
        model = as_paper(demo.model, demo_lora, observer)
        sampled(model, demo.encode(prompt), demo.encode(""), torch.zeros(1, 4, 8, 8), steps=2)
        weights.append(observer.verdicts[0].weights)
        assert observer.decision.reason == "paper, by the official code's probe"
    assert weights == [(-1.0,), (2.0,)]


def test_an_image_to_start_from_is_refused(demo, demo_lora):
    model = as_paper(demo.model, demo_lora, None)
    image = {"samples": torch.ones(1, 4, 8, 8)}
    with pytest.raises(ValueError, match="generates from noise alone"):
        ksampler(model, demo.encode(CAT), demo.encode(""), image, steps=10, denoise=0.5)


def test_without_a_neutral_or_negative_prompt_it_is_refused(golden_model, golden_lora, encode):
    model = as_paper(golden_model, golden_lora, None)
    guider = custom.BasicGuider.execute(model, encode(CAT))[0]
    sigmas = custom.BasicScheduler.execute(model, "normal", 10, 1.0)[0]
    sampler, image = custom.KSamplerSelect.execute("euler")[0], {"samples": torch.zeros(1, 4, 8, 8)}
    with pytest.raises(ValueError, match="as the paper compares with a neutral prompt; connect a CLIP"):
        custom.SamplerCustomAdvanced.execute(custom.RandomNoise.execute(3)[0], guider, sampler, sigmas, image)
