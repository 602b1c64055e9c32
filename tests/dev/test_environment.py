from __future__ import annotations

from pathlib import Path

import pytest

from dev import environment
from dev.host import Host
from dev.report import DevError, Progress


def comfyui(tmp_path: Path, requirements: str) -> Path:
    folder = tmp_path / "ComfyUI"
    folder.mkdir()
    (folder / "requirements.txt").write_text(requirements)
    return folder


def test_torch_and_the_example_graphs_are_left_out_of_the_requirements(tmp_path: Path) -> None:
    lines = "comfyui-workflow-templates==0.9\ntorch\ntorchsde\ntorchvision>=0.2\n\n# note:\nav>=14\nnumpy~=2.0"
    assert environment.host_requirements(comfyui(tmp_path, lines)) == ["torchsde", "av>=14", "numpy~=2.0"]


@pytest.mark.usefixtures("no_network")
def test_what_broke_off_halfway_is_built_anew(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = home / "environments" / "0.30.0"
    half = folder / "lib" / "half_installed.py"
    half.parent.mkdir(parents=True)
    half.write_text("x")
    with pytest.raises(DevError, match="installing torch found no package index: check the network"):
        environment.build(comfyui(tmp_path, "av"), folder, "cpu", home / "logs", Progress())
    assert "repairing the environment" in capsys.readouterr().err
    assert not half.exists()
    assert (folder / "bin" / "python").exists()  # made anew, and unstamped, so that the next run repairs it again
    assert environment.cache.stamped_inputs(folder) is None


@pytest.mark.host
def test_torchvision_imports_and_torch_is_not_loaded_before() -> None:
    code = "import sys; assert 'torch' not in sys.modules; import torchvision.transforms.v2, torchaudio"
    assert environment.failure(Host.from_environment().python, f"os; {code}") is None
