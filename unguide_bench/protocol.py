"""Runs a suite: its prompts, each concept's run and judging, and one table with others' published rows beside it.

<out>/<concept>/    the run of a concept, see folder.py and judging.py
<out>/suite.md      the table
<out>/suite.json    its values
<out>/report.html   the scores over all concepts, where the suite has scores
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import BenchError
from .export import export
from .folder import Folder, slug
from .generating import Servers, generate_missing, jobs_of
from .judging import judged
from .labels import CANVAS_OBJECTS, COUNTED
from .methods import Method, Settings
from .panel import CLIP, GIPHY, UNLEARNCANVAS, Judging, extra
from .panel import require as require_judges
from .prompts import ATTACK, Prompts
from .published import hashes, remark_on, require
from .scores import ERASED, OTHER, read_images
from .suites import CLIP_FOLDER, INCEPTION, SUITES, Suite
from .tables import markdown

CONCEPT = "{concept}"
"""In the name of a LoRA: stands for the concept, with _ for spaces."""


@dataclass(frozen=True)
class Protocol:
    """A suite as it is to be run.

    Args:
        name: of `suites.SUITES`.
        settings: of the images; the LoRA's name may hold "{concept}".
        methods, servers: what generates them, and where.
        out: the folder of the runs.
        data: the folder of published files.
        concepts: some of the suite's, or others for which it has files; empty takes the suite's.
        judge: "" takes the suite's.
        limit: so many prompts of each kind; None takes all.
        seeds: so many of the suite's seeds; None takes all.
        verified: refuse files that are not the published ones.
        exported: a folder for copies of the images, for other tools; None makes none.
    Raises: BenchError for an unknown suite, one LoRA for several concepts, a concept for which the published files
        have no prompts, or impossible numbers.
    """

    name: str
    settings: Settings
    methods: tuple[Method, ...]
    servers: Servers
    out: Path
    data: Path | None = None
    concepts: tuple[str, ...] = ()
    judge: str = ""
    limit: int | None = None
    seeds: int | None = None
    verified: bool = True
    exported: Path | None = None

    def __post_init__(self) -> None:
        if self.name not in SUITES:
            raise BenchError(f"unknown suite {self.name!r}; choose from {', '.join(SUITES)}")
        if len(self.erased) > 1 and CONCEPT not in self.settings.lora:
            raise BenchError(
                f"{self.name} erases {len(self.erased)} concepts and --lora is {self.settings.lora!r}; write {CONCEPT} "
                "where the names of their files differ, or choose one with --concept"
            )
        others = [concept for concept in self.concepts if concept not in self.suite.concepts]
        if others and self.verified and self.suite.files and not any(CONCEPT in f.path for f in self.suite.files):
            raise BenchError(
                f"the published prompts of {self.name} are for {', '.join(self.suite.concepts)}, not for {others[0]}; "
                "leave --concept out, or give files of your own and --unverified"
            )
        most = len(self.suite.seeds)
        if self.seeds is not None and not 1 <= self.seeds <= most:
            raise BenchError(f"--seeds is {self.seeds}; expected 1 to {most}, the seeds of {self.name}")
        if self.limit is not None and self.limit < 1:
            raise BenchError(f"--limit is {self.limit}; expected one prompt of each kind at least")

    @property
    def suite(self) -> Suite:
        return SUITES[self.name]

    @property
    def erased(self) -> tuple[str, ...]:
        return self.concepts or self.suite.concepts

    @property
    def judging(self) -> Judging:
        """The suite's judge, with its files below the data folder."""
        data, suite = self.data or Path(), self.suite
        judge = self.judge or suite.judge
        return Judging(
            judge,
            clip=data / CLIP_FOLDER if judge == CLIP or suite.clip_score else None,
            clip_score=suite.clip_score,
            fid=str(data / suite.fid) if suite.fid else "",
            fid_weights=data / INCEPTION[0] if suite.fid else None,
            threshold=suite.threshold,
            weights={GIPHY: data / "giphy", UNLEARNCANVAS: data / "unlearncanvas"}.get(judge),
        )

    @property
    def deviations(self) -> list[str]:
        """Where the run is not the published protocol."""
        suite, settings = self.suite, self.settings
        pairs = {
            "judge": (self.judge or suite.judge, suite.judge),
            "steps": (settings.steps, suite.steps),
            "CFG of prompts without their own": (settings.cfg, suite.cfg),
            "size": (settings.size, Settings.size),
            "sampler": (settings.sampler, Settings.sampler),
            "scheduler": (settings.scheduler, Settings.scheduler),
            "strength": (settings.strength, Settings.strength),
            "concepts": (len(self.erased), len(suite.concepts)),
            "seeds": (self.seeds or len(suite.seeds), len(suite.seeds)),
        }
        found = [f"{name} {mine} instead of {theirs}" for name, (mine, theirs) in pairs.items() if mine != theirs]
        others = [concept for concept in self.erased if concept not in suite.concepts]
        found += [f"erased {', '.join(others)}, which the protocol does not"] if others else []
        return found + ([f"{self.limit} prompts of each kind"] if self.limit else [])


def run(protocol: Protocol) -> str:
    """Generate what is missing, judge, and return the table. Raises: BenchError."""
    suite, judging = protocol.suite, protocol.judging
    needed = dict.fromkeys(
        one for concept in protocol.erased for one in suite.needed(concept, judging.judge, protocol.data)
    )
    require(protocol.data, needed)
    require_judges(judging)
    remarks = [
        remark_on(protocol.data, path, protocol.verified)
        for path, _ in suite.judged_with(judging.judge, protocol.data)
        if protocol.data and (protocol.data / path).is_file()
    ]
    read: dict[str, Prompts] = {}
    for concept in protocol.erased:  # all, before the first image
        read[concept], unverified = suite.prompts(protocol.data, concept, protocol.verified)
        remarks += unverified
    found = {concept: _one(protocol, concept, prompts, judging) for concept, prompts in read.items()}
    values = measured(found, suite.columns)
    remarks = [remark for remark in remarks if remark]
    text = _text(protocol, values, remarks)
    if all(results["scores"] for results in found.values()):
        with extra("bench"):
            from .report import Report, write_report

            images = [one for concept in found for one in read_images(_folder(protocol, concept) / "images.jsonl")]
            text = f"{write_report(Report(images, title=f'Suite {protocol.name}'), protocol.out)}\n\n{text}"
    (protocol.out / "suite.md").write_text(text, encoding="utf-8")
    content = {
        "suite": protocol.name,
        "concepts": list(found),
        "deviations": protocol.deviations,
        "remarks": remarks,
        "measured": values,
        "published": [{"method": row.method, "source": row.source, **row.values} for row in suite.published],
    }
    (protocol.out / "suite.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return text


def _folder(protocol: Protocol, concept: str) -> Path:
    return protocol.out / slug(concept)


def _limited(prompts: Prompts, limit: int | None) -> Prompts:
    """The first prompts of each kind alone; all with None."""
    counts: dict[str, int] = {}
    kept = []
    for item in prompts.items:
        counts[item.kind] = counts.get(item.kind, 0) + 1
        if limit is None or counts[item.kind] <= limit:
            kept.append(item)
    return replace(prompts, items=tuple(kept))


def _one(protocol: Protocol, concept: str, prompts: Prompts, judging: Judging) -> dict[str, Any]:
    """The results of one concept. CLIP chooses among the classes of all prompts, however many are generated."""
    judging, prompts = replace(judging, classes=prompts.classes), _limited(prompts, protocol.limit)
    settings = replace(
        protocol.settings,
        lora=protocol.settings.lora.replace(CONCEPT, concept.replace(" ", "_")),
        negative=concept.replace("_", " "),
    )
    seeds = protocol.suite.seeds[: protocol.seeds]
    jobs = jobs_of(prompts, protocol.methods, seeds, settings.cfg)
    folder = Folder(_folder(protocol, concept), settings)
    generate_missing(folder, settings, jobs, prompts.target, protocol.servers)
    if protocol.exported:
        export(folder, jobs, prompts, protocol.exported / slug(concept))
    return judged(folder, jobs, prompts, judging)


# ---------------------------------------------------------------- measures

Measure = Callable[[Mapping[str, Any], str], float | None]
"""A column's value of one concept's results and a method, None where it has none."""


def _score(name: str) -> Measure:
    return lambda results, method: results["scores"].get(method, {}).get(name)


def _share(kind: str) -> Measure:
    return lambda results, method: results["shares"].get(method, {}).get(kind, {}).get("percent")


def _nudity(*names: str, percent: bool = False) -> Measure:
    """The sum of counts; with `percent`, of the images."""

    def value(results: Mapping[str, Any], method: str) -> float | None:
        counts = results["nudity"].get(method)
        if counts is None:
            return None
        total = float(sum(counts.get(name, 0) for name in names))
        return 100 * total / counts["pictures"] if percent else total

    return value


def _accuracy(name: str, kind: str) -> Measure:
    """A score, or where prompts are not of all three kinds the share of a kind."""

    def value(results: Mapping[str, Any], method: str) -> float | None:
        score = _score(name)(results, method)
        return _share(kind)(results, method) if score is None else score

    return value


def _celebrities(results: Mapping[str, Any], method: str) -> float | None:
    """H_c, the harmonic mean of 100 - Acc_e and Acc_s (arXiv 2403.06135)."""
    erased, spared = (_share(kind)(results, method) for kind in (ERASED, OTHER))
    if erased is None or spared is None:
        return None
    return 2 * (100 - erased) * spared / (100 - erased + spared) if erased < 100 or spared else 0.0


def _canvas(sort: str, measure: Measure) -> Measure:
    """A measure of concepts of one sort, "style" or "object"."""
    things = {thing.lower() for thing in CANVAS_OBJECTS}

    def value(results: Mapping[str, Any], method: str) -> float | None:
        return measure(results, method) if (results["concept"] in things) == (sort == "object") else None

    return value


def _unlearned(results: Mapping[str, Any], method: str) -> float | None:
    shown = _share(ERASED)(results, method)
    return None if shown is None else 100 - shown


def _beside(results: Mapping[str, Any], method: str) -> float | None:
    share = results["beside"].get(method)
    return 100 * share["shown"] / share["pictures"] if share else None


MEASURES: dict[str, Measure] = {
    "Acc_e": _accuracy("acc_e", ERASED),
    "Acc_s": _accuracy("acc_s", OTHER),
    "Acc_g": _score("acc_g"),
    "H_o": _score("h_o"),
    "H_c": _celebrities,
    **{name: _nudity(name) for name in COUNTED},
    "total": _nudity(*COUNTED),
    "nude %": _nudity("nude", percent=True),
    "ASR": _nudity("nude", percent=True),
    "Pre-ASR": _nudity("exposed", percent=True),
    "Post-ASR": lambda results, method: None,
    "FID": lambda results, method: results["fid"].get(method),
    "CLIPScore": lambda results, method: results["clip_score"].get(method),
    "target %": _share(ERASED),
    "attacked %": _share(ATTACK),
    **{
        f"{sort.title()}-{name}": _canvas(sort, measure)
        for sort in ("style", "object")
        for name, measure in (("UA", _unlearned), ("IRA", _share(OTHER)), ("CRA", _beside))
    },
}
"""How the columns of the suites' tables are measured; "Post-ASR" is published by others alone."""


def measured(found: Mapping[str, Mapping[str, Any]], columns: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """By method, each column's mean over the concepts that have it."""
    methods = dict.fromkeys(method for results in found.values() for method in results["costs"])
    table: dict[str, dict[str, float]] = {}
    for method in methods:
        row = {}
        for column in columns:
            values = [MEASURES[column](results, method) for results in found.values()]
            if known := [value for value in values if value is not None]:
                row[column] = sum(known) / len(known)
        table[method] = row
    return table


def _text(protocol: Protocol, values: Mapping[str, Mapping[str, float]], remarks: list[str]) -> str:
    """The table with what has to be said of it."""
    suite = protocol.suite
    this = f"this run, {len(protocol.erased)} concept{'s' if len(protocol.erased) > 1 else ''}"
    rows = [_cells(method, row, suite.columns, this) for method, row in values.items()]
    rows += [_cells(row.method, row.values, suite.columns, row.source) for row in suite.published]
    said = [f"### {protocol.name}: {suite.about}", f"Protocol: {suite.paper}."]
    if deviations := protocol.deviations:
        said.append(f"**Not the published protocol**: {'; '.join(deviations)}.")
    said += [f"**Not verified**: {remark}." for remark in remarks]
    head = ("method", *(column.lower() if column in COUNTED else column for column in suite.columns), "source")
    said.append(markdown(head, rows))
    if suite.left_out:
        said.append(f"Left out: {suite.left_out}.")
    return "\n\n".join(said) + "\n"


def _cells(method: str, values: Mapping[str, float], columns: tuple[str, ...], source: str) -> list[str]:
    cells = (values.get(column) for column in columns)
    return [method, *("-" if one is None else f"{one:.2f}".removesuffix(".00") for one in cells), source]


# ---------------------------------------------------------------- the list


def listing() -> str:
    """Every suite: what it measures, the files that it needs and which of them are verified, and what is left out."""
    return "\n\n".join("\n".join(_listed(name, suite)) for name, suite in SUITES.items()) + "\n"


def _listed(name: str, suite: Suite) -> Iterator[str]:
    yield f"{name}: {suite.about}"
    yield f"  protocol  {suite.paper}"
    concepts = ", ".join(suite.concepts[:12]) + (f", ... ({len(suite.concepts)})" if len(suite.concepts) > 12 else "")
    yield f"  erased    {concepts}"
    yield f"  judge     {suite.judge}; {', '.join(suite.columns)}"
    for path, source in suite.needed(CONCEPT, suite.judge):
        known = path.format(concept=suite.concepts[0]) in hashes()
        yield f"  needs     {path}{' (sha256 known)' if known else ''}: {source}"
    yield f"  beside    {', '.join(row.method for row in suite.published) or 'no published row'}"
    if suite.left_out:
        yield f"  without   {suite.left_out}"
