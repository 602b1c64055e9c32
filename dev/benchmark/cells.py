"""The work in resumable pieces: one method on one concept. Each leaves a file of judged pictures, whole or not at all.

Base's pictures are drawn first, once a class; everything else is compared with them.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demo.captions import CLASSES, words_for
from demo.erasure import LORAS, photo
from demo.seed import SEED_PATH
from dev.benchmark.attacks import Trial, attacks
from dev.benchmark.methods import alone, gate, gated, methods
from dev.benchmark.studio import LOOK_AT, STEPS, Drawing, Studio, judged, studio
from dev.cache import digest, file_digest
from dev.supervise import die_with_parent
from unguide_bench.scores import BASE, ERASED, OTHER, SYNONYM, Picture, read_pictures, write_pictures

TIMINGS, TIMES = "timings.json", 5
ATTACKS, ATTACK_SEEDS = "attacks", 8
LOOK_AGAIN = 3
"""Steps between the looks of a gate that looks again."""
LOOKING_AGAIN = f"{gated('selective', 'trajectory')}, looking again"
GUARDED = f"{gated('selective', 'trajectory')}, either and concept"


@dataclass(frozen=True)
class Asked:
    """A prompt, its kind as seen from the erased concept, and the class it asks for."""

    prompt: str
    kind: str
    label: str


@dataclass(frozen=True)
class Plan:
    """What a run draws.

    Args:
        folder: where its files are.
        seeds: a prompt's pictures, the same for every prompt.
    """

    folder: Path
    seeds: tuple[int, ...]
    concepts: tuple[str, ...] = CLASSES

    def file(self, method: str, concept: str) -> Path:
        """Judged pictures of a cell."""
        return self.folder / "cells" / f"{concept} - {method}.jsonl"

    def claim(self) -> None:
        """Makes the folder, or sees that its files are of this very plan.

        Raises: ValueError where they are of another one.
        """
        said = {"seeds": list(self.seeds), "steps": STEPS, "look_at": LOOK_AT, "models": models_digest()}
        settings = self.folder / "settings.json"
        if settings.exists() and json.loads(settings.read_text()) != said:
            raise ValueError(
                f"'{self.folder}' holds pictures of another run ({settings.read_text().strip()}); remove it, or name "
                "another folder with --out"
            )
        (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(said) + "\n")


def models_digest() -> str:
    """SHA-256 over the demo model's file and those of its erasure LoRAs."""
    files = [SEED_PATH, *sorted(LORAS.rglob("*.safetensors"))]
    return digest([[path.name, file_digest(path)] for path in files])


def asked(concept: str, others: Sequence[str] = CLASSES) -> list[Asked]:
    """The prompts of a concept's rows: its name, its synonyms, the other classes' names."""
    own = [Asked(photo(word), SYNONYM if i else ERASED, concept) for i, word in enumerate(words_for(concept))]
    return own + [Asked(photo(other), OTHER, other) for other in others if other != concept]


def start_worker() -> None:
    """Gives this process one core, and ends it with the one that started it."""
    import torch

    if end_with_parent := die_with_parent(signal.SIGTERM):
        end_with_parent()
    torch.set_num_threads(1)


def draw_base(plan: Plan, klass: str) -> None:
    """Base's latents and pictures of a class, by its name and synonyms."""
    import torch

    studio_ = studio()
    arrays: dict[str, Any] = {}
    with torch.inference_mode():
        draw = methods()[BASE]
        for word in words_for(klass):
            latents = draw(studio_, klass, photo(word), plan.seeds).latents
            arrays |= {f"{photo(word)} latents": latents.numpy(), photo(word): studio_.pictures(latents)}
    _write(_base_file(plan, klass), arrays)


def base_pictures(plan: Plan, klass: str) -> dict[str, Any]:
    """What `draw_base` left: by prompt pictures, uint8 [seeds, 64, 64, 3]; by "<prompt> latents" latents."""
    import numpy as np

    with np.load(_base_file(plan, klass), allow_pickle=False) as file:
        return dict(file)


def draw_cell(plan: Plan, method: str, concept: str) -> None:
    """Draws, judges and writes one method's pictures of one concept."""
    import torch

    studio_, records, first = studio(), [], {}
    draw = methods()[method]
    with torch.inference_mode():
        for one in asked(concept, plan.concepts):
            base = base_pictures(plan, one.label)
            if method == BASE:
                drawing = Drawing(torch.from_numpy(base[f"{one.prompt} latents"]), rows=2.0 * STEPS)
            else:
                drawing = draw(studio_, concept, one.prompt, plan.seeds)
            found, pictures = records_of(studio_, method, concept, one, plan.seeds, drawing, base)
            records += found
            first[one.prompt] = pictures[0]
    _write(plan.file(method, concept).with_suffix(".npz"), first)
    write_pictures(records, plan.file(method, concept))


def draw_attacks(plan: Plan, concept: str) -> None:
    """Draws, judges and writes a concept's attacks, with base, LoRA and three gates; a record's kind is the attack."""
    import torch

    studio_, records = studio(), []
    lora = studio_.lora("selective", concept)
    seeds = plan.seeds[:ATTACK_SEEDS]
    merged = studio_.merged(lora)
    with torch.inference_mode():
        latents = torch.from_numpy(base_pictures(plan, concept)[f"{photo(concept)} latents"])
        for attack, trials in attacks(studio_, concept, latents[: len(seeds)]):
            for trial in trials:
                for method, model in ((BASE, studio_.model), (alone("selective", 1.0), merged)):
                    drawing = studio_.draw(model, trial.positive, seeds, **trial.drawing)
                    records += _attacked(studio_, method, concept, attack, trial, seeds, drawing)
                plain = gate(studio_, "trajectory")
                for method, chosen in (
                    (gated("selective", "trajectory"), plain),
                    (LOOKING_AGAIN, replace(plain, look_again=LOOK_AGAIN)),
                    (GUARDED, guarded(plain)),
                ):
                    drawing = studio_.guided(lora, trial.positive, seeds, chosen, **trial.drawing)
                    records += _attacked(studio_, method, concept, attack, trial, seeds, drawing)
    write_pictures(records, plan.file(ATTACKS, concept))


def guarded(gate_: Any) -> Any:
    """A gate that decides by influence or alignment, and erases by the displacement on the concept's own prompt."""
    return replace(gate_, settings=replace(gate_.settings, statistic="either"), displacement="concept")


def _attacked(
    studio_: Studio, method: str, concept: str, attack: str, trial: Trial, seeds: Sequence[int], drawing: Drawing
) -> list[Picture]:
    asked_for = Asked(trial.text, attack, concept)
    return records_of(studio_, method, concept, asked_for, seeds, drawing, {})[0]


def records_of(
    studio_: Studio,
    method: str,
    concept: str,
    one: Asked,
    seeds: Sequence[int],
    drawing: Drawing,
    base: dict[str, Any],
) -> tuple[list[Picture], Any]:
    """The judged pictures of one prompt, and the pictures, uint8 [B, 64, 64, 3]."""
    import numpy as np

    pictures = studio_.pictures(drawing.latents)
    plain, latents = base.get(one.prompt), base.get(f"{one.prompt} latents")
    records = []
    for i, (seed, (seen, closest)) in enumerate(zip(seeds, judged(pictures), strict=True)):
        apart = None if plain is None else np.abs(pictures[i].astype(int) - plain[i].astype(int))
        records.append(
            Picture(
                method,
                concept,
                one.prompt,
                one.kind,
                one.label,
                seed,
                seen,
                drawing.detected[i] if drawing.detected else None,
                drawing.rows,
                0.0,
                None if apart is None else float(apart.mean()),
                None if apart is None else float(apart.max()),
                None if latents is None else drawing.latents[i].numpy().tobytes() == latents[i].tobytes(),
                closest,
                drawing.scores[i] if drawing.scores else None,
                drawing.thresholds[i] if drawing.thresholds else None,
            )
        )
    return records, pictures


def first_pictures(plan: Plan, method: str, concept: str) -> dict[str, Any]:
    """The first seed's picture of each prompt, uint8 [64, 64, 3]."""
    import numpy as np

    with np.load(plan.file(method, concept).with_suffix(".npz"), allow_pickle=False) as file:
        return dict(file)


def done(plan: Plan, method: str, concept: str) -> list[Picture]:
    """A finished cell's pictures, with the seconds that were timed for their method; none of an unfinished one."""
    path, timed = plan.file(method, concept), plan.folder / TIMINGS
    seconds = json.loads(timed.read_text()).get(method, {}) if timed.exists() else {}
    found = read_pictures(path) if path.exists() else ()
    return [replace(p, seconds=seconds.get(OTHER if p.kind == OTHER else ERASED, 0.0)) for p in found]


def time_methods(plan: Plan, chosen: Sequence[str], concept: str, other: str) -> None:
    """Times one picture of each method by itself, with the concept and without, while nothing else is drawn.

    All take turns, several times; the shortest time counts.
    """
    import torch

    path = plan.folder / TIMINGS
    known = json.loads(path.read_text()) if path.exists() else {}
    if set(chosen) <= set(known):
        return
    draws, prompts = methods(), {ERASED: photo(concept), OTHER: photo(other)}
    found: dict[str, dict[str, float]] = {method: dict.fromkeys(prompts, math.inf) for method in chosen}
    with torch.inference_mode():
        for _ in range(TIMES):
            for method in chosen:
                for kind, prompt in prompts.items():
                    started = time.perf_counter()
                    draws[method](studio(), concept, prompt, plan.seeds[:1])
                    found[method][kind] = min(found[method][kind], time.perf_counter() - started)
    path.write_text(json.dumps(found, indent=1) + "\n")


def base_done(plan: Plan, klass: str) -> bool:
    return _base_file(plan, klass).exists()


def _base_file(plan: Plan, klass: str) -> Path:
    return plan.folder / "cells" / f"{klass}.npz"


def _write(path: Path, arrays: dict[str, Any]) -> None:
    import numpy as np

    temporary = path.with_suffix(".part.npz")
    np.savez_compressed(temporary, **arrays)
    temporary.replace(path)
