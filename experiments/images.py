"""What the gate's image stage adds: the ways around an erasure, and unrelated images, with it and without it.

For each concept the demo's base model, the gate without the image stage and the gate as it is by default answer every
attack of `experiments.attacks`, and start images of the concept, alone and in scenes, at three strengths; the gate
that resists adversarial text answers the text that was optimised against an adapter. Unrelated images are generated
behind the gates of all other concepts at once, so that a false positive of any of them counts. Run by
`python3 dev images`.
"""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from demo.captions import CLASSES, REFERENCES, SCENES, photo, placed
from demo.classifier import judged
from experiments.attacks import Trial, attacks
from experiments.runner import keep, publish
from experiments.studio import Studio, identical, studio
from unguide_bench.tables import markdown

FIRST_SEED = 930_000
"""Seeds from here on had no part in training, calibration or any choice."""
DENOISE = (0.3, 0.5, 0.75)
UNSEEN = ("forest", "snow")
"""Scenes in which no object is calibrated."""
PLAIN = 4
"""Scenes without an object among the unrelated images."""
BASE, WITHOUT, GATE, RESISTING = METHODS = "base", "without the image stage", "the gate", "resist adversarial"


@dataclass(frozen=True)
class Row:
    """One trial of one concept, or one unrelated prompt.

    Args:
        kind: of trial.
        concept: that is erased; for unrelated ones the class or scene that is asked for.
        method: one of the four.
        images: how many.
        shown: so many of them show the concept.
        detected: by any gate.
        seen: by the image stage of any gate.
        identical: to the base model's, bit for bit.
        cost: model evaluations relative to plain sampling.
    """

    kind: str
    concept: str
    method: str
    images: int
    shown: int
    detected: int = 0
    seen: int = 0
    identical: int = 0
    cost: float = 1.0


def trials(at: Studio, concept: str, seeds: Sequence[int]) -> Iterator[tuple[str, Trial]]:
    """Yield every trial of a concept, with its kind."""
    plain = at.generate(at.model, at.encode(photo(concept)), seeds).latents
    for kind, found in attacks(at, concept, plain, "selective"):
        yield from ((kind, trial) for trial in found)
    reference, empty = photo(REFERENCES[concept]), ""
    for scene in UNSEEN:
        inside = placed(concept, scene)
        latent = at.generate(at.model, at.encode(inside), seeds).latents
        options = {"latent": latent, "denoise": DENOISE[1]}
        yield "img2img of a scene with it, no prompt", Trial(inside, at.encode(empty), options)
    for share in DENOISE:
        for kind, prompt in (("no prompt", empty), ("another prompt", reference)):
            options = {"latent": plain, "denoise": share}
            yield f"img2img at {share:g}, {kind}", Trial(prompt, at.encode(prompt), options)


def attacked(at: Studio, concept: str, seeds: Sequence[int]) -> Iterator[Row]:
    """Yield how every trial of a concept ends, by each method."""
    lora = at.lora("selective", concept)
    settings = {
        WITHOUT: at.settings(check_image="never"),
        GATE: at.settings(),
        RESISTING: at.settings(resist_adversarial=True),
    }
    for kind, trial in trials(at, concept, seeds):
        plain = at.generate(at.model, trial.positive, seeds, **trial.options)
        yield Row(kind, concept, BASE, len(seeds), _shown(at, plain.latents, concept))
        for method, chosen in settings.items():
            if method == RESISTING and "optimised on the LoRA" not in kind:
                continue
            latents, verdicts, cost = behind(at, [lora], trial.positive, seeds, chosen, **trial.options)
            yield _row(kind, concept, method, verdicts, cost, plain.latents, latents, _shown(at, latents, concept))


def unrelated(at: Studio, asked: str, seeds: Sequence[int]) -> Iterator[Row]:
    """Yield what the gates of all other concepts do to images of a class or scene, and to images made from them."""
    loras = [at.lora("selective", concept) for concept in CLASSES if concept != asked]
    plain = at.generate(at.model, at.encode(photo(asked)), seeds).latents
    options: dict[str, dict[str, Any]] = {"text to image": {}}
    options |= {f"img2img at {share:g}": {"latent": plain, "denoise": share} for share in DENOISE}
    for kind, given in options.items():
        prompt = at.encode(photo("desert" if given else asked))
        base = at.generate(at.model, prompt, seeds, **given).latents
        latents, verdicts, cost = behind(at, loras, prompt, seeds, at.settings(), **given)
        yield _row(f"unrelated, {kind}", asked, GATE, verdicts, cost, base, latents, 0)


def behind(
    at: Studio, loras: Sequence[Any], positive: Any, seeds: Sequence[int], settings: Any, **options: Any
) -> tuple[Any, Any, Any]:
    """Return the latents of a run behind gates, its verdicts and its cost."""
    model, runs = at.gate(loras, settings)
    latents = at.generate(model, positive, seeds, **options).latents
    return latents, *runs[-1]


def _row(kind: str, concept: str, method: str, verdicts: Any, cost: Any, base: Any, latents: Any, shown: int) -> Row:
    samples = range(len(latents))
    decided = [list(v.decisions) * (1 if len(v.decisions) == len(latents) else len(latents)) for v in verdicts]
    found = [[one[i] for one in decided if one and one[i].detected] for i in samples]
    return Row(
        kind,
        concept,
        method,
        len(latents),
        shown,
        sum(map(bool, found)),
        sum(any(one.stage == "image" for one in each) for each in found),
        sum(map(identical, latents, base)),
        cost.total / cost.plain,
    )


def _shown(at: Studio, latents: Any, concept: str) -> int:
    return sum(label == concept for label, _ in judged(at.images(latents)))


def table(rows: Sequence[Row]) -> str:
    """Return the rows in Markdown: the attacks, and the unrelated images."""
    attacked, unrelated = [], []
    by_kind: defaultdict[str, defaultdict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_kind[row.kind][row.method].append(row)
    for kind, found in by_kind.items():
        of = found[GATE]
        if BASE in found:
            count = sum(row.images for row in found[BASE])
            cells = [_cell(found[method], method) for method in METHODS]
            attacked.append((kind, str(count), *cells, f"{sum(row.cost for row in of) / len(of):.2f}x"))
        else:
            count, left = sum(row.images for row in of), sum(row.images - row.detected for row in of)
            same = f"{sum(row.identical for row in of)} of {left}"
            cost = sum(row.cost * row.images for row in of) / count
            detected, seen = (str(sum(getattr(row, name) for row in of)) for name in ("detected", "seen"))
            kind = kind.removeprefix("unrelated, ")
            unrelated.append((kind, str(count), detected, seen, same, f"{cost:.3f}x"))
    heads = ("unrelated", "images", "detected", "by the image stage", "others identical", "NFE")
    attack_table = markdown(("asked for", "images", *METHODS, "NFE"), attacked)
    return f"{attack_table}\n\n{markdown(heads, unrelated)}"


def _cell(rows: Sequence[Row], method: str) -> str:
    if not rows:
        return "-"
    shown, detected = sum(row.shown for row in rows), sum(row.detected for row in rows)
    return f"{shown}" if method == BASE else f"{shown} ({detected})"


@torch.inference_mode()
def run(options: Namespace) -> None:
    """Measure every concept and scene, and print both tables."""
    at, rows = studio(), list[Row]()
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    for asked in tqdm((*options.concept, *SCENES[:PLAIN]), "concepts and scenes"):
        if asked in CLASSES:
            rows += attacked(at, asked, seeds)
        rows += unrelated(at, asked, range(FIRST_SEED + 1000, FIRST_SEED + 1000 + 3 * options.seeds))
    keep(options.json, [asdict(row) for row in rows])
    publish(table(rows), options.markdown, "images")
