"""The image stage of one sampling run: whether an image shows a concept, whatever its prompt says.

It reads the start image before the first step (img2img, inpainting; one evaluation), and the run's own image at a late
step, from the row that guidance computes for the empty prompt anyway (none). Where an image shows the concept it is
generated again from more noise, with the adapter's change on the concept's own prompt (`concept_delta`): erasing at the
image's own noise level would leave it. The gate does that; this module says for which samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ...unguide_core.probe import AUTOMATIC, Decision, decide_by
from ...unguide_core.probe.image import ImageProbe, image_statistic
from ..blend.features import Features, is_readable
from ..lora.load import Conditioning, ErasureLora
from ..probe.baseline import valid_calibration
from ..probe.conds import Context, digest
from ..probe.image import read_images, row_of
from ..probe.settings import ALWAYS_CHECK, BEFORE, DURING, NEVER_CHECK, Settings
from ..report.records import ImageCheck
from .steps import IMAGE_SIGMAS, reading_step, starts_from_image, step_of

UNREAD = "no prediction that passed the gate was at a noise level at which images can be read"
UNFINISHED = "the run leaves noise for another run, so its latents are not images yet"


class Shown(Exception):
    """Raised through the sampler: every image of the batch shows a concept, so the run need not be finished."""


class ImageStage:
    """Reads the images of one sampling run.

    Args:
        context: the sampling run.
        loras: the erasure LoRAs, each with its gate's settings; None for one that does not ask for this stage.
    """

    def __init__(self, context: Context, loras: Sequence[tuple[ErasureLora, Settings | None]]):
        self.context = context
        self.checks: list[list[ImageCheck]] = [[] for _ in loras]
        self.notes = [""] * len(loras)
        self.shown: dict[int, torch.Tensor] = {}
        """The samples that were seen to show an erasure LoRA's concept, by its number, [B]."""
        self.erased: dict[int, torch.Tensor] = {}
        """Those of them that are generated again, likewise."""
        self._probes: dict[int, ImageProbe] = {}
        self._neutrals: dict[int, Conditioning] = {}
        self._settings: dict[int, Settings] = {}
        self._sigmas = torch.zeros(1)
        self._step: int | None = None
        self._read: set[int] = set()
        """The erasure LoRAs whose concepts this run has looked for in its images."""
        self.kept: torch.Tensor | None = None
        """Which samples of this run are kept, [B]; None for all. The others were good the first time."""
        for index, (lora, settings) in enumerate(loras):
            if settings is not None and _wanted(settings):
                self._add(index, lora, settings)

    def _add(self, index: int, lora: ErasureLora, settings: Settings) -> None:
        """Take an erasure LoRA's probe, or note what is missing."""
        neutral = settings.neutral if settings.neutral is not None else lora.neutral
        calibration, note = valid_calibration(self.context, lora)
        if not is_readable(self.context.model):
            note = f"images of {type(self.context.model).__name__} cannot be read; those of SD 1.x, 2.x and SDXL can"
        elif calibration is not None and calibration.image is None:
            note = "the adapter's calibration has no image probe; use Calibrate Erasure LoRA"
        elif calibration is not None and (lora.concept is None or neutral is None):
            note = "the concept's and the empty prompt are not encoded: connect a CLIP to Load Erasure LoRA"
        self.notes[index] = note
        if not note:
            assert calibration is not None
            assert calibration.image is not None
            assert neutral is not None
            self._probes[index], self._neutrals[index] = calibration.image, neutral
            self._settings[index] = settings

    # reading

    def read_start(self, sigmas: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor | None) -> None:
        """Read the start images of a run that keeps something of them.

        Noise that is switched off continues another run, whose latent is not an image yet.
        """
        if not self._probes or latent_image is None or not bool(latent_image.any()) or not bool(noise.any()):
            return
        sigma_max = float(self.context.model.model_sampling.sigma_max)
        if self.context.denoise_mask is not None or starts_from_image(sigmas, sigma_max, latent_image):
            self._read_latents(list(self._probes), latent_image, start=True)

    def read_finished(self, latent: torch.Tensor) -> None:
        """Read the finished images, where they were not read on the way and the settings ask for it."""
        asked = [i for i, s in self._settings.items() if s.check_image == ALWAYS_CHECK or s.resist_adversarial]
        if self.is_finished:
            self._read_latents([index for index in asked if index not in self._read], latent, start=False)

    def _read_latents(self, indices: Sequence[int], latents: torch.Tensor, *, start: bool) -> None:
        features: dict[Any, torch.Tensor] = {}
        with self.context.run.evaluations.of("probe"):
            for index in indices:
                neutral = self._neutrals[index]
                key = digest(neutral) or id(neutral)
                if key not in features:
                    features[key] = read_images(self.context, neutral, latents, self._settings[index].seed)
                self._take(index, features[key], ImageCheck(start, (), (), ()))

    def watch(self, sigmas: torch.Tensor) -> None:
        """Set the step of a run through these noise levels at which its images are read."""
        self._sigmas, self._step, self._read = sigmas, reading_step(sigmas), set()
        self.skip(UNREAD if self.is_finished else UNFINISHED)

    def skip(self, note: str) -> None:
        """Note why a run's images are not read."""
        for index in self._probes:
            self.notes[index] = note

    @property
    def is_finished(self) -> bool:
        """Whether the run ends with images, and does not leave noise for another run."""
        return float(self._sigmas[-1]) <= IMAGE_SIGMAS[1]

    @contextmanager
    def reading(self, sigma: torch.Tensor) -> Iterator[Features | None]:
        """Within the block the run's forwards leave features behind, if it is time to read the images."""
        due = self._step is not None and step_of(self._sigmas, float(sigma.max())) == self._step
        if not due or self._read.issuperset(self._probes):
            yield None
            return
        with self.context.run.read() as features:
            yield features

    def read(self, features: Features, conds: Sequence[Any], sigma: torch.Tensor) -> None:
        """Read the run's images from the features of its row for the empty prompt, if it has one.

        Raises: Shown if every image shows a concept and has not been generated again for it.
        """
        for index, neutral in self._neutrals.items():
            row = row_of(conds, neutral) if index not in self._read else None
            of_row = None if row is None else features.of(row)
            if of_row is not None:
                self._take(index, of_row, ImageCheck(False, (), (), (), self._step, float(sigma.max())))
            elif index not in self._read:
                self.notes[index] = "the run has no row for the empty prompt to read the image from"
        left = self.left(1)
        if left is not None and bool(left.all() if self.kept is None else left[self.kept].all()):
            raise Shown

    def _take(self, index: int, features: torch.Tensor, check: ImageCheck) -> None:
        """Take over what one reading says of the samples that are kept."""
        read = self._probes[index].score(features).tolist()
        kept = [True] * len(read) if self.kept is None else self.kept.tolist()
        scores = tuple(score if keep else None for score, keep in zip(read, kept, strict=True))
        shown = tuple(score is not None and image_statistic(score).detected for score in scores)
        erased = self.erased.get(index, torch.zeros(len(read), dtype=torch.bool))
        again = tuple((erased & torch.tensor(kept)).tolist())
        self.checks[index].append(replace(check, scores=scores, shown=shown, again=again))
        if any(shown):
            self.shown[index] = self.shown.get(index, torch.zeros_like(erased)) | torch.tensor(shown)
        if not check.start:
            self.notes[index] = ""
            self._read.add(index)

    # what follows

    def left(self, samples: int) -> torch.Tensor | None:
        """Return which samples show a concept and were not generated again for it, [B]; None if there are none."""
        left = [shown & ~self.erased.get(index, torch.zeros_like(shown)) for index, shown in self.shown.items()]
        found = torch.stack(left).any(dim=0) if left else torch.zeros(samples, dtype=torch.bool)
        return found if bool(found.any()) else None

    def of_kept(self, decisions: Sequence[Decision | None]) -> tuple[Decision | None, ...]:
        """Return decisions, one per sample, without those of samples that this run does not keep."""
        kept = [True] * len(decisions) if self.kept is None else self.kept.tolist()
        return tuple(one if keep else None for one, keep in zip(decisions, kept, strict=True))

    def erase(self) -> None:
        """Generate every sample again that shows a concept; of the run that follows only these are kept."""
        self.kept = self.left(1)
        self.erased = {index: shown.clone() for index, shown in self.shown.items()}

    def weights(self, index: int, weights: Sequence[float]) -> list[float]:
        """Return the weights of an erasure LoRA, one per sample, with those of the images that are generated again."""
        if index not in self.erased:
            return list(weights)
        erased, weight = self.erased[index].tolist(), self._settings[index].weight_detected
        spread = list(weights) * (1 if len(weights) == len(erased) else len(erased))
        return [weight if again else each for again, each in zip(erased, spread, strict=True)]

    def is_erased(self, index: int) -> bool:
        """Return whether every sample is generated again for an erasure LoRA's concept."""
        return index in self.erased and bool(self.erased[index].all())

    def decisions(self, index: int, others: Sequence[Decision | None]) -> tuple[Decision | None, ...]:
        """Return an erasure LoRA's decisions, one per sample, with those of this stage in place of `others`."""
        if index not in self.shown:
            return tuple(others)
        samples = self.shown[index].tolist()
        spread = tuple(others or (None,)) * (1 if len(others) == len(samples) else len(samples))
        return tuple(
            self._decision(index, sample, other) if shown else other
            for sample, (shown, other) in enumerate(zip(samples, spread, strict=True))
        )

    def _decision(self, index: int, sample: int, other: Decision | None) -> Decision:
        """The decision on a sample that shows the concept, by the first check that saw it."""
        check = next(check for check in self.checks[index] if check.shown[sample])
        score = check.scores[sample]
        assert score is not None
        what = "the start image" if check.start else "the image that the base model made of the prompt"
        return decide_by(
            [image_statistic(score), *(other.statistics if other else ())],
            self._settings[index].weight_detected,
            reason=f"{what} shows the concept; it was generated again from more noise",
            model_key=self.context.model_key,
            adapter_key=self.context.run.loras[index].key,
            step=check.step,
            sigma=check.sigma,
        )


def _wanted(settings: Settings) -> bool:
    """Whether a gate reads images: not where one statistic or threshold was asked for."""
    automatic = settings.statistic == AUTOMATIC and settings.threshold is None
    asked = settings.check_image != NEVER_CHECK or settings.resist_adversarial
    return automatic and asked and settings.decide in (DURING, BEFORE)
