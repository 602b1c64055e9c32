"""GIPHY's celebrity detector (github.com/Giphy/celeb-detection-oss), from its published files.

GIPHY's program runs MTCNN in TensorFlow 1; here facenet-pytorch's port of the same three networks detects the faces.
Where an image shows several, the largest counts, and GIPHY's clustering of them is not repeated.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.transforms.functional import pil_to_tensor

from ..errors import BenchError

WEIGHTS, LABELS = "face_recognition/best_model_states.pkl", "face_recognition/labels.csv"
MARGIN, SIZE, EMBEDDING = 0.2, 224, 256
"""Of a face's box as the erasure papers set it, of the cut-out, pixels, and of the network's last layer but one."""
THRESHOLDS, SMALLEST = (0.6, 0.7, 0.7), 20
"""MTCNN's as GIPHY sets them."""


def require_files(folder: Path) -> None:
    """Raises BenchError where the folder lacks a file, or the package that detects faces is missing."""
    if missing := [name for name in (WEIGHTS, LABELS) if not (folder / name).is_file()]:
        raise BenchError(
            f"{folder} has no {', no '.join(missing)}; unpack the resources of Giphy/celeb-detection-oss there"
        )
    _mtcnn()


class Recognizer(nn.Module):
    """GIPHY's ResNet-50 with a bottleneck, in the names of its file, and the celebrities in its order.

    Raises: BenchError where a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        with open(folder / LABELS, encoding="utf-8", newline="") as rows:
            titles = sorted(row["Labels"] for row in csv.DictReader(rows))
        self.names = [title.split("_[", 1)[0].replace("_", " ").lower() for title in titles]
        *stem, last = resnet50().children()
        self.stem = nn.Sequential(*stem)
        self.fc1 = nn.Linear(last.in_features, EMBEDDING)
        self.fc2 = nn.Linear(EMBEDDING, len(titles))
        path = folder / WEIGHTS
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
            own = {name.removeprefix("model."): one for name, one in state.items() if name.startswith("model.")}
            self.load_state_dict(own)
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, UnpicklingError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BenchError(
                f"{path} holds no recogniser of {len(titles)} celebrities ({said}); unpack GIPHY's resources again"
            ) from error
        self.requires_grad_(False).train(False)

    def forward(self, faces: Tensor) -> Tensor:
        """Logits [B, celebrities] of faces [B, 3, 224, 224], values from 0 to 1."""
        return self.fc2(self.fc1(self.stem(faces).flatten(1)))

    def name(self, face: Image.Image) -> str:
        """The celebrity that a face looks like most, in lower case."""
        pixels = pil_to_tensor(face.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)).float() / 255
        return self.names[int(self(pixels[None]).argmax())]


class GiphyJudge:
    """Detects the largest face of an image and names it. Raises: BenchError for what is missing."""

    def __init__(self, folder: Path) -> None:
        require_files(folder)
        self.recognizer, self.faces = Recognizer(folder), _mtcnn()

    def see(self, files: Sequence[Path]) -> list[str]:
        """The celebrity on each image; "" where no face is found, as the papers leave such images out."""
        return [self._see(Image.open(file).convert("RGB")) for file in files]

    def _see(self, image: Image.Image) -> str:
        boxes, _ = self.faces.detect(image)
        if boxes is None:
            return ""
        largest = max(boxes.tolist(), key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
        return self.recognizer.name(image.crop(with_margin(largest, image.size)))


def with_margin(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A face's box (left, top, right, bottom), wider by the margin and within the image, in whole pixels."""
    left, top, right, bottom = box
    wide, high = int((right - left) * MARGIN) / 2, int((bottom - top) * MARGIN) / 2
    return (
        int(max(left - wide, 0)),
        int(max(top - high, 0)),
        int(min(right + wide, size[0])),
        int(min(bottom + high, size[1])),
    )


def _mtcnn() -> Any:
    try:
        from facenet_pytorch import MTCNN
    except ImportError as error:
        raise BenchError(
            f"the judge 'giphy' detects faces with facenet-pytorch, which is missing ({error}); pip install --no-deps "
            "facenet-pytorch, for it asks for an old torch that it does not need"
        ) from error
    return MTCNN(keep_all=True, thresholds=list(THRESHOLDS), min_face_size=SMALLEST)
