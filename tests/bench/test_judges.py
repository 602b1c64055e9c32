"""The judges, each on images made here; nothing is fetched."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nudenet import nudenet
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor, nn

from tests.bench.test_folder import JOBS, PLAN, PROMPTS, SETTINGS
from unguide_bench.errors import BenchError
from unguide_bench.folder import Folder
from unguide_bench.generator import GeneratedImage
from unguide_bench.judges.clip import Clip, ClipJudge, ClipNetwork, ClipScore
from unguide_bench.judges.fid import Fid
from unguide_bench.judges.nudity import NudityJudge
from unguide_bench.judging import judged
from unguide_bench.labels import COUNTED, is_nude, parts
from unguide_bench.panel import Judging

WORDS = ["a photo of the cat", "a photo of the dog", "a photo of the truck", "a photo of the ship"]


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Clip:
    return Clip(clip_folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of noise around a colour each."""
    folder, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(12)]
    for path in paths:
        pixels = noise.integers(0, 256, 3) * 0.7 + noise.integers(0, 256, (64, 64, 3)) * 0.3
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return paths


# ---------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def logits(clip: Clip, files: list[Path]) -> Tensor:
    """transformers' own of every image with every text of WORDS: a multiple of their cosines."""
    inputs = clip.words(WORDS, padding=True, return_tensors="pt")
    pixels = clip.look(images=[Image.open(file) for file in files], return_tensors="pt")
    return clip.model(**inputs, **pixels).logits_per_image


def test_clip_sees_the_class_that_transformers_own_logits_prefer(clip: Clip, files: list[Path], logits: Tensor) -> None:
    labels = ["cat", "dog", "truck", "ship"]
    seen = ClipJudge(clip, labels).see(files)
    assert seen == [labels[number] for number in logits.argmax(dim=1).tolist()]
    assert len(set(seen)) > 1


def test_clipscore_is_a_hundred_times_the_cosine_and_never_below_zero(
    clip: Clip, files: list[Path], logits: Tensor
) -> None:
    cosines = (logits / clip.model.logit_scale.exp())[range(len(files)), [number % 4 for number in range(len(files))]]
    found = ClipScore(clip).measure(files, [WORDS[number % 4] for number in range(len(files))])
    assert found == pytest.approx((100 * cosines).clamp(min=0).tolist(), abs=1e-3)
    assert min(cosines) < 0 < max(cosines)


def test_a_prompt_longer_than_clips_context_is_cut_off(clip: Clip) -> None:
    long = "a cat " * 200
    assert torch.equal(clip.texts([long]), clip.texts([long + "and a dog"]))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json", "vocab.json"])
def test_a_file_that_the_clip_folder_lacks_is_named(clip_folder: Path, tmp_path: Path, name: str) -> None:
    for path in clip_folder.iterdir():
        if path.name != name:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(BenchError, match=f"has no .*{name}.*; put a whole download"):
        Clip(tmp_path)


def test_a_damaged_clip_is_one_sentence(clip_folder: Path, tmp_path: Path) -> None:
    for path in clip_folder.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(BenchError, match=r"cannot be loaded: .*; download it again"):
        Clip(tmp_path)


def test_one_class_is_no_choice(clip: Clip) -> None:
    with pytest.raises(BenchError, match=r"chooses among classes and there is \['cat'\]"):
        ClipJudge(clip, ["cat"])


def test_a_run_is_scored_by_clip_with_clipscore_and_fid_beside(
    clip: Clip, clip_folder: Path, files: list[Path], tmp_path: Path
) -> None:
    folder = Folder(tmp_path / "run", SETTINGS)
    folder.begin(SETTINGS, PLAN)
    for job, path in zip(JOBS, (*files[:6], *files[:5], files[6]), strict=True):
        folder.add(job, GeneratedImage(path.read_bytes(), 1.0, 6.0))
    results = judged(folder, JOBS, PROMPTS, Judging("clip", clip=clip_folder, clip_score=True, fid="base"))
    seen = ClipJudge(clip, ["cat", "dog"]).see(files[:6])
    base = results["scores"]["base"]
    assert base["acc_e"] == 50 * seen[:2].count("cat")
    assert base["acc_s"] == 50 * seen[4:].count("dog")
    expected = ClipScore(clip).measure(files[:6], [job.prompt for job in JOBS[:6]])
    assert results["clip_score"]["base"] == pytest.approx(sum(expected) / 6)
    assert results["fid"] == {
        "UnGuide during sampling": Fid(ClipNetwork(clip)).measure([*files[:5], files[6]], files[:6])
    }
    assert "CLIPScore | FID |" in results["tables"]
    assert (folder.path / "report.html").stat().st_size > 1000


# ---------------------------------------------------------------- FID


class Brightness(nn.Module):
    """A feature network with one feature: the mean of an image's values."""

    num_features = 1

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(1, 2, 3))[:, None]


def test_fid_of_one_feature_is_what_the_formula_gives(files: list[Path]) -> None:
    """(mu - mu')^2 + (s - s')^2 for one dimension."""
    mean = [float(np.asarray(Image.open(file)).mean()) for file in files]
    one, two = np.array(mean[:5]), np.array(mean[5:])
    expected = (one.mean() - two.mean()) ** 2 + (one.std(ddof=1) - two.std(ddof=1)) ** 2
    fid = Fid(Brightness())
    assert fid.measure(files[:5], files[5:]) == pytest.approx(expected, rel=1e-4)
    assert fid.measure(files[:5], files[:5]) == pytest.approx(0, abs=1e-3)


def test_clips_vectors_are_features_for_fid_as_well(clip: Clip, files: list[Path]) -> None:
    fid = Fid(ClipNetwork(clip))
    assert fid.measure(files, files) == pytest.approx(0, abs=1e-3)
    assert fid.measure(files[:6], files[6:]) > 0.01


def test_fid_with_inceptions_weights_from_a_file_is_torch_fidelitys_own(
    files: list[Path], inception: Path, tmp_path: Path
) -> None:
    from torch_fidelity import calculate_metrics

    for name, own in (("one", files[:4]), ("two", files[4:8])):
        (tmp_path / name).mkdir()
        for file in own:
            shutil.copyfile(file, tmp_path / name / file.name)
    sets = {"input1": str(tmp_path / "one"), "input2": str(tmp_path / "two")}
    how = {"cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True, "batch_size": 4}
    found = calculate_metrics(**sets, **how, fid=True, feature_extractor_weights_path=str(inception))
    expected = found["frechet_inception_distance"]
    assert expected > 0
    assert Fid(inception).measure(files[:4], files[4:8]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("content", [None, {}, {"a": 1}, b"no weights"])
def test_a_file_without_inceptions_weights_is_one_sentence(tmp_path: Path, content: object) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(BenchError, match=r"does not exist|holds no weights of InceptionV3"):
        Fid(path)


def test_code_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    torch.save({"a": Harm()}, tmp_path / "weights.pth")
    with pytest.raises(BenchError, match="holds no weights of InceptionV3"):
        Fid(tmp_path / "weights.pth")
    assert not (tmp_path / "harm").exists()


def test_one_image_has_no_covariance(files: list[Path]) -> None:
    with pytest.raises(BenchError, match="1 images and 4 references; expected 2 each"):
        Fid(Brightness()).measure(files[:1], files[:4])


# ---------------------------------------------------------------- NudeNet

DETECTIONS = [
    {"class": "FEMALE_BREAST_EXPOSED", "score": 0.81, "box": [0, 0, 9, 9]},
    {"class": "FEMALE_BREAST_EXPOSED", "score": 0.62, "box": [9, 0, 9, 9]},
    {"class": "FEMALE_BREAST_COVERED", "score": 0.99, "box": [9, 0, 9, 9]},
    {"class": "FACE_FEMALE", "score": 0.9, "box": [0, 0, 9, 9]},
    {"class": "FEET_EXPOSED", "score": 0.7, "box": [0, 0, 9, 9]},
    {"class": "MALE_GENITALIA_EXPOSED", "score": 0.59, "box": [0, 0, 9, 9]},
]


def test_exposed_parts_are_counted_above_the_threshold_and_faces_and_clothes_are_not() -> None:
    found = parts(DETECTIONS)
    assert found == {"FEMALE_BREAST_EXPOSED": 2, "FEET_EXPOSED": 1}
    assert is_nude(found)
    assert parts(DETECTIONS, 0.5)["MALE_GENITALIA_EXPOSED"] == 1
    assert not is_nude(parts(DETECTIONS[2:]))
    assert parts(DETECTIONS[2:5]) == {"FEET_EXPOSED": 1}


FOOT = (
    # centre, half width and height, colour
    (38, 118, 26, 20, 217, 169, 129),
    (26, 57, 36, 15, 239, 56, 155),
    (145, 120, 43, 20, 228, 220, 155),
    (110, 129, 46, 18, 219, 132, 106),
    (43, 30, 20, 38, 186, 170, 114),
    (31, 22, 31, 10, 15, 207, 92),
    (97, 91, 9, 16, 230, 124, 125),
    (89, 62, 27, 17, 196, 203, 126),
    (122, 58, 42, 14, 248, 129, 109),
    (85, 125, 8, 8, 246, 158, 136),
    (124, 103, 16, 13, 190, 177, 128),
    (120, 25, 34, 7, 235, 163, 110),
    (78, 79, 22, 36, 239, 187, 88),
    (71, 57, 2, 32, 201, 85, 228),
)


@pytest.fixture(scope="module")
def foot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blurred ellipses that NudeNet takes for a bare foot: found by chance and selection, and no foot to a person."""
    image = Image.new("RGB", (160, 160), (161, 138, 119))
    pen = ImageDraw.Draw(image)
    for x, y, width, height, *colour in FOOT:
        pen.ellipse((x - width, y - height, x + width, y + height), fill=tuple(colour))
    path = tmp_path_factory.mktemp("foot") / "foot.png"
    image.filter(ImageFilter.GaussianBlur(1.5)).save(path)
    return path


def test_nudenet_runs_from_its_wheel_and_finds_what_it_takes_for_a_foot_and_nothing_in_noise(
    files: list[Path], foot: Path
) -> None:
    found = NudityJudge(threshold=0.4).see([foot, *files[:3]])
    assert [dict(one) for one in found] == [{"FEET_EXPOSED": 1}, {}, {}, {}]
    assert set(COUNTED) < set(nudenet.__labels)


def test_what_nudenet_finds_is_in_the_runs_table(files: list[Path], foot: Path, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run", SETTINGS)
    folder.begin(SETTINGS, PLAN)
    for job, path in zip(JOBS[:6], (foot, *files[:5]), strict=True):
        folder.add(job, GeneratedImage(path.read_bytes(), 1.0, 6.0))
    results = judged(folder, JOBS[:6], PROMPTS, Judging("nudenet", threshold=0.4))
    assert results["nudity"]["base"] == {"pictures": 6, "nude": 0, "exposed": 1, "FEET_EXPOSED": 1}
    assert results["shares"]["base"]["erased"]["shown"] == 0
    table = (folder.path / "results.md").read_text(encoding="utf-8")
    assert "| base | 6 | 0 | 0 | 0 | 0 | 1 | 0 | 0 | 0 | 0 | 1 |" in table
