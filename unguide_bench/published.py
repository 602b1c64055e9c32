"""Files that others publish and that are not shipped: where they lie below a folder, where to get them, what they hold.

`published.sha256` has the hashes of those that could be had, as `sha256sum` writes them. A file whose hash is not there
is checked by its format, and its hash is told.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from .errors import BenchError
from .prompts import Prompt, from_csv
from .scores import ERASED, SYNONYM


@dataclass(frozen=True)
class PromptFile:
    """A published file of prompts.

    Args:
        path: below the data folder, as a clone of its repository has it; "{concept}" stands for the concept.
        source: how to get it.
        column: of the prompts; "" where the file has no header, and a prompt is a line.
        columns: others that must be there.
        rows: how many prompts it has; None where that differs by concept.
        kind: of its prompts, where no column says.
        label: a regular expression whose group is the class that a prompt asks for; "" takes the concept.
    """

    path: str
    source: str
    column: str = "prompt"
    columns: tuple[str, ...] = ()
    rows: int | None = None
    kind: str = ERASED
    label: str = ""

    def read(self, data: Path, concept: str, verified: bool = True) -> tuple[list[Prompt], str]:
        """The prompts, and a remark on what could not be verified ("" for nothing).

        Args:
            verified: refuse a file that is not the published one.
        Raises: BenchError where the file is not there or not of this format, or is another one.
        """
        path = data / self.path.format(concept=concept)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise BenchError(f"{path} cannot be read ({error}); {self.source}") from error
        remark = remark_on(data, path.relative_to(data).as_posix(), verified)
        found = list(self._lines(text, concept) if not self.column else self._rows(path, text, concept))
        if verified and self.rows not in (None, len(found)):
            raise BenchError(f"{path} has {len(found)} prompts; expected the published {self.rows}: {self.source}")
        return found, remark

    def _lines(self, text: str, concept: str) -> Iterator[Prompt]:
        texts = [line.strip() for line in text.splitlines() if line.strip()]
        return (Prompt(line, self.kind, concept.lower(), case) for case, line in enumerate(texts))

    def _rows(self, path: Path, text: str, concept: str) -> Iterator[Prompt]:
        head = text.split("\n", 1)[0]
        if missing := [name for name in self.columns if name not in head.strip().split(",")]:
            raise BenchError(f"{path} has no column {', '.join(missing)}; found {head.strip()}: {self.source}")
        for item in from_csv(path, text, concept, self.kind, self.column).items:
            if self.label:
                match = re.search(self.label, item.text)
                named = next((group for group in match.groups() if group), "") if match else ""
                yield replace(item, label=concept.lower() if item.kind in (ERASED, SYNONYM) else named.lower())
            else:
                yield item


@cache
def hashes() -> dict[str, str]:
    """The known hashes by path below the data folder."""
    lines = Path(__file__).with_name("published.sha256").read_text(encoding="utf-8").splitlines()
    return {path: found for found, _, path in (line.partition("  ") for line in lines)}


def remark_on(data: Path, name: str, verified: bool) -> str:
    """What is to be said of a file that may not be the published one; "" for nothing.

    Args:
        name: its path below the data folder.
        verified: refuse it where the published one's hash is known and another.
    Raises: BenchError.
    """
    found, known = _digest(data / name), hashes().get(name)
    if known == found:
        return ""
    if known is None:
        return f"{name} has sha256 {found}; the published file's is not known here"
    if verified:
        raise BenchError(
            f"{data / name} is not the published file: its sha256 is {found}; expected {known}: get it again, or give "
            "--unverified"
        )
    return f"{name} is not the published file: its sha256 is {found}; expected {known}"


def _digest(path: Path) -> str:
    """A file's sha256, read in pieces: a judge's weights may have a gigabyte."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def require(data: Path | None, needed: Iterable[tuple[str, str]]) -> None:
    """Raises BenchError that names everything that is missing, with where to get it.

    Args:
        needed: paths below the data folder, each with how to get it.
    """
    missing = [(path, source) for path, source in needed if data is None or not (data / path).exists()]
    if missing:
        sources: dict[str, list[str]] = {}
        for path, source in missing:
            sources.setdefault(source, []).append(path)
        parts = [f"{', '.join(paths)} ({source})" for source, paths in sources.items()]
        raise BenchError(f"missing below {data or 'the folder --data, which is not given'}: {'; '.join(parts)}")
