"""UnlearnCanvas' style and object classifiers (arXiv 2402.11846): vision transformers as timm saves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from PIL import Image
from torch import Tensor
from torchvision.models import VisionTransformer
from torchvision.transforms.functional import normalize, pil_to_tensor

from ..errors import BenchError
from ..labels import CANVAS_OBJECTS, CANVAS_STYLES

STYLE, OBJECT = "style.pth", "object.pth"
BATCH = 16
HEAD = 64
"""Values of an attention head: timm's vision transformers have width / 64 heads."""


def require_files(folder: Path) -> None:
    """Raises BenchError where the folder lacks a file."""
    if missing := [name for name in (STYLE, OBJECT) if not (folder / name).is_file()]:
        raise BenchError(
            f"{folder} has no {', no '.join(missing)}; put UnlearnCanvas' style and object classifiers there, so named"
        )


class CanvasJudge:
    """Both classifiers. Raises: BenchError where a file is missing or is not such a classifier."""

    def __init__(self, folder: Path) -> None:
        require_files(folder)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.style = _classifier(folder / STYLE, len(CANVAS_STYLES)).to(self.device)
        self.object = _classifier(folder / OBJECT, len(CANVAS_OBJECTS)).to(self.device)

    def see(self, files: Sequence[Path]) -> list[tuple[str, str]]:
        """The style and the object of each image, in lower case."""
        found: list[tuple[str, str]] = []
        for at in range(0, len(files), BATCH):
            images = [Image.open(file).convert("RGB") for file in files[at : at + BATCH]]
            styles, objects = (self._numbers(network, images) for network in (self.style, self.object))
            found += [
                (CANVAS_STYLES[style].lower(), CANVAS_OBJECTS[thing].lower())
                for style, thing in zip(styles, objects, strict=True)
            ]
        return found

    def _numbers(self, network: VisionTransformer, images: Sequence[Image.Image]) -> list[int]:
        """The class of each image: resized as their script does, values from -1 to 1."""
        side = network.image_size
        pixels = torch.stack(
            [pil_to_tensor(one.resize((side, side), Image.Resampling.BILINEAR)).float() / 255 for one in images]
        )
        with torch.no_grad():
            return [int(one) for one in network(normalize(pixels, [0.5], [0.5]).to(self.device)).argmax(dim=1)]


def _classifier(path: Path, classes: int) -> VisionTransformer:
    """A classifier in torchvision's network, its sizes read from the file's tensors."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        tensors: Mapping[str, Tensor] = state.get("model_state_dict", state)
        width, patch = tensors["cls_token"].shape[-1], tensors["patch_embed.proj.weight"].shape[-1]
        side = int((tensors["pos_embed"].shape[1] - 1) ** 0.5) * patch
        network = VisionTransformer(
            image_size=side,
            patch_size=patch,
            num_layers=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
            num_heads=width // HEAD,
            hidden_dim=width,
            mlp_dim=tensors["blocks.0.mlp.fc1.bias"].shape[0],
            num_classes=classes,
        )
        network.load_state_dict({_renamed(name): tensor for name, tensor in tensors.items()})
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, UnpicklingError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BenchError(
            f"{path} holds no vision transformer of timm's with {classes} classes ({said}); give UnlearnCanvas' own"
        ) from error
    return network.requires_grad_(False).train(False)


_NAMES = (
    ("cls_token", "class_token"),
    ("pos_embed", "encoder.pos_embedding"),
    ("patch_embed.proj.", "conv_proj."),
    ("head.", "heads.head."),
    ("norm.", "encoder.ln."),
)
_IN_BLOCK = (
    ("norm1.", "ln_1."),
    ("norm2.", "ln_2."),
    ("attn.qkv.", "self_attention.in_proj_"),
    ("attn.proj.", "self_attention.out_proj."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.3."),
)


def _renamed(name: str) -> str:
    """timm's name of a tensor as torchvision's."""
    prefix: str = ""
    names: tuple[tuple[str, str], ...] = _NAMES
    if name.startswith("blocks."):
        _, number, name = name.split(".", 2)
        prefix, names = f"encoder.layers.encoder_layer_{number}.", _IN_BLOCK
    for old, new in names:
        if name.startswith(old):
            return f"{prefix}{new}{name[len(old) :]}"
    return prefix + name
