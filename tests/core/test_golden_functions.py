"""Section A of the official code's numbers: single functions."""

import math

import pytest
import torch

from unguide_core.adapter import LowRank, initial_low_rank
from unguide_core.formats import AdapterError, load_adapter
from unguide_core.guidance import blend, classifier_free
from unguide_core.probe import decide
from unguide_core.schedule import official_ddim_timesteps, official_run, sd_alphas_cumprod, sd_betas


def combination(golden_a):
    """The official inputs, base and adapted, and per case: weight, guidance scale and the official result."""
    eps = golden_a.tensors("combine")
    base = {row: eps[f"eps_full_{row}"] for row in ("cond", "uncond")}
    adapted = {row: eps[f"eps_unl_{row}"] for row in ("cond", "uncond")}
    cases = [*golden_a.manifest["combine_cases"], golden_a.manifest["combine_defaults"]]
    return base, adapted, [(case["w"], case["cfg_scale"], eps[case["key"]]) for case in cases]


def test_blending_guided_results_equals_the_official_combination(golden_a, agree):
    base, adapted, cases = combination(golden_a)
    for weight, scale, official in cases:
        guided = [classifier_free(**rows, guidance_scale=scale) for rows in (base, adapted)]
        agree("A combination, results blended", blend(*guided, weight), official, 1e-5)


def test_blending_rows_before_guidance_equals_the_official_combination(golden_a, agree):
    """The values reach 79, where one float32 step is 8e-6: hence float64 for the absolute limit."""
    base, adapted, cases = combination(golden_a)
    for weight, scale, official in cases:
        for dtype, relative in ((torch.float64, False), (torch.float32, True)):
            rows = {row: blend(base[row].to(dtype), adapted[row].to(dtype), weight) for row in base}
            what = f"A combination, rows blended, {'float32, relative' if relative else 'float64'}"
            ours = classifier_free(**rows, guidance_scale=scale)
            agree(what, ours, official, 1e-6 if relative else 1e-5, relative=relative)


def test_decisions_equal_the_official_ones_ties_included(golden_a):
    compared = 0
    for case in golden_a.manifest["decide_w"]:
        if "case" in case:
            continue  # None and arrays: see below
        prompt, empty = float(case["prompt"]), float(case["empty"])
        if not (math.isfinite(prompt) and math.isfinite(empty)):
            continue
        ours = decide(prompt, empty, weight_detected=case.get("w1", -1), weight_otherwise=case.get("w2", 2))
        assert ours.weight == case["w"], case
        compared += 1
    assert compared == 8


def test_nan_and_infinity_are_errors_where_the_official_code_decides(golden_a):
    """A deliberate difference: the official code takes a broken prediction for "not detected" or "detected"."""
    wild = [c for c in golden_a.manifest["decide_w"] if {c["prompt"], c["empty"]} & {"nan", "inf"}]
    assert len(wild) == 4
    for case in wild:
        with pytest.raises(ValueError, match="expected finite numbers"):
            decide(float(case["prompt"]), float(case["empty"]))


def test_a_batch_is_averaged_where_the_official_code_raises():
    """A deliberate difference: official `decide_w` takes one number each and fails on a batch."""
    assert decide([2.0, 0.5], [1.0, 1.0]).detected
    assert decide([2.0], [1.0]).detected


def test_official_files_change_weights_as_the_official_merge_does(golden_a, agree, tmp_path):
    tensors = golden_a.tensors("apply_lora")
    for case in golden_a.manifest["apply_lora_cases"]:
        prefix = case["prefix"]
        lora = {k.removeprefix(prefix + "lora/"): v for k, v in tensors.items() if k.startswith(prefix + "lora/")}
        torch.save(lora, tmp_path / "lora.pth")
        # the official alpha is our scale; 4 is the official function's default
        scale = 4 if case["alpha"] is None else case["alpha"]
        adapter = load_adapter(tmp_path / "lora.pth", alpha=scale * case["rank"])
        assert sorted(adapter.layers) == sorted(f"diffusion_model.{module}" for module in case["modules"])
        for module in case["modules"]:
            before, after = (tensors[f"{prefix}{when}/{module}.weight"] for when in ("before", "after"))
            ours = before + adapter.layers[f"diffusion_model.{module}"].weight_delta()
            agree("A merged weights", ours, after, 1e-5)


def test_official_files_without_a_partner_key_are_errors_as_in_the_official_code(golden_a, tmp_path):
    assert golden_a.manifest["apply_lora_errors"]["missing B"].startswith("KeyError")
    torch.save({"blk.0.attn2.to_k.lora.A": torch.ones(4, 1)}, tmp_path / "lora.pth")
    with pytest.raises(AdapterError, match=r"has no partner 'blk.0.attn2.to_k.lora.B'"):
        load_adapter(tmp_path / "lora.pth")


def test_deltas_equal_the_official_lora_layer(golden_a, agree):
    tensors = golden_a.tensors("lora_linear")
    for case in golden_a.manifest["lora_linear_cases"]:
        get = {k.removeprefix(case["prefix"]): v for k, v in tensors.items() if k.startswith(case["prefix"])}
        ours = LowRank(get["A"].T, get["B"].T, case["alpha"]).delta(get["x"])
        agree("A low-rank delta", ours, get["delta"], 1e-5)
        base = torch.nn.functional.linear(get["x"], get["weight"], get.get("bias"))
        agree("A adapted layer", base + ours, get["y"], 1e-5)


def test_the_initialisation_equals_the_official_one_drawn_from_the_same_seed(golden_a, agree):
    """To rounding: torch computes normal numbers in another order on processors with other vector instructions."""
    tensors = golden_a.tensors("lora_linear")
    for number, case in enumerate(golden_a.manifest["lora_linear_cases"]):
        drawn = torch.Generator().manual_seed(100 + number)
        ours = initial_low_rank(case["in"], case["out"], case["rank"], case["alpha"], drawn)
        official = tensors[f"{case['prefix']}A_init_manual_seed_{100 + number}"]
        agree("A initial A", ours.down.detach().T, official, 1e-6)
        assert torch.equal(ours.up.T, tensors[f"{case['prefix']}B_init"])
        assert ours.delta(tensors[f"{case['prefix']}x"]).abs().max() == 0.0


def test_the_noise_schedule_equals_the_official_one(golden_a, agree):
    official = golden_a.tensors("schedule")
    agree("A betas", sd_betas(), official["betas_f64"], 1e-15)
    agree("A alphas_cumprod", sd_alphas_cumprod().float(), official["alphas_cumprod_f32"], 1e-7)


def test_ddim_timesteps_equal_the_official_ones_oddities_included(golden_a):
    for steps, row in golden_a.manifest["ddim_step_table"].items():
        if "raises" in row:
            with pytest.raises(ValueError, match="past the last one"):
                official_ddim_timesteps(int(steps))
            continue
        rising, run = official_ddim_timesteps(int(steps)), official_run(int(steps))
        if isinstance(row["ddim_timesteps"], list):
            assert rising == row["ddim_timesteps"]
        assert len(rising) == row["n_schedule"]
        assert len(run.timesteps) == row["n_steps_run"]
        assert next(iter(run.timesteps), None) == row["first_t_run"]
        assert rising[-1] == row["dropped_t"]
