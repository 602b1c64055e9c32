from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dev import models, workspace
from dev.report import DevError, Progress

UNPACK = """
import sys
from pathlib import Path
Path(sys.argv[1]).write_text(Path("demo/demo_model.safetensors").read_text() * 2)
"""


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose demo unpacks by writing its packed file twice."""
    folder = tmp_path / "checkout" / "demo"
    (folder / "loras" / "paper").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "unpack.py").write_text(UNPACK)
    (folder / "demo_model.safetensors").write_text("one ")
    monkeypatch.setattr(models, "PACK", folder.parent)
    monkeypatch.setattr(models, "DEMO", folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    made = tmp_path / "base"
    workspace.prepare(made)
    return made


def prepare(base: Path) -> Path:
    models.prepare(Path(sys.executable), base, Progress())
    return base / "models" / "checkpoints" / models.CHECKPOINT


def test_the_checkpoint_is_where_comfyui_looks(demo: Path, base: Path) -> None:
    assert prepare(base).read_text() == "one one "


def test_it_is_unpacked_once(demo: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(base)
    prepare(base)
    assert capsys.readouterr().err.count("unpacking the demo model") == 1


def test_it_is_unpacked_again_when_the_packed_model_changes(demo: Path, base: Path) -> None:
    prepare(base)
    (demo / "demo_model.safetensors").write_text("two ")
    assert prepare(base).read_text() == "two two "


def test_a_damaged_checkpoint_is_repaired(demo: Path, base: Path) -> None:
    checkpoint = prepare(base)
    checkpoint.resolve().write_text("one")
    assert prepare(base).read_text() == "one one "


def test_an_unpacking_that_fails_is_one_sentence(demo: Path, base: Path) -> None:
    (demo / "demo_model.safetensors").unlink()
    with pytest.raises(DevError, match=r"cannot be unpacked, python -m demo\.unpack says 'FileNotFoundError"):
        prepare(base)


def test_the_loras_of_the_checkout_are_linked(demo: Path, base: Path) -> None:
    prepare(base)
    assert (base / "models" / "loras" / models.LORAS).resolve() == demo / "loras"


@pytest.mark.parametrize("before", ["nothing", "file", "folder", "another link", "a link to nowhere"])
def test_a_link_takes_the_place_of(before: str, tmp_path: Path) -> None:
    target, other, place = tmp_path / "target", tmp_path / "other", tmp_path / "place"
    target.mkdir()
    other.mkdir()
    (other / "kept").touch()
    if before == "file":
        place.touch()
    elif before == "folder":
        place.mkdir()
        (place / "file").touch()
    elif before != "nothing":
        place.symlink_to(other if before == "another link" else tmp_path / "nowhere")
    workspace.link(place, target)
    assert place.resolve() == target
    assert (other / "kept").exists()
