"""The demonstration: the shipped workflows on the embedded demo model, judged, drawn and written down.

Pictures come from the server alone, over HTTP. What a picture shows is judged, and the grid drawn, by dev/grid.py in
the host's python, which has torch and Pillow.
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
LORA = "unguide-demo/selective/{}.safetensors"
# a column's name, and the file name prefix of its picture in the comparison
COLUMNS = {"base": "unguide/compare_base", "LoRA only": "unguide/compare_lora", "UnGuide": "unguide/compare_unguide"}
UNRELATED = ("dog", "ship", "frog", "horse")
SCENE = "beach"
# which input of which node is the picture's seed; the probe has one of its own, which stays
SEEDS = {"KSampler": "seed", "UnGuideSampler": "seed", "RandomNoise": "noise_seed", "PrimitiveInt": "value"}
REPORTED = ("prompt", "column", "detected", "weight", "score", "unet_evaluations", "seconds", "class_probabilities")
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
class Picture:
    """One cell of the grid, and one entry of report.json.

    Args:
        detected, weight, score: the gate's, None in the columns without a gate.
        unet_evaluations: one is one latent under one conditioning; the gate's included.
        seconds: from the server's own clock; what other columns computed before (prompts, the model) is not in it.
        class_probabilities: the judge's, by class.
        png: the picture's file as the server wrote it, without metadata; equal bytes are equal pictures.
    """

    prompt: str
    column: str
    png: bytes = field(repr=False)
    seconds: float
    unet_evaluations: float = 0.0
    detected: bool | None = None
    weight: float | None = None
    score: float | None = None
    class_probabilities: dict[str, float] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """What the judge takes the picture for."""
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
        raise DevError(f"the demo model knows no concept {concept!r}: choose from {', '.join(CLASSES)}", 2)


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


def check_installed(concept: str, host: Host) -> None:
    """Raises DevError unless the concept's erasure LoRA is among the demo's models."""
    path = host.base_directory / "models" / "loras" / LORA.format(concept)
    if not path.is_file():
        raise DevError(f"the demo's erasure LoRA for {concept!r} is missing at {path}: run python3 dev setup")


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
        """One step of one picture, so that loading the model is in no picture's seconds."""
        self.progress("loading the demo model")
        graph = self.graph(COMPARISON, prompt)
        part = workflow.upstream(graph, (workflow.node_of(graph, filename_prefix=COLUMNS["base"]),))
        for node in part.values():
            node["inputs"] |= {"steps": 1} if "steps" in node["inputs"] else {}
        self.server.api.run(part)

    def single(self, stem: str, prompt: str) -> bytes:
        """The picture of a workflow that saves one."""
        self.progress(f"workflow {stem}: {prompt}")
        graph = self.graph(stem, prompt)
        return self._picture(self.server.api.run(graph), workflow.node_of_type(graph, "SaveImage"))

    def row(self, row: Row) -> Iterator[Picture]:
        """One prompt's pictures, in the order of the columns."""
        graph = self.graph(COMPARISON, row.prompt)
        report_node = workflow.node_of_type(graph, "PreviewAny")
        pictures = {}
        for column, prefix in COLUMNS.items():
            self.progress(f"workflow {COMPARISON}: {row.prompt}, {column}")
            target = workflow.node_of(graph, filename_prefix=prefix)
            wanted = (target, report_node) if column == "UnGuide" else (target,)
            entry = self.server.api.run(workflow.upstream(graph, wanted))
            pictures[column] = Picture(row.prompt, column, self._picture(entry, target), seconds_of(entry))
        report = json.loads(entry["outputs"][report_node]["text"][0])
        self._fill(pictures, report)
        yield from pictures.values()

    def _fill(self, pictures: dict[str, Picture], report: dict[str, Any]) -> None:
        """What the gate's report says; the columns without a gate cost what it counted for plain sampling."""
        outcome = report["erasure"][0]
        unguide = pictures["UnGuide"]
        unguide.detected, unguide.score = outcome["decision"]["detected"], outcome["decision"]["score"]
        unguide.weight = outcome["weight"]
        for picture in pictures.values():
            picture.unet_evaluations = report["unet_evaluations_plain"]
        unguide.unet_evaluations = report["unet_evaluations_total"]

    def _picture(self, entry: dict[str, Any], node: str) -> bytes:
        images = self.server.api.images(entry).get(node)
        if not images:
            raise DevError(f"node {node} of the workflow saved no picture")
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


def judge_and_draw(host: Host, concept: str, rows: list[Row], pictures: list[Picture], output: Path) -> None:
    """Fills in the judge's class probabilities and draws grid.png, in the host's python."""
    folder = output / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    job: dict[str, Any] = {"title": f"UnGuide: '{concept}' erased", "subtitle": SUBTITLE, "pictures": []}
    job |= {"rows": [asdict(row) for row in rows], "columns": list(COLUMNS), "grid": str(output / "grid.png")}
    for number, picture in enumerate(pictures):
        row, column = divmod(number, len(COLUMNS))
        path = folder / f"{row + 1}_{picture.column.replace(' ', '_').lower()}.png"
        path.write_bytes(picture.png)
        same = picture.png == pictures[row * len(COLUMNS)].png and column > 0
        job["pictures"].append({**picture.entry(), "path": str(path), "same_as_base": same})
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
        raise DevError(f"judging and drawing the pictures failed and said '{said}'")
    for picture, probabilities in zip(pictures, json.loads(result.stdout), strict=True):
        picture.class_probabilities = probabilities


def failures(concept: str, rows: list[Row], pictures: list[Picture]) -> list[str]:
    """What is not as it must be, one phrase each: the concept still drawn, or an unrelated picture changed."""
    wrong = []
    for number, row in enumerate(rows):
        base, _, unguide = pictures[number * len(COLUMNS) : (number + 1) * len(COLUMNS)]
        if row.expected == ERASED and unguide.shown == concept:
            wrong.append(f"'{row.prompt}' still shows a {concept}")
        if row.expected == KEPT and unguide.png != base.png:
            wrong.append(f"'{row.prompt}' differs from the base model's picture")
    return wrong


def table(pictures: list[Picture]) -> str:
    """The report as a table for a terminal."""
    lines = [f"{'prompt':<32}{'column':<11}{'shows':<18}{'found':<7}{'score':>7}{'weight':>8}{'evals':>7}{'s':>7}"]
    for picture in pictures:
        first = picture.column == next(iter(COLUMNS))
        shown = f"{picture.shown} {picture.class_probabilities[picture.shown]:.0%}"
        gate = f"{'':<22}"
        if picture.detected is not None:
            gate = f"{'yes' if picture.detected else 'no':<7}{picture.score:>7.3f}{picture.weight:>8g}"
        cost = f"{picture.unet_evaluations:>7g}{picture.seconds:>7.1f}"
        lines.append(f"{picture.prompt[:31] if first else '':<32}{picture.column:<11}{shown:<18}{gate}{cost}")
    return "\n".join(lines)
