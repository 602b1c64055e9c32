"""Draws pictures on one running ComfyUI, and asks it beforehand whether it can."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from .api import Api, ApiError, ExecutionFailedError, seconds_of
from .errors import BenchError
from .graphs import PICTURE, REPORT, Job, complete, defaults, erasure_graph, picture_graph
from .methods import FIXED, LORA, NEGATIVE, Method, Settings
from .scores import BASE

NODES = (
    *("CheckpointLoaderSimple", "CLIPTextEncode", "EmptyLatentImage", "KSampler", "LoraLoaderModelOnly", "VAEDecode"),
    *("PreviewImage", "PreviewAny", "UnGuideLoadErasureLora", "UnGuideSampler"),
)


@dataclass(frozen=True)
class Drawing:
    """A drawn picture.

    Args:
        png: its file.
        seconds: that the server worked on it.
        evaluations: UNet rows that the picture took.
        detected, score, threshold: the gate's decision; None without a gate.
    """

    png: bytes = field(repr=False)
    seconds: float
    evaluations: float
    detected: bool | None = None
    score: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Plan:
    """What is known after `Painter.prepare`, the same for every server of a run.

    Args:
        settings: with the concept's prompt that the gate uses.
        lora_by_host: the host's LoRA loader reads the file; else "LoRA only" is drawn by UnGuide at weight 0.
        plain: UNet rows of a picture without a LoRA, by whether it is guided (cfg other than 1).
        gate: UnGuide's inputs that are at the node's default.
    """

    settings: Settings
    lora_by_host: bool
    plain: dict[bool, float]
    gate: dict[str, Any]


class Painter:
    """One server.

    Args:
        timeout: seconds that a picture may take.
    """

    def __init__(self, url: str, settings: Settings, timeout: float = 600.0) -> None:
        self.api, self.settings, self.timeout = Api(url), settings, timeout

    @cached_property
    def object_info(self) -> dict[str, Any]:
        """What the server says of the nodes that are used. Raises: BenchError where it lacks one."""
        found: dict[str, Any] = {}
        for name in NODES:
            found |= self.api.get(f"/object_info/{name}")
        if missing := [name for name in NODES if name not in found]:
            raise BenchError(
                f"ComfyUI at {self.api.url} has no node {', '.join(missing)}; "
                "install comfyui-unguide into its custom_nodes, and restart it"
            )
        return found

    def check(self) -> None:
        """Raises: BenchError where the server lacks a node, a file, the sampler or the scheduler; ApiError."""
        wanted = {
            ("CheckpointLoaderSimple", "ckpt_name"): self.settings.checkpoint,
            ("UnGuideLoadErasureLora", "lora_name"): self.settings.lora,
            ("KSampler", "sampler_name"): self.settings.sampler,
            ("KSampler", "scheduler"): self.settings.scheduler,
        }
        for (node, name), value in wanted.items():
            kind, *rest = self.object_info[node]["input"]["required"][name]
            choices = kind if isinstance(kind, list) else rest[0]["options"]
            if value not in choices:
                listed = ", ".join(choices[:20]) + (", ..." if len(choices) > 20 else "") or "none"
                raise BenchError(f"ComfyUI at {self.api.url} has no {name} {value!r}; it has {listed}")

    def prepare(self, jobs: Iterable[Job], target: str) -> Plan:
        """Checks the server, loads the files, and counts what plain pictures take.

        Args:
            target: the concept's prompt, used for the gate where neither the settings nor the LoRA's card have one.
        Raises: BenchError, ApiError.
        """
        self.check()
        jobs = list(jobs)
        settings = self.settings
        if not settings.concept_prompt and not self._loaded()["concept"]:
            settings = replace(settings, concept_prompt=target)
        self.settings = settings
        ways = {job.method.way for job in jobs}
        unguided = [job for job in jobs if job.method.way in (BASE, NEGATIVE, LORA)]
        return Plan(
            settings,
            lora_by_host=LORA not in ways or self._host_reads_lora(next(j for j in jobs if j.method.way == LORA)),
            plain={guided: self._plain(job) for guided, job in {job.cfg != 1: job for job in unguided}.items()},
            gate=self._gate(),
        )

    def draw(self, job: Job, plan: Plan) -> Drawing:
        """The picture of a job. Raises: ApiError; NoAnswerError where the server is gone."""
        entry = self._run(job, lora_by_host=plan.lora_by_host)
        png, seconds = self._picture(entry), seconds_of(entry)
        if REPORT not in entry["outputs"]:
            return Drawing(png, seconds, plan.plain[job.cfg != 1])
        report = _report(entry)
        (outcome,) = report["erasure"] or [{}]
        decision = outcome.get("decision") or {}
        return Drawing(
            png,
            seconds,
            report["unet_evaluations_total"],
            detected=decision.get("detected"),
            score=decision.get("score"),
            threshold=decision.get("threshold"),
        )

    def _gate(self) -> dict[str, Any]:
        """UnGuide's own inputs, beyond KSampler's, at the node's defaults."""
        known = {*self.object_info["KSampler"]["input"]["required"], "gate_mode"}
        return {k: v for k, v in defaults(self.object_info["UnGuideSampler"]).items() if k not in known}

    def _run(self, job: Job, **changes: Any) -> dict[str, Any]:
        graph = complete(picture_graph(self.settings, job, **changes), self.object_info)
        return self.api.run(graph, self.timeout)

    def _picture(self, entry: dict[str, Any]) -> bytes:
        images = self.api.images(entry).get(PICTURE)
        if not images:
            raise ApiError(f"ComfyUI at {self.api.url} finished a workflow without its picture; look into its log")
        return images[0]

    def _loaded(self) -> dict[str, Any]:
        """How the server read the erasure LoRA."""
        graph = complete(erasure_graph(self.settings, self.settings.strength), self.object_info)
        return _report(self.api.run(graph, self.timeout))

    def _plain(self, job: Job) -> float:
        """UNet rows of a plain picture, as UnGuide counts them where it leaves the base model alone."""
        entry = self._run(replace(job, method=Method(FIXED, 1.0)))
        return float(_report(entry)["unet_evaluations_plain"])

    def _host_reads_lora(self, job: Job) -> bool:
        """Whether the host's LoRA loader changes a picture's first step: it passes over names that it does not know."""
        try:
            applied = self._picture(self._run(job, steps=1))
        except ExecutionFailedError:
            return False
        return _pixels(applied) != _pixels(self._picture(self._run(replace(job, method=Method(BASE)), steps=1)))


def _report(entry: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(entry["outputs"][REPORT]["text"][0]))


def _pixels(png: bytes) -> bytes:
    """A picture without its file's metadata, which hold the workflow."""
    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()
