"""What all experiments share: the tables in documents, JSON that resumes, and tasks that end together."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from dev.workspace import PACK
from experiments.runner import keep, kept, publish, results


def test_a_report_takes_the_place_between_its_markers_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "gate.md"
    document.write_text("before\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nafter\n")
    publish("new", document, "bench")
    assert document.read_text() == "before\n<!-- bench: begin -->\n\nnew\n\n<!-- bench: end -->\nafter\n"
    assert capsys.readouterr().out == "new\n"


@pytest.mark.parametrize(
    ("name", "marker"),
    [
        ("gate", "gate"),
        ("gate", "statistics"),
        ("gate", "few steps"),
        ("gate", "images"),
        ("benchmark", "benchmark"),
        ("bench", "bench"),
        ("policy", "policy"),
    ],
)
def test_the_documents_have_the_markers(name: str, marker: str) -> None:
    text = (PACK / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert text.index(f"<!-- {marker}: begin -->") < text.index(f"<!-- {marker}: end -->")


def test_what_was_kept_is_read_again_and_nothing_is_written_unasked(tmp_path: Path) -> None:
    keep(None, [1])
    assert kept(None) == kept(tmp_path / "rows.json") == []
    keep(tmp_path / "rows.json", [{"concept": "cat"}])
    assert kept(tmp_path / "rows.json") == [{"concept": "cat"}]


def test_results_come_in_the_order_of_the_tasks_and_the_first_failure_ends_the_others() -> None:
    tasks: dict[str, Future[Any]] = {name: Future() for name in ("one", "two", "three")}
    tasks["one"].set_result(1)
    tasks["two"].set_exception(ValueError("two"))
    found = results("tasks", tasks)
    assert next(found) == ("one", 1)
    with pytest.raises(ValueError, match="two"):
        next(found)
    assert tasks["three"].cancelled()
