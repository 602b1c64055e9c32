"""FID, the distance of two sets of images, by torchmetrics."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ..errors import BenchError

ENOUGH = 2
"""Images that a set must have; for a value to compare with published ones, thousands."""


class Fid:
    """The Frechet distance of two sets' features (arXiv 1706.08500).

    Args:
        network: torch-fidelity's InceptionV3 weights (weights-inception-2015-12-05-6726825d.pth, or the same as
            safetensors), which published values rest on; or another feature network: uint8 images [B, 3, H, W] to
            features [B, num_features].
    Raises: BenchError where the weights cannot be loaded.
    """

    def __init__(self, network: Path | nn.Module) -> None:
        if isinstance(network, nn.Module):
            self.distance = FrechetInceptionDistance(feature=network)
            return
        self.distance = _inception(network)

    def measure(self, files: Sequence[Path], references: Sequence[Path]) -> float:
        """The distance of the files' images from the references'. Raises: BenchError for fewer than two of either."""
        if min(len(files), len(references)) < ENOUGH:
            raise BenchError(f"FID has {len(files)} images and {len(references)} references; expected {ENOUGH} each")
        self.distance.reset()
        with torch.no_grad():
            for paths, real in ((references, True), (files, False)):
                for path in paths:
                    self.distance.update(_pixels(path), real=real)
        return float(self.distance.compute())


def _inception(path: Path) -> FrechetInceptionDistance:
    """torchmetrics' own, with weights from a file; torch-fidelity would unpickle it, so it is given a copy."""
    if not path.is_file():
        raise BenchError(f"{path} does not exist; give torch-fidelity's InceptionV3 weights")
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "inception.pth")
            torch.save(tensors, copy)
            # resized as the original does it
            return FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(copy), antialias=False)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, UnpicklingError, SafetensorError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BenchError(f"{path} holds no weights of InceptionV3 ({said}); give torch-fidelity's") from error


def _pixels(path: Path) -> Tensor:
    """An image [1, 3, H, W], uint8."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]
