import pytest
import torch

from unguide_core.schedule import (
    from_sigma_space,
    official_ddim_timesteps,
    official_run,
    partial_denoise,
    sd_alphas_cumprod,
    sigma_from_alpha_cumprod,
    to_sigma_space,
)


@pytest.fixture
def x(generator):
    return torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64) * 14.6


def half(x, sigma):
    return 0.5 * x


SIGMAS = torch.tensor([14.6, 5.0, 1.0, 0.3, 0.0])


def test_both_latent_forms_convert_into_each_other(x):
    torch.testing.assert_close(from_sigma_space(to_sigma_space(x, 14.6), 14.6), x)


def test_sigma_follows_from_the_signals_share_of_the_variance(x):
    alphas = sd_alphas_cumprod()
    sigmas = sigma_from_alpha_cumprod(alphas)
    torch.testing.assert_close(1.0 / (1.0 + sigmas.square()), alphas)
    assert sigmas[0].item() == pytest.approx(0.0292, abs=1e-4)
    assert sigmas[-1].item() == pytest.approx(14.61, abs=1e-2)


def test_a_step_is_eulers_method(x):
    stepped = partial_denoise(half, x, SIGMAS[:2])
    eps = (x - half(x, None)) / SIGMAS[0].double()
    torch.testing.assert_close(stepped, x + eps * (SIGMAS[1] - SIGMAS[0]).double())


def test_a_perfect_denoiser_ends_in_its_image(x):
    image = torch.full_like(x, 0.25)
    assert torch.equal(partial_denoise(lambda *_: image, x, SIGMAS), image)


def test_two_halves_equal_the_whole(x):
    middle = partial_denoise(half, x, SIGMAS[:3])
    assert torch.equal(partial_denoise(half, middle, SIGMAS[2:]), partial_denoise(half, x, SIGMAS))


def test_no_steps_return_the_latent_itself(x):
    assert partial_denoise(half, x, SIGMAS[:1]) is x


def test_the_denoiser_is_called_once_a_step_with_one_sigma_per_sample(x):
    seen = []
    partial_denoise(lambda x, sigma: seen.append(sigma) or x, x, SIGMAS[:4])
    assert [sigma.tolist() for sigma in seen] == [[s, s] for s in SIGMAS[:3].double().tolist()]


def test_half_precision_latents_get_their_sigma_in_full_precision(x):
    seen = []
    partial_denoise(lambda x, sigma: seen.append(sigma.dtype) or x, x.half(), SIGMAS[:2])
    assert seen == [torch.float32]


def test_the_callback_sees_every_evaluation_and_can_stop_the_run(x):
    seen = []

    def stop_after_two(entry):
        seen.append((entry["i"], round(entry["sigma"], 5)))
        assert torch.equal(entry["denoised"], half(entry["x"], None))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        partial_denoise(half, x, SIGMAS, callback=stop_after_two)
    assert seen == [(0, 14.6), (1, 5.0)]


@pytest.mark.parametrize(
    "sigmas", [[], [1.0, 1.0], [1.0, 2.0], [1.0, 0.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0], [[2.0, 1.0]]]
)
def test_noise_levels_that_do_not_fall_are_refused(x, sigmas):
    with pytest.raises(ValueError, match="expected strictly falling, finite, non-negative numbers"):
        partial_denoise(half, x, torch.tensor(sigmas))


def test_the_official_run_drops_the_noisiest_timestep_and_ends_above_a_clean_image():
    run = official_run(50)
    assert (len(run.timesteps), run.timesteps[0], run.end_timestep) == (49, 961, 0)
    assert run.sigmas(sd_alphas_cumprod())[-1].item() == pytest.approx(0.0292, abs=1e-4)


def test_the_official_probe_evaluates_at_a_noisier_level_than_its_latent_has():
    run = official_run(50, 40)
    assert (len(run.timesteps), run.end_timestep, run.probe_timesteps) == (10, 761, (800, 820))
    run = official_run(10, 8)
    assert (len(run.timesteps), run.end_timestep, run.probe_timesteps) == (2, 601, (800, 900))


@pytest.mark.parametrize("till_t", [0, 1, 10, 11, 1000])
def test_official_stops_that_are_never_reached_give_the_whole_run(till_t):
    assert official_run(10, till_t).timesteps == official_run(10).timesteps


@pytest.mark.parametrize("steps", [0, -1, 1001, 3, 501, 1000])
def test_step_counts_that_the_official_code_cannot_run_are_refused(steps):
    with pytest.raises(ValueError, match="steps"):
        official_ddim_timesteps(steps)


def test_a_negative_stop_is_refused():
    with pytest.raises(ValueError, match="till_t is -1"):
        official_run(50, -1)
