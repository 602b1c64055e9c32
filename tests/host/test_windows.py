"""A video that the host cuts into context windows is decided as a whole, and erased in every window.

The frames are the batch of the demo model (dimension 0), which its network does not mix.
"""

from __future__ import annotations

from typing import Any

import comfy.context_windows as windows
import pytest
import torch

from tests.host.conftest import CAT, Observer, guided, ksampler, latent
from tests.host.test_blending import relative

FRAMES, LENGTH = 4, 2


def windowed(model: Any) -> Any:
    """A clone of a model whose latents are cut into windows of two frames, one of them shared."""
    clone = model.clone()
    clone.model_options["context_handler"] = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD),
        fuse_method=windows.get_matching_fuse_method(windows.ContextFuseMethods.FLAT),
        context_length=LENGTH,
        context_overlap=1,
        dim=0,
    )
    return clone


def sampled(model: Any, demo: Any, prompt: str = CAT, seed: int = 3) -> torch.Tensor:
    return ksampler(model, demo.encode(prompt), demo.encode(""), latent(FRAMES), steps=4, seed=seed)


def differing(one: torch.Tensor, other: torch.Tensor) -> list[bool]:
    """Which frames differ by more than rounding."""
    return [relative(a, b) > 1e-2 for a, b in zip(one, other, strict=True)]


@pytest.fixture(scope="module")
def base(demo) -> torch.Tensor:
    with torch.inference_mode():
        return sampled(windowed(demo.model), demo)


@pytest.mark.parametrize("chosen", [{}, {"resist_adversarial": True}])
def test_a_detected_video_is_erased_in_all_windows_as_without_them(demo, demo_lora, base, chosen):
    observer = Observer()
    found = sampled(guided(windowed(demo.model), demo_lora, observer=observer, **chosen), demo)
    whole = sampled(guided(demo.model, demo_lora, **chosen), demo)
    assert observer.decision.detected
    assert differing(found, base) == [True] * FRAMES
    assert relative(found, whole) < 1e-3


def test_an_unrelated_video_is_the_base_models_bit_for_bit(demo, demo_lora):
    prompt, observer = "a photo of the ship", Observer()
    found = sampled(guided(windowed(demo.model), demo_lora, observer=observer), demo, prompt)
    assert not observer.decision.detected
    assert torch.equal(found, sampled(windowed(demo.model), demo, prompt))


def test_one_frame_in_a_later_window_is_enough(demo, demo_lora, base):
    """The threshold lies between the last frame's score and those of the others, by the choice of the frames' order."""
    observer = Observer()
    model = guided(demo.model, demo_lora, observer=observer, statistic="influence", threshold=10.0)
    noise = torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sample_noise(model, demo, noise)
    scores = torch.tensor([decision.score for decision in observer.verdicts[-1].decisions])
    noise = noise[scores.argsort()]
    low, high = scores.sort().values[-2:].tolist()
    threshold = (low + high) / 2
    observer = Observer()
    model = guided(windowed(demo.model), demo_lora, observer=observer, statistic="influence", threshold=threshold)
    found = sample_noise(model, demo, noise)
    assert observer.decision.detected
    assert observer.decision.score == pytest.approx(high, rel=1e-3)
    assert differing(found, sample_noise(windowed(demo.model), demo, noise)) == [True] * FRAMES


def sample_noise(model: Any, demo: Any, noise: torch.Tensor) -> torch.Tensor:
    """Latents from a noise of one's own."""
    import comfy.sample

    return comfy.sample.sample(
        model, noise, 4, 4.0, "euler", "normal", demo.encode(CAT), demo.encode(""), latent(FRAMES)["samples"], seed=3
    )
