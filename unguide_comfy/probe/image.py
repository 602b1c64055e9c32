"""Whether an image shows a concept, read from the base model: the evidence of the image stage.

The base model is asked for the empty prompt, so that all it can tell comes from the image. `unguide_core.probe.image`
knows what the features mean; this module knows how the host computes them, and makes the images to fit a probe to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import comfy.samplers
import torch

from ...unguide_core.probe.calibration import CalibrationPrompts
from ...unguide_core.probe.image import (
    CONCEPT_IMAGES,
    OTHER_IMAGES,
    SIGMA,
    STEPS,
    ImageProbe,
    fit_image_probe,
    images_of,
)
from ..blend.features import is_readable
from ..lora.load import Conditioning
from .batch import alike, batches, joined
from .conds import Context, Entry, is_everywhere, same_text
from .rollout import noise_at, rollout, schedule


def row_of(conds: Sequence[Sequence[Entry] | None], neutral: Conditioning) -> int | None:
    """Return which of a run's conditionings is the neutral prompt and nothing besides: no area, no ControlNet."""
    for number, entries in enumerate(conds):
        if entries is None or not is_everywhere(entries) or not same_text(entries[0], neutral):
            continue
        if entries[0].get("control") is None and "gligen" not in entries[0]:
            return number
    return None


def read_images(
    context: Context, neutral: Conditioning, latents: torch.Tensor, seed: int, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """Return features of images, [B, F]: one model evaluation each.

    Args:
        latents: of the images, as the model knows them, [B, C, ...].
        seed: of noise that all images share.
        noise: unit noise in its place, as `latents`.
    """
    latents = latents.to(context.device, torch.float32)
    noise = _unit_noise(seed, latents.shape[1:]) if noise is None else noise
    noise = noise.to(latents).expand_as(latents)
    entry = {name: value for name, value in context.prompt[0].items() if name not in ("control", "gligen")}
    entries = context.retargeted(entry, neutral, latents, seed)
    noisy = context.model.model_sampling.noise_scaling(torch.tensor(SIGMA, device=noise.device), noise, latents, False)
    sigma = torch.full((len(latents),), SIGMA, device=context.device)
    with context.run.predict_with(()), context.run.read() as read:
        comfy.samplers.calc_cond_batch(context.model, [entries], noisy, sigma, context.model_options)
    features = read.of(0)
    if features is None:
        raise ValueError(
            f"the features of {type(context.model).__name__} cannot be read: a patch skips its middle block; remove "
            "the patch, or turn check_image off"
        )
    return features


def fitted_probes(
    context: Context,
    prompts: Sequence[CalibrationPrompts[Conditioning]],
    neutral: Conditioning,
    shape: Sequence[int],
    seed: int,
    on_prompt: Callable[[int, int], None],
) -> list[ImageProbe | None]:
    """Return an image probe for each adapter's concept; None where none tells the concept from other things.

    The base model generates the images. Adapters may share prompts, whose images are generated once. The neutral
    prompt is never among the others, because it generates every concept now and then.

    Args:
        shape: of one latent, [C, ...].
        on_prompt: called with the number of prompts done and their total, after each; may raise to stop.
    """
    if not is_readable(context.model):
        return [None] * len(prompts)
    groups = [
        [images_of((of.own, *of.concept), CONCEPT_IMAGES), images_of(_unlike(of.others, neutral), OTHER_IMAGES)]
        for of in prompts
    ]
    wanted: dict[int, tuple[Conditioning, int]] = {}
    for conditioning, count in (one for pair in groups for group in pair for one in group):
        wanted[id(conditioning)] = conditioning, max(count, wanted.get(id(conditioning), (None, 0))[1])
    number = {key: place for place, key in enumerate(wanted)}
    features = _features(context, list(wanted.values()), neutral, shape, seed, on_prompt)

    def of_group(group: Sequence[tuple[Conditioning, int]]) -> torch.Tensor:
        return torch.cat([features[number[id(conditioning)]][:count] for conditioning, count in group])

    return [fit_image_probe(*map(of_group, pair)) if all(pair) else None for pair in groups]


def _features(
    context: Context,
    wanted: Sequence[tuple[Conditioning, int]],
    neutral: Conditioning,
    shape: Sequence[int],
    seed: int,
    on_prompt: Callable[[int, int], None],
) -> list[torch.Tensor]:
    """Features of images that the base model generates, so many for each prompt, [count, F], on the CPU.

    Prompts of one shape are generated in one batch; each has noise of its own, which does not depend on the batch.
    """
    sigmas, features = schedule(context, STEPS), []
    asked = [(conditioning, count, (seed + number) % 2**63) for number, (conditioning, count) in enumerate(wanted, 1)]
    for batch in batches(asked, lambda one: one[1], lambda one, other: alike(one[0], other[0])):
        latent = torch.cat([noise_at(context, float(sigmas[0]), (count, *shape), own) for _, count, own in batch])
        text = joined([(conditioning, count) for conditioning, count, _ in batch])
        images = rollout(context, latent, sigmas, context.retargeted(context.prompt[0], text, latent, seed), seed)
        noise = torch.cat([_unit_noise(own, shape).expand(count, *shape) for _, count, own in batch])
        found = read_images(context, neutral, images, seed, noise).cpu()
        for features_of_prompt in found.split([count for _, count, _ in batch]):
            features.append(features_of_prompt)
            on_prompt(len(features), len(asked))
    return features


def _unit_noise(seed: int, shape: Sequence[int]) -> torch.Tensor:
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))


def _unlike(prompts: Sequence[Conditioning], neutral: Conditioning) -> list[Conditioning]:
    """The prompts but the neutral one."""
    return [p for p in prompts if p[0][0].shape != neutral[0][0].shape or not torch.equal(p[0][0], neutral[0][0])]
