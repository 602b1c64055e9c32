"""Measures the demo's erasure LoRAs on the narrow model: what they erase and keep.

Images: Acc_e (the erased class), Acc_g (its synonyms; both lower is better) and Acc_s (the nine other classes; higher
is better), for the base model, the LoRA alone, and the weights that a gate may choose. It does not know training, nor
how well a gate decides (`python3 dev gate`).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from unguide_core.formats import load_adapter
from unguide_core.schedule import partial_denoise, to_sigma_space

from .captions import CLASSES, SCENES, SYNONYMS, photo, placed, words_for
from .classifier import classify
from .erasure import SETS, narrowed, path_of
from .narrow import (
    LATENT,
    Layers,
    Narrow,
    adapted_table,
    base_hash,
    joined,
    normal_sigmas,
    start_worker,
    worker_model,
)

log = logging.getLogger("demo.erasure")

Judge = Callable[[Tensor], Tensor]
"""Latents [B, 4, H, W] to class numbers [B]; `len(CLASSES)` is "other"."""

BLENDS = (-1.0,)
"""Weights of the base model that a gate may choose for a detected prompt, besides 0, the LoRA alone."""
OTHER_SCENES = SCENES[1::3]
"""Scenes that concepts are placed in; other ones than those of the cards' calibration (`dev/calibration.py`)."""
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

# ---------------------------------------------------------------- images


@torch.no_grad()
def generate(
    narrow: Narrow,
    prompts: Sequence[str],
    images: int,
    layers: Layers | None = None,
    weight: float = 0.0,
    first: int = 0,
) -> Tensor:
    """Returns latents generated for each prompt from the same noises, [prompts, images, 4, H, W].

    Args:
        layers: an adapter; None for the base model alone.
        weight: the base model's weight in the blend with the adapted one; 0 is the adapter alone.
        first: the step from which on the adapter acts; before it the base model generates.
    """
    states = narrow.encode([*prompts, ""])
    base = narrow.table(states)
    table = base if layers is None else joined(adapted_table(base, states, layers), base)
    noise = torch.stack(
        [torch.randn(LATENT, generator=torch.Generator().manual_seed(10_000 + i)) for i in range(images)]
    )
    sigmas = normal_sigmas()
    start = to_sigma_space(noise, float(sigmas[0])).repeat(len(prompts), 1, 1, 1)
    rows = torch.arange(len(prompts)).repeat_interleave(images)
    generated = []
    for x, cond in zip(start.split(64), rows.split(64), strict=True):
        uncond = torch.full_like(cond, len(prompts))
        blended, shift = None, len(states)
        if layers is not None and first:
            with torch.autocast("cpu", torch.bfloat16):
                x = partial_denoise(narrow.denoise(table, cond + shift, uncond + shift), x, sigmas[: first + 1])
        if layers is not None and weight != 0.0:
            blended = (cond, uncond, torch.full(cond.shape, weight))
            cond, uncond = cond + shift, uncond + shift
        with torch.autocast("cpu", torch.bfloat16):
            generated.append(partial_denoise(narrow.denoise(table, cond, uncond, adapted=blended), x, sigmas[first:]))
    return torch.cat(generated).unflatten(0, (len(prompts), images))


def accuracies(narrow: Narrow, judge: Judge, prompts: Mapping[str, str], images: int, **options) -> dict[str, float]:
    """Returns the share of each prompt's images that show the prompt's class, in percent.

    Args:
        prompts: class by prompt.
        options: `layers`, `weight` and `first` of `generate`.
    """
    latents = generate(narrow, list(prompts), images, **options)
    labels = judge(latents.flatten(0, 1)).view(len(prompts), images)
    wanted = torch.tensor([CLASSES.index(klass) for klass in prompts.values()])
    shares = (labels == wanted[:, None]).float().mean(1) * 100
    return dict(zip(prompts, shares.tolist(), strict=True))


@dataclass(frozen=True)
class Accuracy:
    """Percent: erased (the concept), general (the mean of its synonyms), placed (the mean of the concept in scenes),
    spared (the mean of the other classes).
    """

    erased: float
    general: float
    placed: float
    spared: float | None = None
    worst_spared: float | None = None

    @property
    def harmonic(self) -> float | None:
        """The harmonic mean of (100 - erased), spared and (100 - general)."""
        if self.spared is None:
            return None
        parts = (100.0 - self.erased, self.spared, 100.0 - self.general)
        return 3.0 / sum(1.0 / part for part in parts) if all(parts) else 0.0


def summary(concept: str, shares: Mapping[str, float]) -> Accuracy:
    """Returns the accuracies of one concept's erasure from the shares of prompts; others' shares may be missing."""
    general = _mean([shares[photo(word)] for word in SYNONYMS[concept]])
    others = [shares[photo(c)] for c in CLASSES if c != concept and photo(c) in shares]
    spared = (_mean(others), min(others)) if others else (None, None)
    inside = _mean([shares[placed(concept, scene)] for scene in OTHER_SCENES])
    return Accuracy(shares[photo(concept)], general, inside, *spared)


def own_prompts(concept: str) -> dict[str, str]:
    """Returns the prompts that must not be generated any more, with the class."""
    prompts = [photo(word) for word in words_for(concept)] + [placed(concept, scene) for scene in OTHER_SCENES]
    return dict.fromkeys(prompts, concept)


def other_prompts(concept: str) -> dict[str, str]:
    """Returns the prompts of the nine other classes, with the class."""
    return {photo(other): other for other in CLASSES if other != concept}


# ---------------------------------------------------------------- command


def judge(latents: Tensor) -> Tensor:
    """Returns what the demo's classifier takes decoded latents for, as numbers of its `LABELS`."""
    decoder = worker_model().decoder
    images = torch.cat([decoder(part).clamp(0, 1) for part in latents.split(64)])
    return classify(images).argmax(dim=-1)


def accuracy_task(
    path: Path | None, prompts: dict[str, str], images: int, weight: float, first: int = 0
) -> dict[str, float]:
    """Returns the accuracies of prompts under an adapter's file, in percent."""
    layers = None if path is None else narrowed(load_adapter(path))
    return accuracies(worker_model(), judge, prompts, images, layers=layers, weight=weight, first=first)


def evaluate(options: argparse.Namespace) -> None:
    """Measures the sets, prints the tables, and writes figures and tables beside the sets."""
    out: Path = options.out
    measured_path, report_path = out / "measured.json", out.parent / "LORAS.md"
    measured = json.loads(measured_path.read_text()) if measured_path.exists() else {}
    model = base_hash(options.model)
    if measured.get("base_hash") != model:
        measured = {"base_hash": model}
    worker = (options.tokenizer, options.model)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), start_worker, worker) as pool:
        measured["pictures"] = measure_images(pool, options, measured.get("pictures", {}))
    measured_path.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")
    table = image_table(measured["pictures"])
    print(table)
    text = report_path.read_text() if report_path.exists() else f"{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    report_path.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{rest.split(END)[1]}")


def measure_images(pool: ProcessPoolExecutor, options: argparse.Namespace, known: dict) -> dict:
    """Returns accuracies by concept: of the base model, and by set of the LoRA alone and of blends.

    Args:
        known: what was measured before; kept where nothing new is asked for.
    """
    began = time.monotonic()
    every = {prompt: klass for klass in CLASSES for prompt in own_prompts(klass)}
    counts = {"pictures": options.images, "others": options.others}
    result = known if {name: known.get(name) for name in counts} == counts else dict(counts)
    base = None if "base" in result else pool.submit(accuracy_task, None, every, options.images, 1.0)
    tasks = {}
    for objective in options.set:
        for concept in options.concept:
            path = path_of(options.out, objective, concept)
            own, others = own_prompts(concept), other_prompts(concept)
            tasks[objective, concept, "alone"] = pool.submit(accuracy_task, path, own, options.images, 0.0)
            tasks[objective, concept, "others"] = pool.submit(accuracy_task, path, others, options.others, 0.0)
            for weight in BLENDS:
                task = pool.submit(accuracy_task, path, own, options.images, weight)
                tasks[objective, concept, f"weight {weight:g}"] = task
    if base is not None:
        result["base"] = {concept: asdict(summary(concept, base.result())) for concept in CLASSES}
    for number, ((objective, concept, what), task) in enumerate(tasks.items(), start=1):
        entry = result.setdefault(objective, {}).setdefault(concept, {})
        entry[what] = task.result()
        left = (time.monotonic() - began) * (len(tasks) / number - 1)
        log.info("%s %s, %s: %d of %d, %.0f s left", objective, concept, what, number, len(tasks), left)
    for objective in options.set:
        for concept in options.concept:
            entry = result[objective][concept]
            entry["alone"] = asdict(summary(concept, {**entry["alone"], **entry.pop("others")}))
            for weight in BLENDS:
                entry[f"weight {weight:g}"] = asdict(summary(concept, entry[f"weight {weight:g}"]))
    return result


# ---------------------------------------------------------------- tables


def image_table(result: dict) -> str:
    """Returns a row per concept and one of means: Acc_e / Acc_g / in scenes / Acc_s in percent."""
    sets = [name for name in SETS if name in result]
    blends = [f"weight {weight:g}" for weight in BLENDS]
    titles = ["base", *(f"{name}, alone" for name in sets), *(f"{name}, {b}" for name in sets for b in blends)]
    columns: list[list[dict]] = [[result["base"][c] for c in CLASSES]]
    columns += [[result[name].get(c, {}).get("alone") for c in CLASSES] for name in sets]
    columns += [[result[name].get(c, {}).get(b) for c in CLASSES] for name in sets for b in blends]
    lines = [f"| concept | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    lines += [
        f"| {concept} | {' | '.join(_cell(column[i]) for column in columns)} |" for i, concept in enumerate(CLASSES)
    ]
    means = []
    for column in columns:
        present = [entry for entry in column if entry]
        fields = ("erased", "general", "placed", "spared")
        known = {f: [entry[f] for entry in present if entry[f] is not None] for f in fields}
        means.append(_cell({f: _mean(values) if values else None for f, values in known.items()}))
    return "\n".join([*lines, f"| **mean** | {' | '.join(means)} |"])


def _cell(entry: dict | None) -> str:
    if not entry:
        return "-"
    return " / ".join(f"{entry[f]:.0f}" for f in ("erased", "general", "placed", "spared") if entry[f] is not None)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
