"""A run's folder: its settings, the images that are generated, and a record of each.

    settings.json    what every image depends on
    generated.jsonl  a line for each image, written after its file
    images/          <method>/<prompt>_<digest>_<seed>.png

A run that was interrupted resumes from here. It does not know servers and judges.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import BenchError
from .generator import GeneratedImage, Plan
from .graphs import Job
from .methods import Settings
from .scores import write_whole

SETTINGS, RECORDS, IMAGES = "settings.json", "generated.jsonl", "images"


@dataclass(frozen=True)
class Record:
    """The record of a generated image: its job, and the result without its bytes.

    Args:
        file: relative to the run's folder.
    """

    method: str
    prompt: str
    seed: int
    cfg: float
    file: str
    seconds: float
    evaluations: float
    detected: bool | None = None
    score: float | None = None
    threshold: float | None = None


Key = tuple[str, str, int, float]


def key_of(job: Job) -> Key:
    """What tells images of one folder apart."""
    return job.method.name, job.prompt, job.seed, job.cfg


class Folder:
    """The folder of a run.

    Raises: BenchError where it cannot be made, holds images of other settings, or holds something else.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.known = self._read_settings()
        if self.known and (changed := settings.differences(self.known["settings"])):
            raise BenchError(
                f"{path} holds images of other settings: {'; '.join(changed)}; choose another folder with --out"
            )
        self.generated = {(one.method, one.prompt, one.seed, one.cfg): one for one in self._read_records()}

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Return the jobs whose images are not here, each once, in their order."""
        return list({key_of(job): job for job in jobs if key_of(job) not in self.generated}.values())

    def begin(self, settings: Settings, plan: Plan) -> None:
        """Write down how images are generated, before the first one.

        Raises: BenchError if those that are here were generated in another way.
        """
        how = {"concept_prompt": plan.settings.concept_prompt, "gate": plan.gate}
        if self.known:
            before = {name: self.known["how"].get(name) for name in how}
            if before != how:
                raise BenchError(
                    f"{self.path} holds images generated with {json.dumps(before)}, and the server now generates with "
                    f"{json.dumps(how)}; choose another folder with --out"
                )
            return
        try:
            (self.path / IMAGES).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BenchError(f"{self.path} cannot hold results ({error.strerror}); choose one with --out") from error
        self.known = {"settings": settings.to_json(), "how": how}
        write_whole(self.path / SETTINGS, json.dumps(self.known, indent=2).encode() + b"\n")

    def add(self, job: Job, image: GeneratedImage) -> None:
        """Keep an image: first its file, then its line."""
        file = f"{IMAGES}/{slug(job.method.name)}/{_name(job)}.png"
        (self.path / file).parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / file, image.png)
        about = {name: value for name, value in vars(image).items() if name != "png"}
        one = Record(job.method.name, job.prompt, job.seed, job.cfg, file, **about)
        with open(self.path / RECORDS, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(one)) + "\n")
        self.generated[key_of(job)] = one

    def _read_settings(self) -> dict[str, Any]:
        path = self.path / SETTINGS
        if not path.exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise BenchError(f"{self.path} exists and is not the folder of a run; choose another with --out")
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return {"settings": dict(content["settings"]), "how": dict(content["how"])}
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise BenchError(f"{path} cannot be read ({error}); choose another folder with --out") from error

    def _read_records(self) -> list[Record]:
        """The images that have both file and line. The last line may be half of one, if a run was interrupted."""
        path = self.path / RECORDS
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                one = Record(**json.loads(line)) if line else None
            except (ValueError, TypeError) as error:
                if number < len(lines):
                    raise BenchError(f"{path}, line {number} is damaged ({error}); remove that line") from error
                write_whole(path, "".join(f"{whole}\n" for whole in lines[:-1]).encode())
                continue
            if one is not None and (self.path / one.file).is_file():
                records.append(one)
        return records


def slug(text: str) -> str:
    """A text as a file's name."""
    return re.sub(r"[^a-z0-9.-]+", "_", text.lower()).strip("_.") or "_"


def _name(job: Job) -> str:
    digest = hashlib.sha256(f"{job.prompt}\n{job.cfg:g}".encode()).hexdigest()[:8]
    return f"{slug(job.prompt)[:60]}_{digest}_{job.seed}"
