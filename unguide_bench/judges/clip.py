"""CLIP from a local folder of weights: zero-shot classes, and CLIPScore."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from ..errors import BenchError

BATCH = 32
TEMPLATE = "a photo of the {}"
NEEDED = (
    ("config.json",),
    ("model.safetensors", "pytorch_model.bin"),
    ("tokenizer.json", "vocab.json"),
    ("preprocessor_config.json",),
)
"""Files of the folder, and what may stand in for each."""


def require_files(folder: Path) -> None:
    """Raises BenchError where the folder lacks a file."""
    missing = [" or ".join(names) for names in NEEDED if not any((folder / name).is_file() for name in names)]
    if missing:
        raise BenchError(
            f"the CLIP folder {folder} has no {', no '.join(missing)}; put a whole download of "
            "openai/clip-vit-base-patch32 there"
        )


class Clip:
    """A CLIP model as transformers saves it, such as a download of openai/clip-vit-base-patch32; nothing is fetched.

    Raises: BenchError where a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        require_files(folder)
        disable_progress_bar()
        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True).float()
            self.words = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self.look = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
            raise BenchError(
                f"the CLIP in {folder} cannot be loaded: {_first_line(error)}; download it again"
            ) from error
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(self.device).requires_grad_(False).train(False)

    def images(self, files: Sequence[Path]) -> Tensor:
        """Unit vectors of image files, [images, D]."""
        batches = [files[at : at + BATCH] for at in range(0, len(files), BATCH)]
        return torch.cat([self.embedded([Image.open(file).convert("RGB") for file in batch]) for batch in batches])

    def embedded(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors of RGB images, [images, D]."""
        pixels = self.look(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        return _unit(self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, [texts, D]; what is longer than CLIP's context is cut off, as CLIPScore does."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.words(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        inputs = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return _unit(self.model.text_projection(self.model.text_model(**inputs).pooler_output))


class ClipNetwork(nn.Module):
    """CLIP's image vectors as the features of a FID; takes uint8 images [B, 3, H, W]."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip
        self.num_features = int(clip.model.config.projection_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Returns unit vectors [B, D]."""
        return self.clip.embedded([Image.fromarray(one.permute(1, 2, 0).numpy()) for one in images.cpu()]).cpu()


class ClipJudge:
    """Zero-shot classes: of the labels' texts the one nearest to the image. A synonym never counts as a class."""

    def __init__(self, clip: Clip, labels: Sequence[str], template: str = TEMPLATE) -> None:
        if len(labels) < 2:
            raise BenchError(f"CLIP chooses among classes and there is {list(labels)}; name more with --classes")
        self.clip, self.labels = clip, tuple(labels)
        self.classes = clip.texts([template.format(label) for label in labels])

    def see(self, files: Sequence[Path]) -> list[str]:
        """The class that each image shows."""
        nearest = (self.clip.images(files) @ self.classes.T).argmax(dim=1)
        return [self.labels[number] for number in nearest.tolist()]


class ClipScore:
    """CLIPScore (arXiv 2104.08718, without its factor 2.5, as is usual): max(100 * cos(image, prompt), 0)."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip

    def measure(self, files: Sequence[Path], prompts: Sequence[str]) -> list[float]:
        """The score of each image with its prompt."""
        texts = list(dict.fromkeys(prompts))
        vectors = self.clip.texts(texts)[[texts.index(prompt) for prompt in prompts]]
        return (100 * (self.clip.images(files) * vectors).sum(dim=1)).clamp(min=0).tolist()


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
