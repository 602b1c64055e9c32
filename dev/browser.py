"""The browser that tests/browser drives: Chromium, found on this machine or installed from Debian's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from dev.report import DevError, Progress

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PACKAGES = ("chromium", "fonts-noto-cjk")  # the second has the letters of translations
VARIABLE = "UNGUIDE_BROWSER"


def find() -> str | None:
    """The path of a Chromium: what UNGUIDE_BROWSER names, else one on the path."""
    named = os.environ.get(VARIABLE)
    if named and not Path(named).is_file():
        raise DevError(f"{VARIABLE} is {named}, and no such file exists: correct or unset it", 2)
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


def find_or_install(log: Path, progress: Progress) -> str | None:
    """The path of a Chromium, installed by apt-get where that may be done; None on a machine of a user who has none.

    Raises: DevError where it should be there and is not: apt-get fails, or CI is set and there is no way to one.
    """
    found = find()
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        progress(f"installing {' and '.join(PACKAGES)} (170 MB to download)")
        _install(log)
        found = find()
        if found is None:
            raise DevError(f"{PACKAGES[0]} was installed and is not on the path: name it in {VARIABLE} (log: {log})")
    if found is None and os.environ.get("CI"):
        raise DevError(f"no Chromium is on this machine, and CI is set: install one, or name it in {VARIABLE}")
    return found


def _install(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
    with open(log, "wb") as output:
        for command in (["apt-get", "update"], install):
            if subprocess.run(command, stdout=output, stderr=output, env=environment).returncode != 0:
                said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
                raise DevError(f"{' '.join(command[:2])} failed and said '{said[-1]}' (log: {log})")
