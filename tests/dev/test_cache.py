from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from dev import cache
from dev.report import DevError
from dev.workspace import PACK


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "inner").mkdir(parents=True)
    (made / "inner" / "file.txt").write_text("twelve bytes")
    (made / "other.txt").write_text("x")
    return made


def test_a_stamped_folder_tells_what_it_was_made_from(folder: Path) -> None:
    cache.stamp(folder, "recipe")
    assert cache.stamped_inputs(folder) == "recipe"


def test_a_folder_without_a_stamp_is_unfinished(folder: Path) -> None:
    assert cache.stamped_inputs(folder) is None


def test_a_missing_file_is_noticed(folder: Path) -> None:
    cache.stamp(folder, "recipe")
    (folder / "inner" / "file.txt").unlink()
    assert cache.stamped_inputs(folder) is None


def test_a_truncated_file_is_noticed(folder: Path) -> None:
    cache.stamp(folder, "recipe")
    (folder / "inner" / "file.txt").write_text("twelve")
    assert cache.stamped_inputs(folder) is None


def test_files_that_appear_later_do_no_harm(folder: Path) -> None:
    cache.stamp(folder, "recipe")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "later.pyc").write_text("x")
    assert cache.stamped_inputs(folder) == "recipe"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"inputs": "recipe"}', '{"inputs": "recipe", "sizes": 1}'])
def test_a_damaged_stamp_vouches_for_nothing(folder: Path, text: str) -> None:
    folder.with_name("made.stamp.json").write_text(text)
    assert cache.stamped_inputs(folder) is None


def test_discarding_removes_folder_and_stamp(folder: Path) -> None:
    cache.stamp(folder, "recipe")
    cache.discard(folder)
    assert list(folder.parent.iterdir()) == []


def test_writing_leaves_no_partial_file(tmp_path: Path) -> None:
    cache.write_atomically(tmp_path / "file", "old")
    cache.write_atomically(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "new"


def test_too_little_disk_is_one_sentence_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(DevError, match=r"the environment needs 999999999 MB of free disk and .* has \d+ MB: free some"):
        cache.require_space(tmp_path, 999_999_999, "the environment")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("UNGUIDE_DEV_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.home() == tmp_path / "unguide-dev"
    monkeypatch.setenv("UNGUIDE_DEV_HOME", str(tmp_path / "mine"))
    assert cache.home() == tmp_path / "mine"


HOLDER = """
import sys
from pathlib import Path
from dev.cache import locked
from dev.report import Progress
with locked(Path(sys.argv[1]), Progress()):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_set_up_waits_for_the_first(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(PACK)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with (
        subprocess.Popen(command, env=environment, text=True, **pipes) as first,
        subprocess.Popen(command, env=environment, text=True, **pipes) as second,
    ):
        running = {first.stdout: first, second.stdout: second}
        (holder,), _, _ = select.select(list(running), [], [], 10)
        winner = running.pop(holder)
        (waiter,) = running.values()
        assert holder.readline() == "held\n"
        assert "waiting for another set-up" in waiter.stderr.readline()
        assert select.select([waiter.stdout], [], [], 0.3)[0] == []
        winner.kill()
        assert waiter.stdout.readline() == "held\n"
        waiter.stdin.close()
