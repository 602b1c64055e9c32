"""Section B of the official code's numbers: trajectories, partial trajectories and probes of a toy network.

The official sampler works on variance-preserving latents and eps; ours on sigma-space latents and x0. The toy network
is turned into denoise(x, sigma) here, as a host turns its own.
"""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from unguide_core.adapter import LowRank
from unguide_core.guidance import blend, classifier_free
from unguide_core.probe import decide, influence
from unguide_core.schedule import (
    from_sigma_space,
    official_ddim_timesteps,
    official_run,
    partial_denoise,
    sd_alphas_cumprod,
    sigma_from_alpha_cumprod,
    to_sigma_space,
)

SIGMAS = sigma_from_alpha_cumprod(sd_alphas_cumprod())
PROMPT = "a photo of the cat"
LAYERS = ("block.attn2.to_k", "block.attn2.to_v")


@dataclass(frozen=True)
class Toy:
    """The closed-form network of section B; `adapted` adds the low-rank deltas to the outputs of to_k and to_v."""

    tensors: dict[str, Tensor]
    layers: dict[str, LowRank]

    def projected(self, layer: str, context: Tensor, adapted: bool) -> Tensor:
        out = torch.nn.functional.linear(context, self.tensors[f"toy/{layer}.weight"])
        return (out + self.layers[layer].delta(context) if adapted else out).mean(dim=1)

    def eps(self, x: Tensor, t: Tensor, context: Tensor, adapted: bool = False) -> Tensor:
        k, v = (self.projected(layer, context, adapted)[:, :, None, None] for layer in LAYERS)
        tau = (t.float() / 1000.0)[:, None, None, None]
        mixed = torch.einsum("oc,bchw->bohw", self.tensors["toy/mix"], x)
        h = mixed + k * self.tensors["toy/pattern"][None] + self.tensors["toy/bias"][None, :, None, None] * tau
        return 0.8 * x + 0.25 * torch.tanh(h) * (1.0 - 0.5 * tau) + 0.05 * v * torch.tanh(x)

    def context(self, prompts: list[str]) -> Tensor:
        return torch.stack([self.tensors[f"ctx/{prompt}"] for prompt in prompts])

    def guided_eps(self, x: Tensor, t: Tensor, cond: Tensor, uncond: Tensor, cfg: float, weight: float = 1.0) -> Tensor:
        def blended(context: Tensor) -> Tensor:
            return blend(self.eps(x, t, context), self.eps(x, t, context, adapted=True), weight)

        return classifier_free(blended(cond), blended(uncond), cfg)

    def denoise(self, cond: Tensor, uncond: Tensor, cfg: float, weight: float = 1.0):
        """The network as a host offers it: denoise(x, sigma) -> x0, in sigma space."""

        def predict_x0(x: Tensor, sigma: Tensor) -> Tensor:
            t = (SIGMAS[None] - sigma.double()[:, None]).abs().argmin(dim=1)
            level = sigma[0].item()
            return x - level * self.guided_eps(from_sigma_space(x, level), t, cond, uncond, cfg, weight)

        return predict_x0


@pytest.fixture(scope="module")
def toy(golden_b):
    tensors = golden_b.tensors("params")
    layers = {
        layer: LowRank(tensors[f"lora/{layer}.lora.A"].T, tensors[f"lora/{layer}.lora.B"].T, 8.0) for layer in LAYERS
    }
    return Toy(tensors, layers)


@pytest.fixture(scope="module")
def files(golden_b):
    names = {golden_b.manifest["files"][name]["file"]: name for name in ("traj_S10", "traj_S50")}
    return {file: golden_b.tensors(name) for file, name in names.items()}


def contexts(toy, run):
    return toy.context(run["prompts"]), toy.context([run["uncond"]] * run["batch"])


def weight_of(run):
    return 1.0 if run["w"] is None else run["w"]


def test_single_evaluations_equal_the_official_ones_merged_and_unmerged(toy, agree):
    t = toy.tensors
    arguments = t["eval/x"], t["eval/t"], t["eval/cond"]
    agree("B eps, base", toy.eps(*arguments), t["eval/eps_base"], 1e-5)
    agree("B eps, adapted (unmerged)", toy.eps(*arguments, adapted=True), t["eval/eps_lora"], 1e-5)


def test_guided_eps_on_the_saved_latents_equals_the_official_one(golden_b, toy, files, agree):
    for run in golden_b.manifest["trajectories"]:
        saved, prefix = files[run["file"]], run["prefix"]
        for t, x, e in zip(*(saved[prefix + key] for key in ("t", "x_t", "e_t")), strict=True):
            ours = toy.guided_eps(x, t.expand(run["batch"]), *contexts(toy, run), run["cfg"], weight_of(run))
            agree("B guided eps", ours, e, 1e-5)


def test_single_steps_from_the_saved_values_equal_the_official_update(golden_b, files, agree):
    for run in golden_b.manifest["trajectories"]:
        saved, prefix = files[run["file"]], run["prefix"]
        levels = list(pairwise(official_run(run["S"]).sigmas(sd_alphas_cumprod()).tolist()))
        for i, (sigma, sigma_next) in enumerate(levels):
            x, e = saved[prefix + "x_t"][i], saved[prefix + "e_t"][i]
            denoised = to_sigma_space(x, sigma) - sigma * e
            stepped = partial_denoise(
                lambda *_, x0=denoised: x0, to_sigma_space(x, sigma), torch.tensor([sigma, sigma_next]).double()
            )
            agree("B update, x_prev", from_sigma_space(stepped, sigma_next), saved[prefix + "x_prev"][i], 1e-5)
            agree("B update, pred_x0", denoised, saved[prefix + "pred_x0"][i], 1e-5)


def run_ours(toy, x_t, sigmas, cond, uncond, cfg, weight=1.0):
    """Our trajectory in the official terms: the latents x_0..x_n (variance-preserving) and the predicted x0."""
    levels, seen = sigmas.tolist(), []
    start = to_sigma_space(x_t, levels[0])
    final = partial_denoise(toy.denoise(cond, uncond, cfg, weight), start, sigmas, callback=seen.append)
    latents = [from_sigma_space(entry["x"], entry["sigma"]) for entry in seen]
    return [*latents, from_sigma_space(final, levels[-1])], [entry["denoised"] for entry in seen]


def test_whole_trajectories_equal_the_official_ones(golden_b, toy, files, agree):
    for run in golden_b.manifest["trajectories"]:
        saved, prefix = files[run["file"]], run["prefix"]
        official = official_run(run["S"])
        assert list(official.timesteps) == saved[prefix + "t"].tolist()
        sigmas = official.sigmas(sd_alphas_cumprod())
        latents, denoised = run_ours(toy, saved[run["x_T"]], sigmas, *contexts(toy, run), run["cfg"], weight_of(run))
        what = f"B trajectory, {run['S']} steps"
        agree(f"{what}, x", torch.stack(latents[1:]), saved[prefix + "x_prev"], 5e-5)
        agree(f"{what}, final", latents[-1], saved[prefix + "final"], 1e-5)
        agree(f"{what}, pred_x0 relative", torch.stack(denoised), saved[prefix + "pred_x0"], 2e-5, relative=True)


def test_partial_trajectories_equal_the_official_ones(golden_b, toy, agree):
    saved = golden_b.tensors("partial")
    for run in golden_b.manifest["partial"]:
        official = official_run(run["S"], run["till_T"])
        assert list(official.timesteps) == run["t_run"]
        batch = run["batch"]
        x_t = saved[f"S{run['S']}_t{run['till_T']}/bs{batch}/x_T"]
        cond, uncond = toy.context([run["prompt"]] * batch), toy.context([""] * batch)
        latents, _ = run_ours(toy, x_t, official.sigmas(sd_alphas_cumprod()), cond, uncond, run["scale"])
        agree("B partial trajectory", latents[-1], saved[run["prefix"] + "final"], 1e-5)


def test_stopping_a_whole_schedule_early_equals_the_partial_run(golden_b, toy, agree):
    saved = golden_b.tensors("partial")["S50_t40/bs3/prompt/final"]
    x_t = golden_b.tensors("partial")["S50_t40/bs3/x_T"]
    sigmas = official_run(50).sigmas(sd_alphas_cumprod())
    denoise = toy.denoise(toy.context([PROMPT] * 3), toy.context([""] * 3), 7.5)
    x = partial_denoise(denoise, to_sigma_space(x_t, sigmas[0].item()), sigmas[:11])
    agree("B stopped after 10 of 49 steps", from_sigma_space(x, sigmas[10].item()), saved, 1e-5)


def test_noise_levels_of_every_partial_run_equal_the_official_table(golden_b):
    table = golden_b.manifest["till_T_table"]
    for steps in ("10", "30", "50"):
        for till_t, row in table[steps].items():
            run = official_run(int(steps), int(till_t))
            assert len(run.timesteps) == row["steps_run"]
            assert run.timesteps[-1] == row["last_t_run"]
            assert run.end_timestep == row["z_noise_level_t"]
            assert list(run.probe_timesteps) == row["t_enc_ddpm_range"]


@pytest.mark.parametrize("probe", ["probe_n1", "probe_n3"])
def test_probe_norms_and_decisions_equal_the_official_ones(golden_b, toy, agree, probe):
    saved, facts = golden_b.tensors("probe"), golden_b.manifest[f"compute_lora_diff_{probe}"]
    prompts = facts["prompts_in_order"]
    run = official_run(facts["S"], facts["t_enc"])
    sigmas = run.sigmas(sd_alphas_cumprod())
    assert list(run.probe_timesteps) == facts["t_enc_ddpm_range"]
    norms = []
    for repeat, start_code in enumerate(saved[f"{probe}/start_codes"]):
        batch = start_code.shape[0]
        uncond = toy.context([""] * batch)
        t = saved[f"{probe}/t_enc_ddpm"][repeat]
        for number in range(len(prompts)):
            cond = saved[f"{probe}/ctx/{number}"].expand(batch, -1, -1)
            z = run_ours(toy, start_code, sigmas, cond, uncond, facts["guidance"])[0][-1]
            agree("B probe z", z, saved[f"{probe}/z"][repeat, number], 1e-5)
            norms.append(influence(toy.eps(z, t, cond), toy.eps(z, t, cond, adapted=True)))
    ours = torch.stack(norms).reshape(saved[f"{probe}/norms"].shape)
    agree("B probe norms", ours, saved[f"{probe}/norms"], 1e-5)
    per_prompt = dict(zip(prompts, ours.transpose(0, 1), strict=True))
    for prompt, weight in facts["decide_w"].items():
        decision = decide(per_prompt[prompt], per_prompt[""], weight_otherwise=2.0)
        assert decision.weight == weight, prompt
        values = decision.statistics[0].prompt
        mean = sum(values) / len(values)
        agree("B probe means", torch.tensor(mean), torch.tensor(facts["official_prompt_avgs"][prompt]), 1e-5)


def test_the_explicit_content_probe_equals_the_official_one(golden_b, toy, agree):
    saved, facts = golden_b.tensors("probe"), golden_b.manifest["nsfw_probe"]
    norms = {PROMPT: [], "": []}
    t = torch.tensor(facts["t_values_seen"])
    # z is saved repeat by repeat, the prompt's before the empty one's
    for z, prompt in zip(saved["nsfw/z"], [PROMPT, ""] * 5, strict=True):
        cond = toy.context([prompt])
        norms[prompt].append(influence(toy.eps(z, t, cond), toy.eps(z, t, cond, adapted=True)))
    agree("B explicit-content norms", torch.stack(norms[PROMPT]), saved["nsfw/norms_prompt"], 1e-5)
    agree("B explicit-content norms", torch.stack(norms[""]), saved["nsfw/norms_empty"], 1e-5)
    decision = decide(torch.stack(norms[PROMPT]), torch.stack(norms[""]), weight_otherwise=2.0)
    assert decision.weight == facts["w"]


@pytest.mark.parametrize(
    ("mistake", "change"),
    [
        ("weight and 1 - weight swapped", {"weight": 2.0}),
        ("adapter only", {"weight": 0.0}),
        ("base only", {"weight": 1.0}),
        ("cfg 7", {"cfg": 7.0}),
        ("all 50 steps", {"timesteps": official_ddim_timesteps(50)[::-1], "end": 0}),
        ("timesteps without + 1", {"timesteps": [t - 1 for t in official_run(50).timesteps], "end": 0}),
    ],
)
def test_the_limits_would_catch_a_real_mistake(toy, files, mistake, change):
    saved = files["b_traj_S50.safetensors"]
    timesteps = [*change.get("timesteps", official_run(50).timesteps), change.get("end", 0)]
    sigmas = SIGMAS[list(dict.fromkeys(timesteps))]
    latents, _ = run_ours(
        toy,
        saved["bs1/x_T"],
        sigmas,
        toy.context([PROMPT]),
        toy.context([""]),
        change.get("cfg", 7.5),
        change.get("weight", -1.0),
    )
    assert (latents[-1] - saved["bs1/auto_w=-1/final"]).abs().max() > 1e-3, mistake
