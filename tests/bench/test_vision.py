"""The judges whose networks are built here from published files: UnlearnCanvas' classifiers, GIPHY's celebrities."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50

from unguide_bench.errors import BenchError
from unguide_bench.judges.canvas import CanvasJudge
from unguide_bench.judges.giphy import GiphyJudge, Recognizer, with_margin
from unguide_bench.labels import CANVAS_OBJECTS, CANVAS_STYLES
from unguide_bench.panel import Judging, Panel

WIDTH, PATCH, SIDE, LAYERS = 64, 16, 32, 2


def classifier(classes: int, seed: int) -> dict[str, Tensor]:
    """A vision transformer of one head in timm's names, random."""
    torch.manual_seed(seed)
    tensors = {
        "cls_token": torch.randn(1, 1, WIDTH) / 8,
        "pos_embed": torch.randn(1, (SIDE // PATCH) ** 2 + 1, WIDTH) / 8,
        "patch_embed.proj.weight": torch.randn(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": torch.randn(WIDTH) / 8,
    }
    layers = {
        "attn.qkv": (3 * WIDTH, WIDTH),
        "attn.proj": (WIDTH, WIDTH),
        "mlp.fc1": (96, WIDTH),
        "mlp.fc2": (WIDTH, 96),
    }
    for number in range(LAYERS):
        for name, shape in layers.items():
            tensors[f"blocks.{number}.{name}.weight"] = torch.randn(shape) / 8
            tensors[f"blocks.{number}.{name}.bias"] = torch.randn(shape[0]) / 8
        for name in ("norm1", "norm2"):
            tensors[f"blocks.{number}.{name}.weight"] = torch.rand(WIDTH) + 0.5
            tensors[f"blocks.{number}.{name}.bias"] = torch.randn(WIDTH) / 8
    tensors |= {"norm.weight": torch.rand(WIDTH) + 0.5, "norm.bias": torch.randn(WIDTH) / 8}
    return tensors | {"head.weight": torch.randn(classes, WIDTH), "head.bias": torch.randn(classes) / 8}


def write_classifier(path: Path, classes: int, seed: int) -> None:
    torch.save({"model_state_dict": classifier(classes, seed)}, path)


def logits(t: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """What timm computes from them: pre-norm blocks, GELU, the class token's vector to the classes."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), t[f"{name}.weight"], t[f"{name}.bias"], eps=1e-6)

    patches = F.conv2d(pixels, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([t["cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], 1) + t["pos_embed"]
    for number in range(LAYERS):
        block = f"blocks.{number}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).chunk(3, dim=-1)
        x = x + linear(f"{block}.attn.proj", torch.softmax(q @ k.transpose(1, 2) / WIDTH**0.5, -1) @ v)
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))))
    return linear("head", norm("norm", x)[:, 0])


@pytest.fixture(scope="module")
def canvas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canvas")
    write_classifier(folder / "style.pth", len(CANVAS_STYLES), seed=1)
    write_classifier(folder / "object.pth", len(CANVAS_OBJECTS), seed=2)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(6)]
    for path in paths:
        blocks = noise.integers(0, 2, (4, 4, 3)) * 255
        Image.fromarray(np.kron(blocks, np.ones((SIDE // 4, SIDE // 4, 1))).astype(np.uint8)).save(path)
    return paths


def test_style_and_object_are_what_timms_network_sees(canvas: Path, images: list[Path]) -> None:
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in images])
    scaled = pixels / 255 * 2 - 1
    styles = logits(classifier(len(CANVAS_STYLES), 1), scaled).argmax(1).tolist()
    things = logits(classifier(len(CANVAS_OBJECTS), 2), scaled).argmax(1).tolist()
    expected = [(CANVAS_STYLES[a].lower(), CANVAS_OBJECTS[b].lower()) for a, b in zip(styles, things, strict=True)]
    assert CanvasJudge(canvas).see(images) == expected
    assert len(set(expected)) > 1


def test_the_class_of_the_erased_concepts_sort_counts_and_the_other_stands_beside(
    canvas: Path, images: list[Path]
) -> None:
    judge = Panel(Judging("unlearncanvas", weights=canvas))
    styles = judge.classes(images, "monet", ["monet", "winter"])
    things = judge.classes(images, "dogs", ["dogs", "cats"])
    assert (styles.seen, styles.beside) == (things.beside, things.seen)
    assert set(styles.seen) <= {style.lower() for style in CANVAS_STYLES}


def test_a_classifier_of_other_classes_is_refused(canvas: Path, tmp_path: Path) -> None:
    write_classifier(tmp_path / "object.pth", 10, seed=0)
    with pytest.raises(BenchError, match=r"has no style\.pth; put UnlearnCanvas' style and object classifiers there"):
        CanvasJudge(tmp_path)
    write_classifier(tmp_path / "style.pth", len(CANVAS_STYLES), seed=0)
    with pytest.raises(BenchError, match=r"object\.pth holds no vision transformer of timm's with 20 classes"):
        CanvasJudge(tmp_path)


# ---------------------------------------------------------------- GIPHY

CELEBRITIES = ("Zsa_Zsa_Gabor_[m.013ybx]", "50_Cent_[m.01vvyc_]", "Adele_[m.02z4b_8]")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """torchvision's ResNet-50 with a bottleneck of 256 and three classes, random."""
    torch.manual_seed(0)
    made = resnet50()
    made.fc = nn.Sequential(nn.Linear(2048, 256), nn.Linear(256, len(CELEBRITIES)))
    return made.train(False)


@pytest.fixture(scope="module")
def giphy(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network in GIPHY's file: its stem by the number of the layer, and the centres of its loss."""
    folder = tmp_path_factory.mktemp("giphy")
    (folder / "face_recognition").mkdir()
    rows = "".join(f"{name},{number}\n" for number, name in enumerate(CELEBRITIES))
    (folder / "face_recognition" / "labels.csv").write_text(f"Labels,Index\n{rows}", encoding="utf-8")
    state = {"center_loss_criterion.centers": torch.zeros(3, 256)}
    for number, (name, child) in enumerate(network.named_children()):
        for own, tensor in child.state_dict().items():
            if name == "fc":
                layer, value = own.split(".")
                state[f"model.fc{int(layer) + 1}.{value}"] = tensor
            else:
                state[f"model.stem.{number}.{own}"] = tensor
    torch.save({"model_state": state}, folder / "face_recognition" / "best_model_states.pkl")
    return folder


def test_giphys_network_is_rebuilt_from_its_file_with_names_in_its_order(
    network: nn.Module, giphy: Path, images: list[Path]
) -> None:
    recognizer = Recognizer(giphy)
    faces = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(faces)
    assert torch.allclose(recognizer(faces), expected, atol=1e-4)
    assert recognizer.names == ["50 cent", "adele", "zsa zsa gabor"]
    resized = Image.open(images[0]).resize((224, 224), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        assert recognizer.name(Image.open(images[0])) == recognizer.names[int(network(pixels).argmax())]


def test_a_faces_box_is_widened_by_a_tenth_on_each_side_and_stays_within_the_image() -> None:
    assert with_margin((10.0, 20.0, 50.0, 80.0), (100, 84)) == (6, 14, 54, 84)
    assert with_margin((1.0, 1.0, 41.0, 41.0), (100, 100)) == (0, 0, 45, 45)


def test_what_the_judge_of_celebrities_lacks_is_named(giphy: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(BenchError, match=r"has no face_recognition/best_model_states\.pkl, no face_recognition/labels"):
        GiphyJudge(tmp_path)
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(BenchError, match="pip install --no-deps facenet-pytorch"):
        GiphyJudge(giphy)
    with pytest.raises(BenchError, match="'giphy' are not named; give their folder with --weights"):
        Judging("giphy")
