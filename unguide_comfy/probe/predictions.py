"""Predictions at one latent, by the base model and by adapters, and the raw values of the statistics.

Everything that is wanted at a latent is predicted together, and once: conditionings of the same shape share a forward,
whichever adapter computes them. This module knows neither where the latent comes from nor what a value means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import comfy.samplers
import torch

from ...unguide_core.probe import alignment, influence, influence_map
from ..lora.load import Conditioning
from .conds import Context, Entry, besides_text, everywhere, same_text


@dataclass(frozen=True)
class Subject:
    """A prompt to predict for: `entries` as the host has them, and the `key` that tells it from others."""

    key: tuple[object, ...]
    entries: tuple[Entry, ...]


Wanted = tuple[Subject, int | None]
"""A prediction: for which prompt, and by which adapter of the run; None for the base model."""


class Predictions:
    """x0 predictions at one latent.

    Args:
        context: the sampling run.
        latent: [B, C, ...].
        sigma: its noise level, one number or one per sample, [B].
        known: predictions of the base model at this latent that are there already, by the id of the entry.
        erasing: whether adapters act at the strength that they erase with, and not at 1, as the gate probes.
    """

    def __init__(
        self,
        context: Context,
        latent: torch.Tensor,
        sigma: float | torch.Tensor,
        known: Mapping[int, torch.Tensor] | None = None,
        erasing: bool = False,
    ):
        self.context, self.latent, self.erasing = context, latent, erasing
        self.sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latent.device).expand(len(latent))
        self._subjects: dict[tuple[object, ...], Subject] = {}
        self._predicted: dict[tuple[tuple[object, ...], int | None], torch.Tensor] = {
            (("prompt", key), None): prediction for key, prediction in (known or {}).items()
        }

    @property
    def level(self) -> float:
        """The noise level, the highest of all samples'."""
        return float(self.sigma.max())

    def prompt(self, entry: Entry) -> Subject:
        """Return an entry of the prompt, everywhere and at all times."""
        return Subject(("prompt", id(entry)), (everywhere(entry),))

    def reference(self, entry: Entry, conditioning: Conditioning) -> Subject:
        """Return another prompt in an entry's place; one for all entries that differ only in text."""
        for other in self.context.negative:
            known = (("prompt", id(other)), None) in self._predicted
            if known and same_text(other, conditioning) and besides_text(other) == besides_text(entry):
                return self.prompt(other)
        key = ("reference", id(conditioning), *besides_text(entry))
        if key not in self._subjects:
            entries = self.context.retargeted(entry, conditioning, self.latent, seed=0)
            self._subjects[key] = Subject(key, tuple(entries))
        return self._subjects[key]

    def fetch(self, wanted: Iterable[Wanted]) -> None:
        """Predict what is wanted and not there yet."""
        missing = {(subject.key, adapter): (subject, adapter) for subject, adapter in wanted}
        missing = {key: one for key, one in missing.items() if key not in self._predicted}
        # with little memory no more at once than guided sampling itself, which takes two
        together = max(1, len(missing) if self.context.run.batchable else 2)
        keys = list(missing)
        for start in range(0, len(keys), together):
            part = keys[start : start + together]
            self._predicted.update(zip(part, self._predict([missing[key] for key in part]), strict=True))

    def _predict(self, wanted: Sequence[Wanted]) -> list[torch.Tensor]:
        entries = [list(subject.entries) for subject, _ in wanted]
        context = self.context
        with context.run.predict_with([adapter for _, adapter in wanted], erasing=self.erasing):
            return comfy.samplers.calc_cond_batch(
                context.model, entries, self.latent, self.sigma, context.model_options
            )

    def predicted(self, subject: Subject, adapter: int | None = None) -> torch.Tensor:
        """Return the conditional prediction of the base model, or of the model with an adapter, [B, C, ...]."""
        self.fetch([(subject, adapter)])
        return self._predicted[subject.key, adapter]

    def aligned(self, entry: Entry, concept: Conditioning, neutral: Conditioning) -> list[Wanted]:
        """Return what `alignment` takes."""
        subjects = (self.prompt(entry), self.reference(entry, neutral), self.reference(entry, concept))
        return [(subject, None) for subject in subjects]

    def alignment(self, entry: Entry, concept: Conditioning, neutral: Conditioning) -> torch.Tensor:
        """Return how far the prompt pulls where the concept's own prompt pulls it, [B] (`unguide_core.probe`)."""
        wanted = self.aligned(entry, concept, neutral)
        self.fetch(wanted)
        return alignment(*(self.predicted(*one) for one in wanted))

    def influence(self, subject: Subject, adapter: int) -> torch.Tensor:
        """Return the adapter's influence on a prompt, [B], in eps units: that on x0, divided by sigma."""
        return influence(self.predicted(subject), self.predicted(subject, adapter)) / self.sigma

    def influence_map(self, subject: Subject, adapter: int) -> torch.Tensor:
        """Return where the adapter changes the prediction, [B, H, W], in eps units (`unguide_core.probe`)."""
        found = influence_map(self.predicted(subject), self.predicted(subject, adapter))
        return found / self.sigma[:, None, None]
