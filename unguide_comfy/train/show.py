"""Shows how a training goes: a line of text on the node, a progress bar, previews of the concept beside the loss."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import comfy.utils
import latent_preview
import torch
from PIL import Image

from ...unguide_core.training.trainer import Progress
from ..report.plot import loss_curve
from ..report.progress import say

log = logging.getLogger(__name__)

SIDE = 256
"""Of a preview, in pixels."""
EVERY = 1.0
"""Seconds between plots of the loss, at least."""


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
    """

    def __init__(self, model: Any):
        self.bar = comfy.utils.ProgressBar(1)
        self.previewer = _previewer(model)
        self.losses: list[float] = []
        self._preview: Image.Image | None = None
        self._shown = 0.0

    def __call__(self, report: TrainingReport) -> None:
        """Show one report."""
        at = report.progress
        self.losses.append(at.loss)
        if report.preview is not None and self.previewer is not None:
            with torch.no_grad():
                self._preview = self.previewer.decode_latent_to_preview(report.preview)
        due = report.preview is not None or time.perf_counter() - self._shown > EVERY
        plot = self._plot(at.iterations) if due else None
        self.bar.update_absolute(at.iteration, at.iterations, plot)
        say(report.text)
        if at.iteration % max(1, at.iterations // 10) == 0:
            log.info("UnGuide: training, %s", report.text)

    def _plot(self, iterations: int) -> tuple[str, Image.Image, int]:
        """The last preview beside the loss so far, as the host's progress bar takes it."""
        self._shown = time.perf_counter()
        curve = loss_curve(self.losses, iterations, SIDE)
        if self._preview is None:
            return "JPEG", curve, curve.width
        both = Image.new("RGB", (SIDE + curve.width, SIDE))
        both.paste(self._preview.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), (0, 0))
        both.paste(curve, (SIDE, 0))
        return "JPEG", both, both.width


def _previewer(model: Any) -> Any:
    """The host's previewer; where previews are off, its fast one, because a training without a sign looks stuck."""
    latents = model.model.latent_format
    previewer = latent_preview.get_previewer(model.load_device, latents)
    if previewer is None and latents.latent_rgb_factors is not None:
        bias = getattr(latents, "latent_rgb_factors_bias", None)
        return latent_preview.Latent2RGBPreviewer(latents.latent_rgb_factors, bias)
    return previewer
