"""A function that runs on a loaded model: the host loads it and processes the prompts, as for a sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import comfy.samplers
import torch

Result = TypeVar("Result")


class Task(comfy.samplers.Sampler, Generic[Result]):
    """A function in a sampler's place, which `CFGGuider.sample` calls after loading the model; see `run_on_model`.

    No image comes of it, unless it `trains` and shows previews.
    """

    def __init__(self, function: Callable[[Any, dict[str, Any], torch.Size], Result], trains: bool = False):
        self.function, self.trains = function, trains
        self.result: Result | None = None

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """Return the noise unchanged; what the function returned is in `result`."""
        self.result = self.function(model_wrap, extra_args, noise.shape[1:])
        return noise


def run_on_model(
    guider: Any,
    latent: torch.Tensor,
    seed: int,
    function: Callable[[Any, dict[str, Any], torch.Size], Result],
    trains: bool = False,
) -> Result:
    """Return what `function(guider, extra_args, shape)` returns, called with the guider's model loaded.

    Args:
        guider: a host `CFGGuider` with its conditionings set.
        latent: whose shape is used, [B, C, ...]; the function gets the shape of one sample, [C, ...], which is the
            shape that the model's latents have.
        function: called with the guider, its conditionings processed, and a sampling function's `extra_args`.
        trains: whether it trains an adapter.
    """
    task = Task(function, trains)
    zeros = torch.zeros_like(latent[:1])
    guider.sample(zeros, zeros, task, torch.ones(2), seed=seed)
    return task.result  # type: ignore[return-value]
