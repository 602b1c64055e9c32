"""The workflows, in ComfyUI's API format, that generate one image with each method.

It does not know the server; the defaults of a node's inputs come from the server's /object_info.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .api import Graph
from .methods import GATES, LORA, NEGATIVE, Method, Settings

IMAGE, REPORT = "image", "report"
"""The nodes whose outputs are read."""


@dataclass(frozen=True)
class Job:
    """One image to generate."""

    method: Method
    prompt: str
    seed: int
    cfg: float


def literal(prompt: str) -> str:
    """The prompt as ComfyUI's text node has to be given it, so that parentheses are text and no emphasis."""
    return prompt.replace("\\(", "(").replace("\\)", ")").replace("(", "\\(").replace(")", "\\)")


def image_graph(settings: Settings, job: Job, *, lora_by_host: bool = True, steps: int | None = None) -> Graph:
    """Return the workflow of one image; `complete` fills in the inputs that are not named here.

    Args:
        lora_by_host: the method "lora" uses the host's LoRA loader; else UnGuide without a gate, at weight 0.
        steps: others than the settings'.
    """
    method = job.method
    guided = method.is_guided or (method.way == LORA and not lora_by_host)
    graph = _common(settings, job)
    sampling: dict[str, Any] = {
        "model": ["checkpoint", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": ["latent", 0],
        "seed": job.seed,
        "steps": settings.steps if steps is None else steps,
        "cfg": job.cfg,
        "sampler_name": settings.sampler,
        "scheduler": settings.scheduler,
        "denoise": 1.0,
    }
    if not guided:
        if method.way == LORA:
            values = {"model": ["checkpoint", 0], "lora_name": settings.lora, "strength_model": method.value}
            graph["lora"] = _node("LoraLoaderModelOnly", **values)
            sampling["model"] = ["lora", 0]
        graph["sampler"] = _node("KSampler", **sampling)
        return graph
    strength = method.value if method.way == LORA else settings.strength
    graph |= erasure_graph(settings, strength)
    graph[REPORT] = _node("PreviewAny", source=["sampler", 3])
    if method.way in GATES:
        gate: dict[str, Any] = {"decide": GATES[method.way]}
    else:
        gate = {"decide": "always erase", "weight_detected": 0.0 if method.way == LORA else method.value}
    graph["settings"] = _node("UnGuideSettings", **gate)
    sampling |= {"erasure_lora": ["erasure", 0], "settings": ["settings", 0]}
    graph["sampler"] = _node("UnGuideSampler", **sampling)
    return graph


def erasure_graph(settings: Settings, strength: float) -> Graph:
    """The erasure LoRA, loaded for the checkpoint, and how its file was read as the node `REPORT`."""
    loading = {
        "lora_name": settings.lora,
        "strength": strength,
        "concept": literal(settings.concept_prompt),
        "clip": ["checkpoint", 1],
        "model": ["checkpoint", 0],
    }
    return {
        "checkpoint": _node("CheckpointLoaderSimple", ckpt_name=settings.checkpoint),
        "erasure": _node("UnGuideLoadErasureLora", **loading),
        REPORT: _node("PreviewAny", source=["erasure", 1]),
    }


def complete(graph: Graph, object_info: Mapping[str, Any]) -> Graph:
    """The graph with every required input that it leaves out at the node's default."""
    return {
        name: {**node, "inputs": {**defaults(object_info[node["class_type"]]), **node["inputs"]}}
        for name, node in graph.items()
    }


def defaults(info: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a node's required inputs that have one, by its /object_info."""
    found = {}
    for name, (kind, *rest) in info["input"].get("required", {}).items():
        options = rest[0] if rest else {}
        choices = kind if isinstance(kind, list) else options.get("options", [])
        if "default" in options:
            found[name] = options["default"]
        elif choices:
            found[name] = choices[0]
    return found


def _common(settings: Settings, job: Job) -> Graph:
    """Everything but the sampler. The image goes to the server's temporary folder: nothing stays there."""
    negative = settings.negative if job.method.way == NEGATIVE else ""
    return {
        "checkpoint": _node("CheckpointLoaderSimple", ckpt_name=settings.checkpoint),
        "positive": _node("CLIPTextEncode", text=literal(job.prompt), clip=["checkpoint", 1]),
        "negative": _node("CLIPTextEncode", text=literal(negative), clip=["checkpoint", 1]),
        "latent": _node("EmptyLatentImage", width=settings.size, height=settings.size, batch_size=1),
        "decoded": _node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        IMAGE: _node("PreviewImage", images=["decoded", 0]),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
