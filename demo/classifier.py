"""A small judge of images: the ten classes and "other", from an RGB image to probabilities.

Trained on artwork only, never on a generated image; one vendor's artwork is held out for its test. "Other" is what a
generator makes when it makes nothing: noise, scenes, blends, scrambled and melted objects. Inference needs torch and
safetensors. It does not know prompts or the demo model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .captions import CLASSES

CLASSIFIER_PATH = Path(__file__).with_name("classifier.safetensors")
LABELS: tuple[str, ...] = (*CLASSES, "other")
RESOLUTION = 64


class Classifier(nn.Module):
    """A residual-free convolutional net of 0.3 M parameters; [B, 3, 64, 64] in 0..1 to 11 logits."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n_out, stride in ((3, 24, 2), (24, 48, 2), (48, 64, 1), (64, 96, 2), (96, 96, 1), (96, 128, 2)):
            convolution = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(n_out), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(128 * 5, len(LABELS))

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits [B, 11]."""
        h = self.features((x - 0.5) * 4)
        pooled = torch.cat([F.adaptive_avg_pool2d(h, 2).flatten(1), h.amax((2, 3))], dim=1)
        return self.head(F.dropout(pooled, 0.2, self.training))


def save_classifier(model: Classifier, path: Path = CLASSIFIER_PATH) -> Path:
    """Writes the weights in fp16 and returns the path."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(state, str(path))
    return path


@lru_cache(maxsize=2)
def load_classifier(path: Path = CLASSIFIER_PATH) -> Classifier:
    """Returns the shipped classifier, fp32, not training."""
    model = Classifier()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(str(path)).items()})
    return model.requires_grad_(False).train(False)


def as_batch(images: np.ndarray | Tensor) -> Tensor:
    """Returns images as [B, 3, 64, 64] in 0..1.

    Args:
        images: one or more RGB images, [H, W, 3] or [B, H, W, 3] (uint8, or floats in 0..1 as ComfyUI's IMAGE), or
            [B, 3, H, W] floats.
    Raises: ValueError for any other shape.
    """
    batch = torch.as_tensor(np.array(images) if isinstance(images, np.ndarray) else images)
    batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()
    if batch.ndim == 3:
        batch = batch[None]
    if batch.ndim == 4 and batch.shape[-1] == 3:
        batch = batch.permute(0, 3, 1, 2)
    if batch.ndim != 4 or batch.shape[1] != 3:
        raise ValueError(f"expected RGB images [B, H, W, 3] but got shape {tuple(batch.shape)}")
    if batch.shape[-2:] != (RESOLUTION, RESOLUTION):
        batch = F.interpolate(batch, (RESOLUTION, RESOLUTION), mode="bilinear", antialias=True, align_corners=False)
    return batch.clamp(0, 1)


class Judge:
    """The shipped classifier behind plain images and names."""

    @staticmethod
    def probabilities(images: Sequence[Image.Image]) -> list[dict[str, float]]:
        """Returns, for each RGB image of any size, the probability of each class and of "other"."""
        batches = torch.cat([as_batch(np.asarray(p.convert("RGB"))) for p in images])
        return [dict(zip(LABELS, row, strict=True)) for row in classify(batches).tolist()]


def load() -> Judge:
    """Returns the shipped judge."""
    load_classifier()
    return Judge()


@torch.no_grad()
def classify(images: np.ndarray | Tensor, path: Path = CLASSIFIER_PATH) -> Tensor:
    """Returns probabilities [B, 11] over `LABELS` for images as `as_batch` takes them."""
    return load_classifier(path)(as_batch(images).cpu()).softmax(dim=-1)


def judged(images: np.ndarray | Tensor) -> list[tuple[str, str]]:
    """Returns what each image shows, one of `LABELS`, and which of the ten classes it is nearest to.

    A scene must be nearest to something: of the ten, a desert is nearest to a bird.
    """
    shares = classify(images)
    nearest = shares[:, : len(CLASSES)].argmax(dim=-1).tolist()
    return [(LABELS[i], CLASSES[j]) for i, j in zip(shares.argmax(dim=-1).tolist(), nearest, strict=True)]
