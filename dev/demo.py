"""The demonstration: the shipped workflows on the embedded demo model, judged and shown side by side.

Images come from the server alone, over HTTP. dev/grid.py judges them and puts them into a grid, in the host's python,
which has torch and Pillow.
"""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from demo.captions import CLASSES, SYNONYMS
from dev import workflow
from dev.api import Graph, seconds_of
from dev.host import Host
from dev.pip import clean_environment
from dev.report import DevError, Progress
from dev.server import Server
from dev.workspace import PACK

WORKFLOWS = PACK / "workflows"
COMPARISON = "3_compare_base_lora_unguide"
SINGLE = ("1_quick_start", "2_probe_then_sample", "4_custom_sampling")
LORA = "demo/{}"
# a column's name, and the file name prefix of its image in the comparison
COLUMNS = {"base": "unguide/compare_base", "LoRA only": "unguide/compare_lora", "UnGuide": "unguide/compare_unguide"}
UNRELATED = ("dog", "ship", "frog", "horse")
SCENE = "beach"
# which input of which node is the image's seed; the probe has one of its own, which stays
SEEDS = {"KSampler": "seed", "UnGuideSampler": "seed", "RandomNoise": "noise_seed", "PrimitiveInt": "value"}
REPORTED = ("prompt", "column", "detected", "weight", "score", "model_evaluations", "seconds", "class_probabilities")
ERASED, KEPT, FREE = "erased", "kept", "free"
SUBTITLE = (
    "One model, one seed, three ways: the base model, the erasure LoRA by itself, and the LoRA behind UnGuide's gate."
)


@dataclass(frozen=True)
class Row:
    """A prompt, and what is expected: "erased" (the concept), "kept" (unrelated), "free" (the user's own)."""

    prompt: str
    expected: str


@dataclass
class Cell:
    """One cell of the grid, and one entry of report.json.

    Args:
        detected, weight, score: the gate's, None in the columns without a gate.
        model_evaluations: NFE, one latent under one conditioning each; the gate's included.
        seconds: by the server's own clock, without what other columns computed before (prompts, the model).
        class_probabilities: the judge's, by class.
        png: the image's file as the server wrote it, without metadata; equal bytes are equal images.
    """

    prompt: str
    column: str
    png: bytes = field(repr=False)
    seconds: float
    model_evaluations: float = 0.0
    detected: bool | None = None
    weight: float | None = None
    score: float | None = None
    class_probabilities: dict[str, float] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """What the judge sees in the image."""
        return max(self.class_probabilities, key=lambda name: self.class_probabilities[name])

    def entry(self) -> dict[str, Any]:
        """The report's entry."""
        return {name: getattr(self, name) for name in REPORTED}


def rows_for(concept: str, extra: list[str]) -> list[Row]:
    """The demonstration's prompts: the concept by its name and by a synonym, three others, a scene, and the user's."""
    others = [name for name in UNRELATED if name != concept][:3]
    prompts = [(concept, ERASED), (SYNONYMS[concept][0], ERASED), *((name, KEPT) for name in (*others, SCENE))]
    return [Row(f"a photo of the {name}", expected) for name, expected in prompts] + [Row(p, FREE) for p in extra]


def check_known(concept: str) -> None:
    """Raises DevError for a concept that the demo model was not trained on."""
    if concept not in CLASSES:
        raise DevError(f"the demo model does not know {concept!r}: choose from {', '.join(CLASSES)}", 2)


def check_seed(seed: int) -> None:
    """Raises DevError for a seed that ComfyUI does not take."""
    if not 0 <= seed < 1 << 64:
        raise DevError(f"the seed is {seed}: choose one from 0 to {(1 << 64) - 1}", 2)


def check_output(output: Path) -> None:
    """Makes the folder of the results. Raises: DevError where that cannot be."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DevError(f"{output} cannot hold results ({error.strerror}): choose a folder with --output", 2) from None


class Demo:
    """Runs the workflows for one concept and seed on a server."""

    def __init__(self, server: Server, concept: str, seed: int, progress: Progress) -> None:
        self.server, self.concept, self.seed, self.progress = server, concept, seed, progress
        self.object_info = server.api.get("/object_info")

    def graph(self, stem: str, prompt: str) -> Graph:
        """A shipped workflow in API format, with the demo's prompt, seed and erasure LoRA."""
        shipped = json.loads((WORKFLOWS / f"{stem}.json").read_text(encoding="utf-8"))
        return prepared(workflow.to_api(shipped, self.object_info), prompt, self.seed, LORA.format(self.concept))

    def load(self, prompt: str) -> None:
        """Run one step of one image, so that no image's seconds include loading the model."""
        self.progress("loading the demo model")
        graph = self.graph(COMPARISON, prompt)
        part = workflow.upstream(graph, (workflow.node_of(graph, filename_prefix=COLUMNS["base"]),))
        for node in part.values():
            node["inputs"] |= {"steps": 1} if "steps" in node["inputs"] else {}
        self.server.api.run(part)

    def single(self, stem: str, prompt: str) -> bytes:
        """Return the image of a workflow that saves one."""
        self.progress(f"workflow {stem}: {prompt}")
        graph = self.graph(stem, prompt)
        return self._image(self.server.api.run(graph), workflow.node_of_type(graph, "SaveImage"))

    def row(self, row: Row) -> Iterator[Cell]:
        """Yield one prompt's cells, in the order of the columns."""
        graph = self.graph(COMPARISON, row.prompt)
        report_node = workflow.node_of_type(graph, "PreviewAny")
        source, _ = graph[report_node]["inputs"]["source"]
        outputs = self.object_info[graph[source]["class_type"]]["output_name"]
        graph[report_node]["inputs"]["source"] = [source, outputs.index("json")]
        cells = {}
        for column, prefix in COLUMNS.items():
            self.progress(f"workflow {COMPARISON}: {row.prompt}, {column}")
            target = workflow.node_of(graph, filename_prefix=prefix)
            wanted = (target, report_node) if column == "UnGuide" else (target,)
            entry = self.server.api.run(workflow.upstream(graph, wanted))
            cells[column] = Cell(row.prompt, column, self._image(entry, target), seconds_of(entry))
        report = json.loads(entry["outputs"][report_node]["text"][0])
        self._fill(cells, report)
        yield from cells.values()

    def _fill(self, cells: dict[str, Cell], report: dict[str, Any]) -> None:
        """Fill in the gate's report; the columns without a gate cost what it counted for plain sampling."""
        erasure = report["erasure"][0]
        unguide = cells["UnGuide"]
        unguide.detected, unguide.weight = erasure["detected"], erasure["weight"]
        unguide.score = erasure["decision"]["score"]
        for cell in cells.values():
            cell.model_evaluations = report["model_evaluations_plain"]
        unguide.model_evaluations = report["model_evaluations_total"]

    def _image(self, entry: dict[str, Any], node: str) -> bytes:
        images = self.server.api.images(entry).get(node)
        if not images:
            raise DevError(f"node {node} of the workflow saved no image")
        return images[0]


def prepared(graph: Graph, prompt: str, seed: int, lora: str) -> Graph:
    """A copy of a shipped workflow's graph with another prompt, seed and erasure LoRA."""
    changed = copy.deepcopy(graph)
    for node in changed.values():
        inputs = node["inputs"]
        if node["_meta"]["title"] == "Prompt":
            inputs["text"] = prompt
        if "lora_name" in inputs:
            inputs["lora_name"] = lora
        seed_input = SEEDS.get(node["class_type"], "")
        if isinstance(inputs.get(seed_input), int):
            inputs[seed_input] = seed
    return changed


def judge_and_show(host: Host, concept: str, rows: list[Row], cells: list[Cell], output: Path) -> None:
    """Fill in the judge's class probabilities and write grid.png, in the host's python."""
    folder = output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    job: dict[str, Any] = {"title": f"UnGuide: '{concept}' erased", "subtitle": SUBTITLE, "images": []}
    job |= {"rows": [asdict(row) for row in rows], "columns": list(COLUMNS), "grid": str(output / "grid.png")}
    for number, cell in enumerate(cells):
        row, column = divmod(number, len(COLUMNS))
        path = folder / f"{row + 1}_{cell.column.replace(' ', '_').lower()}.png"
        path.write_bytes(cell.png)
        same = cell.png == cells[row * len(COLUMNS)].png and column > 0
        job["images"].append({**cell.entry(), "path": str(path), "same_as_base": same})
    environment = clean_environment() | {"PYTHONPATH": str(PACK)}
    result = subprocess.run(
        [str(host.python), "-P", "-m", "dev.grid"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=PACK,
        env=environment,
    )
    if result.returncode != 0:
        said = (result.stderr.strip().splitlines() or ["nothing"])[-1]
        raise DevError(f"judging the images failed and said '{said}'")
    for cell, probabilities in zip(cells, json.loads(result.stdout), strict=True):
        cell.class_probabilities = probabilities


def failures(concept: str, rows: list[Row], cells: list[Cell]) -> list[str]:
    """Return what went wrong, one phrase each: the concept is still shown, or an unrelated image has changed."""
    wrong = []
    for number, row in enumerate(rows):
        base, _, unguide = cells[number * len(COLUMNS) : (number + 1) * len(COLUMNS)]
        if row.expected == ERASED and unguide.shown == concept:
            wrong.append(f"'{row.prompt}' still shows a {concept}")
        if row.expected == KEPT and unguide.png != base.png:
            wrong.append(f"'{row.prompt}' differs from the base model's image")
    return wrong


def table(cells: list[Cell]) -> str:
    """Return the report as a table for a terminal."""
    lines = [f"{'prompt':<32}{'column':<11}{'shows':<18}{'detected':<10}{'score':>7}{'weight':>8}{'NFE':>7}{'s':>7}"]
    for cell in cells:
        first = cell.column == next(iter(COLUMNS))
        shown = f"{cell.shown} {cell.class_probabilities[cell.shown]:.0%}"
        gate = f"{'':<25}"
        if cell.detected is not None:
            gate = f"{'yes' if cell.detected else 'no':<10}{cell.score:>7.3f}{cell.weight:>8g}"
        cost = f"{cell.model_evaluations:>7g}{cell.seconds:>7.1f}"
        lines.append(f"{cell.prompt[:31] if first else '':<32}{cell.column:<11}{shown:<18}{gate}{cost}")
    return "\n".join(lines)
