"""A run's images as other evaluation tools want them: folders of a class, and a CSV.

    <method>/<class>/00012.png
    <method>/prompts.csv         case_number,prompt,evaluation_seed,evaluation_guidance,classes

`case_number` is the image's number; it names the file.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable
from pathlib import Path

from .errors import BenchError
from .folder import Folder, key_of, slug
from .graphs import Job
from .prompts import Prompts

COLUMNS = ("case_number", "prompt", "evaluation_seed", "evaluation_guidance", "classes")
UNLABELLED = "images"


def export(folder: Folder, jobs: Iterable[Job], prompts: Prompts, target: Path) -> dict[str, int]:
    """Copy the images that are generated; return how many, by method.

    Raises: BenchError if the target is not an empty folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BenchError(f"{target} exists and is not an empty folder; choose another with --export")
    labels = {item.text: item.label for item in reversed(prompts.items)}
    rows: dict[str, list[tuple[str | int | float, ...]]] = {}
    for key in dict.fromkeys(key_of(job) for job in jobs):
        if (one := folder.generated.get(key)) is None:
            continue
        of_method = rows.setdefault(one.method, [])
        number, label = len(of_method), labels[one.prompt]
        file = target / slug(one.method) / slug(label or UNLABELLED) / f"{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder.path / one.file, file)
        of_method.append((number, one.prompt, one.seed, one.cfg, label))
    for method, lines in rows.items():
        with open(target / slug(method) / "prompts.csv", "w", encoding="utf-8", newline="") as table:
            writer = csv.writer(table)
            writer.writerow(COLUMNS)
            writer.writerows(lines)
    return {method: len(lines) for method, lines in rows.items()}
