"""Tells a person how a training run goes: a progress bar, a line of text on the node, previews."""

from __future__ import annotations

import logging
from typing import Any

import comfy.utils
import latent_preview
import torch
from comfy_execution.utils import get_executing_context
from server import PromptServer

from .training import Report

log = logging.getLogger(__name__)


class Announcer:
    """Shows every report on the node that is being executed, and in a progress bar.

    Args:
        model: a `ModelPatcher`, whose latents the pictures are.
        iterations: of the whole training.
    """

    def __init__(self, model: Any, iterations: int):
        self.bar = comfy.utils.ProgressBar(iterations)
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def __call__(self, report: Report) -> None:
        """Shows one report."""
        picture = None
        if report.preview is not None and self.previewer is not None:
            with torch.no_grad():
                picture = self.previewer.decode_latent_to_preview_image("JPEG", report.preview)
        self.bar.update_absolute(report.progress.iteration, report.progress.iterations, picture)
        say(report.text)
        tenth = max(1, report.progress.iterations // 10)
        if report.progress.iteration % tenth == 0:
            log.info("UnGuide: training, %s", report.text)


def say(text: str) -> None:
    """Puts a text on the node that is being executed, where a page is looking."""
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is not None and server is not None:
        server.send_progress_text(text, context.node_id)
