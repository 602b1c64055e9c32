"""Measures how a trained adapter's scores spread, as the node does at the end of its training.

Prompts with and without the concept are denoised by the base model, and looked at on the way, at the noise levels at
which a gate may look. See `unguide_core.calibration` for what follows from the scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unguide_core.adapter import Adapter
from unguide_core.calibration import LOOKS, STEPS, Calibration, Level
from unguide_core.probe import alignment, influence, influence_map
from unguide_core.training import Predictor, Sampler, sampled_timesteps

CFG = 4.0
OWN_REPEATS = 8

Asked = tuple[str, Sequence[str], Sequence[str], str]
"""Prompts: the concept's own, others with it, others without it, the empty one."""


@torch.no_grad()
def calibrate(
    predict: Predictor,
    adapter: Adapter,
    base_hash: str,
    prompts: Asked,
    shape: Sequence[int],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rows: int = 16,
) -> Calibration:
    """Returns the calibration of an adapter for the base model that it was trained on.

    Args:
        predict: the base model, with the adapter within `predict.adapted()`.
        base_hash: that names the base model's weights; the calibration holds where nothing patches them.
        prompts: all known to `predict`.
        shape: of one latent, [C, H, W].
        seed: of the noises, one for each prompt and `OWN_REPEATS` for the concept's own.
        rows: computed at once, at most.
    Raises: ValueError if the adapter has no influence on its concept.
    """
    own, concept, others, neutral = prompts
    texts = [*[own] * OWN_REPEATS, *concept, *others]
    sampler = Sampler(predict, neutral, rows)
    noise = torch.randn((len(texts), *shape), generator=torch.Generator().manual_seed(seed)).to(device)
    values: list[dict[str, Tensor]] = []
    sigmas: list[float] = []

    steps = sampled_timesteps(STEPS)[: LOOKS[-1] + 1]
    wanted = {steps[step] for step in LOOKS}

    def look(z: Tensor, times: Tensor, base: Tensor) -> None:
        if int(times[0]) not in wanted:
            return
        with predict.adapted():
            adapted = sampler.eps(z, times, texts)
        empty, pulled = (sampler.eps(z, times, [prompt] * len(texts)) for prompt in (neutral, own))
        found = {
            "influence": influence(base, adapted),
            "patch": influence_map(base, adapted).flatten(1).amax(dim=1),
            "alignment": alignment(base, empty, pulled),
        }
        values.append({name: value.cpu() for name, value in found.items()})
        sigmas.append(float(sampler.sigmas[int(times[0])]))

    sampler.trajectory(noise, steps, 0.0, texts, CFG, look)
    sizes = [OWN_REPEATS, len(concept), len(others)]
    levels = {
        name: tuple(
            Level.of(name, sigma, *(part.tolist() for part in found[name].split(sizes)))
            for sigma, found in zip(sigmas, values, strict=True)
        )
        for name in values[0]
    }
    return Calibration(base_hash, f"{adapter.signature}*1", tuple(shape), CFG, OWN_REPEATS, levels)
