"""The sampling run itself as the probe: its first steps with the base model are the picture's, and are looked at.

A `CALC_COND_BATCH` wrapper sees every guided prediction. At the first one at or below the deciding noise level it has
the base model's predictions for the prompt and, as a rule, for the neutral prompt at hand. A run that detects nothing
goes on as it would have without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .blending import RUN, Run, Weight
from .context import Context, is_everywhere
from .looking import Look

# a schedule seldom has a step at just the level asked for: one a little above it will do
TOLERANCE = 1.05


class Restart(Exception):
    """Raised through the sampler: the run shall begin again, now that its weights are known."""


@dataclass
class Watch:
    """Waits for the deciding noise level, then calls `decide` with a look at that latent; again later, if asked to.

    Args:
        context: the sampling run.
        sigmas: the run's noise levels.
        sigma: the deciding noise level; a schedule that begins below it is looked at in its first step.
        again: steps after which to look again; 0 looks once.
        decide: sets the run's weights, may raise `Restart`; returns whether there is anything left to decide.
    """

    context: Context
    sigmas: torch.Tensor
    sigma: float
    again: int
    decide: Callable[[Look, int], bool]
    next_step: int | None = None

    def step_of(self, sigma: torch.Tensor) -> int:
        """The run's step that a prediction at a noise level belongs to, from 0."""
        return max(0, int((self.sigmas.to(sigma.device) >= float(sigma.max()) * (1.0 - 1e-4)).sum()) - 1)

    def due(self, sigma: torch.Tensor) -> bool:
        """Whether a prediction at this noise level is the one to look at."""
        if self.next_step is None:
            return float(sigma.max()) <= self.sigma * TOLERANCE
        return self.step_of(sigma) >= self.next_step

    def look(self, conds: Sequence[Any], out: Sequence[torch.Tensor], x: torch.Tensor, sigma: torch.Tensor) -> bool:
        """Decides at this latent, with the predictions `out` for `conds` at hand: the base model's, if none blends.

        Returns: whether a weight has changed.
        """
        run, step = self.context.run, self.step_of(sigma)
        before, self.next_step = _plain(run.weights), step + self.again
        blending = bool(run.active())
        known = {
            id(entries[0]): prediction
            for entries, prediction in zip(conds, out, strict=True)
            if not blending and is_everywhere(entries)
        }
        undecided = self.decide(Look(self.context, x, sigma, known), step)
        if not (undecided and self.again):
            run.watch = None
        return _plain(run.weights) != before


def watched_conditionals(
    executor: Callable[..., list[torch.Tensor]],
    model: Any,
    conds: Sequence[Any],
    x: torch.Tensor,
    sigma: torch.Tensor,
    model_options: dict[str, Any],
) -> list[torch.Tensor]:
    """The predictions for all conditionings; the host's signature of a `CALC_COND_BATCH` wrapper.

    What a look finds is erased from this very prediction on, which is then computed anew.
    """

    def predict() -> list[torch.Tensor]:
        return executor(model, conds, x, sigma, model_options)

    out = predict()
    run: Run | None = model_options.get("transformer_options", {}).get(RUN)
    if run is None or run.looking is not None:
        return out
    watch: Watch | None = run.watch
    if watch is not None and watch.due(sigma) and watch.look(conds, out, x, sigma):
        asked_for = run.asked_for
        out = predict() if run.active() else out
        run.asked_for = asked_for
    return out if run.displace is None else run.displace(conds, out, x, sigma)


def _plain(weights: Sequence[Weight]) -> list[Any]:
    """Weights as numbers, to compare."""
    return [torch.as_tensor(weight).tolist() for weight in weights]
