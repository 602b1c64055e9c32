"""An adapter's displacement on its concept's own prompt, added to the prediction of any prompt found to carry it.

    base(prompt) + (1 - weight) (adapted(concept) - base(concept))

Text can be optimised so that an adapter hardly changes what is predicted for it; what the adapter does to the concept's
own prompt, at the same latent, still leads away from the concept. Two more evaluations a step for what was found, none
for the rest. Knows no gate: it reads the weights off the `Run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .blending import is_all
from .context import Context
from .erasure import ErasureLora
from .looking import Look, Subject

PROMPT, CONCEPT = "prompt", "concept"
DISPLACEMENTS = (PROMPT, CONCEPT)


@dataclass
class Displacing:
    """Adds displacements to the guided predictions of a sampling run.

    Args:
        context: the sampling run; its run's `elsewhere` says which adapters.
        loras: of the run, by number.
    """

    context: Context
    loras: Sequence[ErasureLora]
    _subjects: dict[tuple[int, int], Subject] = field(default_factory=dict, repr=False)

    def __call__(
        self, conds: Sequence[Any], out: Sequence[torch.Tensor], x: torch.Tensor, sigma: torch.Tensor
    ) -> list[torch.Tensor]:
        """The predictions `out` for `conds`, those of the prompt displaced; x0, [B, C, ...] each."""
        run = self.context.run
        weights = {i: run.weights[i] for i in sorted(run.elsewhere) if not is_all(run.weights[i], 1.0)}
        if not weights:
            return list(out)
        found = {i: torch.as_tensor(weight).to(x).expand(len(x)) for i, weight in weights.items()}
        rows = torch.stack([each != 1.0 for each in found.values()]).any(dim=0).nonzero().flatten()
        look = Look(self.context, x[rows], sigma.expand(len(x))[rows])
        subjects = {i: self._concept(i, look) for i in found}
        look.fetch((subject, adapter) for i, subject in subjects.items() for adapter in (None, i))
        shift = torch.zeros_like(x)
        for i, subject in subjects.items():
            strength = (1.0 - found[i][rows]).view(-1, *[1] * (x.ndim - 1))
            shift[rows] += strength * (look.predicted(subject, i) - look.predicted(subject))
        prompt = {id(entry) for entry in self.context.prompt}
        return [
            prediction + shift if any(id(entry) in prompt for entry in entries or ()) else prediction
            for entries, prediction in zip(conds, out, strict=True)
        ]

    def _concept(self, index: int, look: Look) -> Subject:
        """The concept's own prompt, encoded once for each number of samples."""
        key = index, len(look.latent)
        if key not in self._subjects:
            concept = self.loras[index].concept
            assert concept is not None
            self._subjects[key] = look.reference(self.context.prompt[0], concept)
        return self._subjects[key]
