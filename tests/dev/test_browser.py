"""Which browser the tests drive, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from dev import browser
from dev.report import DevError, Progress


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of a user, with an empty folder on its path."""
    for name in (browser.VARIABLE, "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def program(path: Path) -> str:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_a_chromium_on_the_path_is_found_and_one_that_is_named_comes_first(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = program(bare_machine / "chromium-browser")
    assert browser.find() == found
    own = program(bare_machine / "mine")
    monkeypatch.setenv(browser.VARIABLE, own)
    assert browser.find_or_install(bare_machine / "log", Progress()) == own


def test_a_named_browser_that_does_not_exist_is_one_sentence(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(browser.VARIABLE, str(bare_machine / "gone"))
    with pytest.raises(DevError, match="no such file exists: correct or unset it"):
        browser.find()


def test_without_a_browser_a_user_goes_on_and_ci_stops(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert browser.find_or_install(bare_machine / "log", Progress()) is None
    monkeypatch.setenv("CI", "1")
    with pytest.raises(DevError, match=f"install one, or name it in {browser.VARIABLE}"):
        browser.find_or_install(bare_machine / "log", Progress())


def test_a_package_that_cannot_be_installed_is_one_sentence(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Path(program(bare_machine / "apt-get"))
    failing.write_text("#!/bin/sh\necho 'E: no network'\nexit 100\n")
    monkeypatch.setattr(browser.os, "geteuid", lambda: 0)
    with pytest.raises(DevError, match="apt-get update failed and said 'E: no network'"):
        browser.find_or_install(bare_machine / "log", Progress())
