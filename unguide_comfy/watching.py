"""The sampling run itself as the probe: its first steps with the base model are the picture's, and are looked at once.

A `CALC_COND_BATCH` wrapper sees every guided prediction. At the first one at or below the deciding noise level it has
the base model's predictions for the prompt and, as a rule, for the neutral prompt at hand; the concept's costs one more
evaluation. A run that detects nothing goes on as it would have without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .blending import RUN, Run
from .looking import SIGMA_TOLERANCE, Context, Look, is_everywhere

Decide = Callable[[Callable[..., Look]], None]


class Restart(Exception):
    """Raised through the sampler: the run shall begin again, now that its weights are known."""


class Watch:
    """Waits for the deciding noise level, then calls `decide` once with a function that makes looks at that latent.

    Args:
        context: the sampling run.
        sigma: the deciding noise level; a schedule that begins below it is looked at in its first step.
        decide: called with a function (settings, neutral) -> `Look`; sets the run's weights, may raise `Restart`.
    """

    def __init__(self, context: Context, sigma: float, decide: Decide):
        self.context, self.sigma, self.decide = context, sigma, decide

    def due(self, sigma: torch.Tensor) -> bool:
        """Whether a prediction at this noise level is the one to look at."""
        return float(sigma.max()) <= self.sigma * (1.0 + SIGMA_TOLERANCE / 2.0)

    def look(self, conds: Sequence[Any], out: Sequence[torch.Tensor], x: torch.Tensor, sigma: torch.Tensor) -> None:
        """Decides at this latent, with the predictions `out` for `conds` at hand: the base model's, if none blends."""
        blending = bool(self.context.run.active())
        known = {
            id(entries[0]): prediction
            for entries, prediction in zip(conds, out, strict=True)
            if not blending and entries is not None and len(entries) == 1 and is_everywhere(entries[0])
        }
        level = float(sigma[0])
        self.decide(lambda settings, neutral: Look(self.context, settings, x, level, neutral, known))


def watched_conditionals(
    executor: Callable[..., list[torch.Tensor]],
    model: Any,
    conds: Sequence[Any],
    x: torch.Tensor,
    sigma: torch.Tensor,
    model_options: dict[str, Any],
) -> list[torch.Tensor]:
    """The predictions for all conditionings; the host's signature of a `CALC_COND_BATCH` wrapper."""
    out = executor(model, conds, x, sigma, model_options)
    run: Run | None = model_options.get("transformer_options", {}).get(RUN)
    watch: Watch | None = None if run is None else run.watch
    if run is not None and watch is not None and watch.due(sigma):
        run.watch = None
        watch.look(conds, out, x, sigma)
    return out
