"""Probes prompts with a diffusers model, for a calibration; `unguide_core.probe` does the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unguide_core.adapter import Adapter, LowRank
from unguide_core.probe import alignment, influence
from unguide_core.probe.calibration import (
    MINIMUM_OTHERS,
    PROBED_STEPS,
    STEPS,
    Asked,
    Calibration,
    CalibrationPrompts,
    Probed,
    calibrated_levels,
)
from unguide_core.probe.image import (
    CONCEPT_IMAGES,
    OTHER_IMAGES,
    SIGMA,
    ImageProbe,
    fit_image_probe,
    image_features,
    images_of,
)
from unguide_core.probe.image import (
    STEPS as IMAGE_STEPS,
)
from unguide_core.probe.text import TextCalibration, calibrated_text, text_map
from unguide_core.schedule import from_sigma_space
from unguide_core.training.rollout import Denoiser, Latents, sampled_timesteps

from .model import NAME, DiffusersPredictor

CFG = 4.0
REPEATS, OWN_REPEATS = 1, 8

TOGETHER = 8
"""Prompts that are denoised in one batch."""


@torch.no_grad()
def calibrate(
    adapter: Adapter,
    denoiser: Denoiser,
    base_hash: str,
    prompts: CalibrationPrompts[str],
    text_prompts: CalibrationPrompts[str],
    shape: Sequence[int],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Calibration:
    """Returns the calibration of an adapter for the base model that it was trained on.

    Args:
        denoiser: of the base model, with the adapter within `denoiser.predict.adapted()`; it knows the prompts.
        text_prompts: for the text stage, which needs no evaluations.
        base_hash: identifies the base model's weights; the calibration holds where nothing patches them.
        shape: of one latent, [C, H, W].
        seed: of the noise.
    Raises: ValueError if there are too few prompts, or the adapter has no influence on its concept.
    """
    generator = torch.Generator().manual_seed(seed)

    def probe(asked: Sequence[Asked[str]]) -> Iterator[Probed]:
        for start in range(0, len(asked), TOGETHER):
            batch = asked[start : start + TOGETHER]
            counts = [one.repeats for one in batch]
            noise = torch.cat([torch.randn((count, *shape), generator=generator) for count in counts]).to(device)
            texts = [one.prompt for one in batch for _ in range(one.repeats)]
            found = [
                (sigma, {name: value.split(counts) for name, value in values.items()})
                for sigma, values in _probed(denoiser, texts, prompts.own, noise)
            ]
            for i, one in enumerate(batch):
                yield [
                    (sigma, {index: {name: value[i] for name, value in values.items()} for index in one.adapters})
                    for sigma, values in found
                ]

    levels = calibrated_levels(
        [prompts], probe, repeats=REPEATS, own_repeats=OWN_REPEATS, minimum_others=MINIMUM_OTHERS
    )
    assert isinstance(denoiser.predict, DiffusersPredictor)
    text = calibrate_text(denoiser.predict, text_prompts)
    image = image_probe(denoiser, prompts, shape, generator, device)
    return Calibration(base_hash, adapter.signature, tuple(shape), CFG, OWN_REPEATS, levels[0], text, image)


@torch.no_grad()
def image_probe(
    denoiser: Denoiser,
    prompts: CalibrationPrompts[str],
    shape: Sequence[int],
    generator: torch.Generator,
    device: torch.device | str,
) -> ImageProbe | None:
    """Returns the probe of the image stage, fitted to images of the base model; None where none tells them apart.

    Args: as of `calibrate`; the empty prompt is left out of the others: it generates every concept now and then.
    Raises: ValueError for features that are not finite.
    """
    others = [text for text in prompts.others if text != denoiser.neutral]
    asked = (images_of((prompts.own, *prompts.concept), CONCEPT_IMAGES), images_of(others, OTHER_IMAGES))
    if not all(asked):
        return None
    groups = [
        _features(denoiser, [text for text, count in group for _ in range(count)], shape, generator, device)
        for group in asked
    ]
    return fit_image_probe(*groups)


def _features(
    denoiser: Denoiser, texts: list[str], shape: Sequence[int], generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """Features of one image of each prompt, [images, F], on the CPU."""
    assert isinstance(denoiser.predict, DiffusersPredictor)
    start, noise = (torch.randn((len(texts), *shape), generator=generator).to(device) for _ in range(2))
    images = denoiser.rollout(start, sampled_timesteps(IMAGE_STEPS), 0.0, texts, CFG).latent
    timestep = int((denoiser.sigmas - SIGMA).abs().argmin())
    sigma = float(denoiser.sigmas[timestep])
    found: list[Tensor] = []
    hook = denoiser.predict.unet.mid_block.register_forward_hook(
        lambda module, inputs, hidden: found.append(image_features(hidden).cpu())
    )
    try:
        times = torch.full((len(texts),), timestep, device=device)
        denoiser.eps(from_sigma_space(images + sigma * noise, sigma), times, [denoiser.neutral] * len(texts))
    finally:
        hook.remove()
    return torch.cat(found)[-len(texts) :]  # where memory ran out, all were computed again


@torch.no_grad()
def calibrate_text(predictor: DiffusersPredictor, prompts: CalibrationPrompts[str]) -> TextCalibration | None:
    """Returns the calibration of the text stage.

    None where a layer of the adapter reads more than text, and where the concept's own prompt is the only one with it.

    Args:
        predictor: of the base model with the adapter; it knows the prompts.
    Raises: ValueError if there are too few prompts, or the adapter does not change its concept's text.
    """
    tuned = {name: module for name, module in predictor.unet.named_modules() if hasattr(module, "lora_A")}
    if not prompts.concept or not all(name.endswith((".attn2.to_k", ".attn2.to_v")) for name in tuned):
        return None
    norms = [float(module.base_layer.weight.float().norm()) for module in tuned.values()]
    layers = [
        LowRank(module.lora_A[NAME].weight.float(), module.lora_B[NAME].weight.float(), module.scaling[NAME])
        for module in tuned.values()
    ]
    own, *concept = (predictor.encoded[text].states.float() for text in (prompts.own, *prompts.concept))
    others = [predictor.encoded[text].states.float() for text in prompts.others]
    return calibrated_text(text_map(layers, norms), own, concept, others)


def _probed(
    denoiser: Denoiser, texts: Sequence[str], own: str, noise: Tensor
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Denoises prompts with the base model; yields the statistics' values, [B], before each of `PROBED_STEPS`."""
    timesteps, count = sampled_timesteps(STEPS)[: PROBED_STEPS[-1] + 1], len(noise)
    visited = denoiser.rollout(noise, timesteps, 0.0, texts, CFG).visited
    at = Latents.joined([visited[step * count : (step + 1) * count] for step in PROBED_STEPS])
    with denoiser.predict.adapted():
        adapted = denoiser.eps(at.z, at.timesteps, at.prompts)
    references = [denoiser.neutral] * len(at) + [own] * len(at)
    neutral, concept = denoiser.eps(at.z.repeat(2, 1, 1, 1), at.timesteps.repeat(2), references).chunk(2)
    values = {"influence": influence(at.eps, adapted), "alignment": alignment(at.eps, neutral, concept)}
    for i, step in enumerate(PROBED_STEPS):
        rows = slice(i * count, (i + 1) * count)
        yield float(denoiser.sigmas[timesteps[step]]), {name: value[rows] for name, value in values.items()}
