"""What the policy did: one line of JSON for each sampling run, without any text of a client; and its summary.

It needs the standard library alone, but for the run that a line belongs to.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_lock = threading.Lock()


class Log:
    """A file of JSON lines. A line that cannot be written raises OSError, so that no image comes without its line."""

    def __init__(self, file: Path):
        self.file = file
        file.open("a").close()

    def write(self, **said: Any) -> None:
        """Append a line, with the time and the node that is being executed."""
        from comfy_execution.utils import get_executing_context

        context = get_executing_context()
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "prompt_id": context and context.prompt_id,
            "node": context and context.node_id,
            **said,
        }
        with _lock, self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_log(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a log. Raises: ValueError for anything else, such as half a line after a crash."""
    lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(dict(json.loads(line)))
            summary(lines[-1:])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"line {number} of {file} is not a line of a policy's log; remove it") from None
    return lines


def summary(lines: Iterable[Mapping[str, Any]]) -> str:
    """Return a table in Markdown: images, detections and refusals by day and concept."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for line in lines:
        day, images = line["time"][:10], line["images"]
        total = counts.setdefault((day, "all"), Counter())
        total.update(images=images, refused=images * (line["action"] == "refuse"))
        total["detected"] += max((sum(one["detected"]) for one in line["adapters"]), default=0)
        for one in line["adapters"]:
            own = counts.setdefault((day, one["concept"]), Counter())
            own.update(images=images, detected=sum(one["detected"]), refused=images * (one["action"] == "refuse"))
    heads = ("day", "concept", "images", "detected", "refused")
    rows = [(*key, *(str(count[head]) for head in heads[2:])) for key, count in sorted(counts.items())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ("---",) * len(heads), *rows))
