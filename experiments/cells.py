"""The work in resumable pieces: one method on one concept. Each leaves a file of judged images, whole or not at all.

The base model's images are generated first, once per class; everything else is compared with them.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.captions import CLASSES, REFERENCES, SYNONYMS, photo, words_for
from demo.erasure import LORAS
from demo.seed import SEED_PATH
from dev.cache import digest, file_digest
from experiments.attacks import Trial, attacks
from experiments.methods import REPLACED, alone, gate, gated, methods, reference_prompt
from experiments.scenes import scene_prompts
from experiments.studio import (
    CLOSED_FORM,
    PRESET,
    PROBE_STEPS,
    STEPS,
    Asked,
    Generated,
    Studio,
    asked,
    asked_in_scenes,
    studio,
)
from experiments.training import InTheGraph, erasure_lora
from unguide_bench.scores import BASE, ERASED, OTHER, JudgedImage, read_images, write_images, write_whole
from unguide_core.formats import load_adapter, save_adapter

TIMINGS, TIMES = "timings.json", 5
ATTACKS, ATTACK_SEEDS = "attacks", 8
FEW_STEPS, FEW, FEW_SEEDS = "few steps", (1, 2, 4, 8), 8
FEW_SETS = ("selective", PRESET, CLOSED_FORM)
TRAINING_SEED = 2626
"""Of the set that is trained; no other experiment trains with it."""
RECHECK_EVERY = 3
"""Steps between the probes of a gate that re-probes."""
REPROBING = f"{gated('selective')}, re-probing"
RESISTING = f"{gated('selective')}, resist adversarial"


@dataclass(frozen=True)
class Plan:
    """What a run generates.

    Args:
        folder: where its files are.
        seeds: of each prompt's images, the same for every prompt.
    """

    folder: Path
    seeds: tuple[int, ...]
    concepts: tuple[str, ...] = CLASSES

    def file(self, method: str, concept: str) -> Path:
        """Return where the judged images of a cell are."""
        return self.folder / "cells" / f"{concept} - {method}.jsonl"

    def trained(self, concept: str) -> Path:
        """Return where the adapter is that is trained as a user would train it."""
        return self.folder / "trained" / f"{concept}.safetensors"

    def claim(self) -> None:
        """Make the folder, or check that its files are of this plan.

        Raises: ValueError if they are of another one.
        """
        wanted = {"seeds": list(self.seeds), "steps": STEPS, "probe_steps": PROBE_STEPS}
        wanted |= {"models": models_digest(), "code": code_digest()}
        settings = self.folder / "settings.json"
        if settings.exists() and json.loads(settings.read_text()) != wanted:
            raise ValueError(
                f"'{self.folder}' holds images of another run ({settings.read_text().strip()}); remove it, or name "
                "another folder with --out"
            )
        for name in ("cells", "trained"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(wanted) + "\n")


def models_digest() -> str:
    """Return the SHA-256 over the demo model's file and those of its erasure LoRAs."""
    files = [SEED_PATH, *sorted(LORAS.rglob("*.safetensors"))]
    return digest([[path.name, file_digest(path)] for path in files])


def code_digest() -> str:
    """Return the SHA-256 over the code that an image follows from, so that a table is of one state of it."""
    root = SEED_PATH.parents[1]
    folders = ("unguide_core", "unguide_comfy", "nodes", "experiments", "demo")
    files = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    return digest([[str(path.relative_to(root)), file_digest(path)] for path in files])


def train(plan: Plan, concept: str) -> None:
    """Train a concept as a user would, by the node with its defaults, and write the adapter."""
    trained = InTheGraph(studio(), TRAINING_SEED).lora(concept, REFERENCES[concept], SYNONYMS[concept])
    save_adapter(trained.adapter, plan.trained(concept))


def knowing(plan: Plan, concept: str) -> Studio:
    """Return this process's studio, which knows the concept's trained adapter where there is one."""
    at = studio()
    if plan.trained(concept).exists():
        at.add(PRESET, concept, erasure_lora(at, concept, load_adapter(plan.trained(concept))))
    return at


def generate_base(plan: Plan, klass: str) -> None:
    """Generate and write the base model's latents and images of a class: its name, synonyms, and in scenes."""
    studio_ = studio()
    arrays: dict[str, Any] = {}
    with torch.inference_mode():
        generate = methods()[BASE]
        for prompt in (*map(photo, words_for(klass)), *scene_prompts(klass)):
            latents = generate(studio_, klass, prompt, plan.seeds).latents
            arrays |= {f"{prompt} latents": latents.numpy(), prompt: studio_.images(latents)}
    _write(_base_file(plan, klass), arrays)


def base_images(plan: Plan, klass: str) -> dict[str, Any]:
    """Return what `generate_base` wrote: images by prompt, uint8 [seeds, 64, 64, 3]; latents by "<prompt> latents"."""
    with np.load(_base_file(plan, klass), allow_pickle=False) as file:
        return dict(file)


def generate_cell(plan: Plan, method: str, concept: str) -> None:
    """Generate, judge and write one method's images of one concept."""
    studio_, records, first = knowing(plan, concept), [], {}
    generate = methods()[method]
    with torch.inference_mode():
        reference = reference_prompt(studio_, method, concept)
        for one in (*asked(concept, plan.concepts), *asked_in_scenes(concept)):
            known = base_images(plan, one.label)
            base = known[f"{one.prompt} latents"], known[one.prompt]
            if method == BASE:
                generated = Generated(torch.from_numpy(base[0]), 2.0 * STEPS)
            else:
                generated = generate(studio_, concept, one.prompt, plan.seeds)
            new, images = studio_.judge(method, concept, [one], plan.seeds, generated, base, reference)
            records += new
            first[one.prompt] = images[0]
    _write(plan.file(method, concept).with_suffix(".npz"), first)
    write_images(records, plan.file(method, concept))


def generate_attacks(plan: Plan, concept: str) -> None:
    """Generate, judge and write a concept's attacks: on base, trained LoRA and its gates, closed form and its gate.

    A record's kind is the attack.
    """
    studio_, records = studio(), []
    seeds = plan.seeds[:ATTACK_SEEDS]
    with torch.inference_mode():
        latents = torch.from_numpy(base_images(plan, concept)[f"{photo(concept)} latents"])
        for kind in ("selective", CLOSED_FORM):
            lora = studio_.lora(kind, concept)
            plain = {alone(kind, 1.0): studio_.merged(lora)} | ({BASE: studio_.model} if kind == "selective" else {})
            for attack, trials in attacks(studio_, concept, latents[: len(seeds)], kind):
                for trial in trials:
                    for method, model in plain.items():
                        generated = studio_.generate(model, trial.positive, seeds, **trial.options)
                        records += _attacked(studio_, method, concept, attack, trial, seeds, generated)
                    for method, settings in gates(studio_, kind).items():
                        generated = studio_.guided(lora, trial.positive, seeds, settings, **trial.options)
                        records += _attacked(studio_, method, concept, attack, trial, seeds, generated)
    write_images(records, plan.file(ATTACKS, concept))


def generate_few_steps(plan: Plan, concept: str) -> None:
    """Generate, judge and write a concept's images of few steps, behind the gates of several sets.

    The base model's images of the reference prompt stand beside them. A record's kind is the number of steps.
    """
    studio_, records = knowing(plan, concept), []
    seeds = plan.seeds[:FEW_SEEDS]
    own = [one for one in asked(concept) if one.kind != OTHER]
    batch = studio_.batch([one.prompt for one in own], seeds)
    plain = {BASE: batch, REPLACED: studio_.batch([photo(REFERENCES[concept])] * len(own), seeds)}
    with torch.inference_mode():
        for steps in FEW:
            kind = f"{steps} step{'s' * (steps > 1)}"
            runs = {method: studio_.generate(studio_.model, **given, steps=steps) for method, given in plain.items()}
            for of in FEW_SETS:
                lora = studio_.lora(of, concept)
                runs[gated(of)] = studio_.guided(lora, settings=studio_.settings(), **batch, steps=steps)
            for method, generated in runs.items():
                renamed = [replace(one, kind=kind) for one in own]
                records += studio_.judge(method, concept, renamed, seeds, generated)[0]
    write_images(records, plan.file(FEW_STEPS, concept))


def gates(studio_: Studio, kind: str) -> dict[str, Any]:
    """Return the settings of the gates of a set that are attacked, by the names of their methods."""
    if kind == CLOSED_FORM:
        return {gated(kind): gate(studio_)}
    return {
        gated("selective"): gate(studio_),
        REPROBING: gate(studio_, on_detection="continue", recheck_every=RECHECK_EVERY),
        RESISTING: gate(studio_, resist_adversarial=True),
    }


def _attacked(
    studio_: Studio, method: str, concept: str, attack: str, trial: Trial, seeds: Sequence[int], generated: Generated
) -> list[JudgedImage]:
    asked_for = Asked(trial.text, attack, concept)
    return studio_.judge(method, concept, [asked_for], seeds, generated)[0]


def first_images(plan: Plan, method: str, concept: str) -> dict[str, Any]:
    """Return the first seed's image of each prompt, uint8 [64, 64, 3]."""
    with np.load(plan.file(method, concept).with_suffix(".npz"), allow_pickle=False) as file:
        return dict(file)


def done(plan: Plan, method: str, concept: str) -> list[JudgedImage]:
    """Return a finished cell's images, with the seconds that their method was timed at; none of an unfinished one."""
    path, timed = plan.file(method, concept), plan.folder / TIMINGS
    seconds = json.loads(timed.read_text()).get(method, {}) if timed.exists() else {}
    images = read_images(path) if path.exists() else ()
    return [replace(one, seconds=seconds.get(OTHER if one.kind == OTHER else ERASED, 0.0)) for one in images]


def time_methods(plan: Plan, chosen: Sequence[str], concept: str, other: str) -> None:
    """Time one image of each method by itself, with the concept and without, while nothing else runs.

    All take turns, several times; the shortest time counts.
    """
    path = plan.folder / TIMINGS
    known = json.loads(path.read_text()) if path.exists() else {}
    if set(chosen) <= set(known):
        return
    at, known_methods, prompts = knowing(plan, concept), methods(), {ERASED: photo(concept), OTHER: photo(other)}
    times: dict[str, dict[str, float]] = {method: dict.fromkeys(prompts, math.inf) for method in chosen}
    with torch.inference_mode():
        for _ in range(TIMES):
            for method in chosen:
                for kind, prompt in prompts.items():
                    started = time.perf_counter()
                    known_methods[method](at, concept, prompt, plan.seeds[:1])
                    times[method][kind] = min(times[method][kind], time.perf_counter() - started)
    path.write_text(json.dumps(times, indent=1) + "\n")


def base_done(plan: Plan, klass: str) -> bool:
    return _base_file(plan, klass).exists()


def _base_file(plan: Plan, klass: str) -> Path:
    return plan.folder / "cells" / f"{klass}.npz"


def _write(path: Path, arrays: dict[str, Any]) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_whole(path, file.getvalue())
