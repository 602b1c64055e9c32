"""A look at one latent: what the base model and the adapters predict there, and the statistics' raw values.

Everything that is wanted of a look is predicted at once, and once: conditionings that agree in shape share a forward,
whatever adapter computes them. Knows neither where the latent comes from nor what a value means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import comfy.samplers
import torch

from ..unguide_core.probe import alignment, influence, influence_map
from .context import Context, Entry, besides_text, everywhere, same_text
from .erasure import Conditioning, ErasureLora


@dataclass(frozen=True)
class Subject:
    """A prompt to predict for: `entries` as the host has them, `key` telling it from the others of a look."""

    key: tuple[object, ...]
    entries: tuple[Entry, ...]


Wanted = tuple[Subject, int | None]
"""A prediction: for which prompt, and by which adapter of the run; None for the base model."""


class Look:
    """Predictions at one latent.

    Args:
        context: the sampling run.
        latent: [B, C, ...].
        sigma: its noise level, one number or one per sample, [B].
        known: predictions of the base model at this latent that are there already, by the id of the entry.
    """

    def __init__(
        self,
        context: Context,
        latent: torch.Tensor,
        sigma: float | torch.Tensor,
        known: Mapping[int, torch.Tensor] | None = None,
    ):
        self.context, self.latent = context, latent
        self.sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latent.device).expand(len(latent))
        self._subjects: dict[tuple[object, ...], Subject] = {}
        self._predicted: dict[tuple[tuple[object, ...], int | None], torch.Tensor] = {
            (("prompt", key), None): prediction for key, prediction in (known or {}).items()
        }

    @property
    def level(self) -> float:
        """The noise level, the highest of all samples'."""
        return float(self.sigma.max())

    # what to predict for

    def prompt(self, entry: Entry) -> Subject:
        """An entry of the prompt, everywhere and at all times."""
        return Subject(("prompt", id(entry)), (everywhere(entry),))

    def reference(self, entry: Entry, conditioning: Conditioning) -> Subject:
        """Another prompt in place of an entry's; one for all entries alike but in text."""
        for other in self.context.negative:
            known = (("prompt", id(other)), None) in self._predicted
            if known and same_text(other, conditioning) and besides_text(other) == besides_text(entry):
                return self.prompt(other)
        key = ("reference", id(conditioning), *besides_text(entry))
        if key not in self._subjects:
            entries = self.context.retargeted(entry, conditioning, self.latent, seed=0)
            self._subjects[key] = Subject(key, tuple(entries))
        return self._subjects[key]

    # predictions

    def fetch(self, wanted: Iterable[Wanted]) -> None:
        """Predicts what is wanted and not there yet."""
        missing = {(subject.key, adapter): (subject, adapter) for subject, adapter in wanted}
        missing = {key: one for key, one in missing.items() if key not in self._predicted}
        # with memory low no more at once than guided sampling itself, which takes two
        together = len(missing) if self.context.run.batchable else 2
        keys = list(missing)
        for start in range(0, len(keys), max(1, together)):
            part = keys[start : start + together]
            self._predicted.update(zip(part, self._predict([missing[key] for key in part]), strict=True))

    def _predict(self, wanted: Sequence[Wanted]) -> list[torch.Tensor]:
        """x0 predictions, [B, C, ...] each."""
        entries = [list(subject.entries) for subject, _ in wanted]
        context = self.context
        with context.run.predicting([adapter for _, adapter in wanted]):
            return comfy.samplers.calc_cond_batch(
                context.model, entries, self.latent, self.sigma, context.model_options
            )

    def predicted(self, subject: Subject, adapter: int | None = None) -> torch.Tensor:
        """The conditional x0 prediction of the base model, or of the model that an adapter makes of it."""
        self.fetch([(subject, adapter)])
        return self._predicted[subject.key, adapter]

    # raw values of the statistics

    def wanted_for_alignment(self, entry: Entry, lora: ErasureLora, neutral: Conditioning) -> list[Wanted]:
        assert lora.concept is not None
        subjects = (self.prompt(entry), self.reference(entry, neutral), self.reference(entry, lora.concept))
        return [(subject, None) for subject in subjects]

    def alignment(self, entry: Entry, lora: ErasureLora, neutral: Conditioning) -> torch.Tensor:
        """How far the prompt pulls where the concept's own prompt pulls, [B]; see `unguide_core.probe.alignment`."""
        wanted = self.wanted_for_alignment(entry, lora, neutral)
        self.fetch(wanted)
        return alignment(*(self.predicted(*one) for one in wanted))

    def influence(self, subject: Subject, adapter: int) -> torch.Tensor:
        """The adapter's influence over the whole picture, [B], in eps units: that of x0, divided by sigma."""
        return influence(self.predicted(subject), self.predicted(subject, adapter)) / self.sigma

    def map(self, subject: Subject, adapter: int) -> torch.Tensor:
        """Where the adapter changes the prediction, [B, H, W], in eps units; see `unguide_core.probe.influence_map`."""
        found = influence_map(self.predicted(subject), self.predicted(subject, adapter))
        return found / self.sigma[:, None, None]
