"""An adapter's change on its concept's own prompt, added to the prediction of any prompt that was detected.

    base(prompt) + (1 - weight) (adapted(concept) - base(concept))

Text can be optimised so that an adapter hardly changes what is predicted for it. What the adapter changes for the
concept's own prompt, at the same latent, still leads away from the concept. It costs two more evaluations a step for
what was detected, and none for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..blend.state import is_all
from ..probe.conds import Context
from ..probe.predictions import Predictions, Subject


class ConceptDelta:
    """Adds the change of some adapters to a sampling run's guided predictions.

    Args:
        context: the sampling run; its run's `outside` says which adapters.
    """

    def __init__(self, context: Context):
        self.context = context
        self._subjects: dict[tuple[int, int], Subject] = {}

    def added(
        self, conds: Sequence[Any], out: Sequence[torch.Tensor], x: torch.Tensor, sigma: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the predictions `out` for `conds`, x0 [B, C, ...] each, those of the prompt with the change added."""
        run = self.context.run
        weights = {i: run.weights[i] for i in sorted(run.outside) if not is_all(run.weights[i], 1.0)}
        if not weights:
            return list(out)
        by_sample = {i: torch.as_tensor(weight).to(x).expand(len(x)) for i, weight in weights.items()}
        rows = torch.stack([each != 1.0 for each in by_sample.values()]).any(dim=0).nonzero().flatten()
        predictions = Predictions(self.context, x[rows], sigma.expand(len(x))[rows], erasing=True)
        subjects = {i: self._concept(i, predictions) for i in by_sample}
        predictions.fetch((subject, adapter) for i, subject in subjects.items() for adapter in (None, i))
        shift = torch.zeros_like(x)
        for i, subject in subjects.items():
            factor = (1.0 - by_sample[i][rows]).view(-1, *[1] * (x.ndim - 1))
            shift[rows] += factor * (predictions.predicted(subject, i) - predictions.predicted(subject))
        prompt = {entry["uuid"] for entry in self.context.prompt}  # context windows copy the entries
        return [
            prediction + shift if any(entry["uuid"] in prompt for entry in entries or ()) else prediction
            for entries, prediction in zip(conds, out, strict=True)
        ]

    def _concept(self, index: int, predictions: Predictions) -> Subject:
        """The concept's own prompt, processed once for each number of samples."""
        key = index, len(predictions.latent)
        if key not in self._subjects:
            concept = self.context.run.loras[index].concept
            assert concept is not None
            self._subjects[key] = predictions.reference(self.context.prompt[0], concept)
        return self._subjects[key]
