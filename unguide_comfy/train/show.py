"""Shows how a training goes: a progress bar, a line of text on the node, previews."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import comfy.utils
import latent_preview
import torch

from ...unguide_core.training.trainer import Progress
from ..report.progress import say

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingReport:
    """Where a training stands.

    Args:
        progress: the loop's own.
        left: seconds to the last iteration, estimated; None at the first.
        preview: a latent of the concept's prompt, x0 [1, C, ...], where one was generated.
        note: what the user should know besides, such as that memory ran out and what was done about it.
    """

    progress: Progress
    left: float | None
    preview: torch.Tensor | None = None
    note: str = ""

    @property
    def text(self) -> str:
        """One line for a person."""
        at = self.progress
        held = "" if at.held_out is None else f", held out {at.held_out:.2f} of the untrained"
        kept = f" (erased {at.erasure:.4f}, kept {at.preservation:.4f})" if at.preservation else ""
        left = "" if self.left is None else f"; {self.left:.0f} s left"
        line = f"{at.iteration} of {at.iterations}: loss {at.loss:.4f}{kept}{held}{left}"
        return f"{line}\n{self.note}" if self.note else line


class TrainingDisplay:
    """Shows every report on the node that is being executed, and in a progress bar.

    Args:
        model: a `ModelPatcher`, whose latents the previews are.
        iterations: of the whole training.
    """

    def __init__(self, model: Any, iterations: int):
        self.bar = comfy.utils.ProgressBar(iterations)
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def __call__(self, report: TrainingReport) -> None:
        """Show one report."""
        image = None
        if report.preview is not None and self.previewer is not None:
            with torch.no_grad():
                image = self.previewer.decode_latent_to_preview_image("JPEG", report.preview)
        self.bar.update_absolute(report.progress.iteration, report.progress.iterations, image)
        say(report.text)
        tenth = max(1, report.progress.iterations // 10)
        if report.progress.iteration % tenth == 0:
            log.info("UnGuide: training, %s", report.text)
