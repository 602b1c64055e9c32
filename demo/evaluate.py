"""Measures the demo's erasure LoRAs on the narrow model: what they erase and spare, and whether a gate can tell.

Pictures: Acc_e (the erased class), Acc_g (its synonyms; both lower is better) and Acc_s (the nine other classes; higher
is better), for the base model, the LoRA alone, and the weights that a gate may choose. Gate: the three statistics of
`unguide_core.probe`, where the product's probe takes them. It does not know training.
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
from unguide_core.probe import alignment, influence
from unguide_core.trajectory import from_sigma_space, partial_denoise, to_sigma_space

from .captions import CLASSES, SCENES, SYNONYMS, words_for
from .classifier import classify
from .erasure import PROBE_STEPS, SETS, narrowed, path_of, photo, placed
from .narrow import (
    LATENT,
    Layers,
    Narrow,
    Table,
    adapted_table,
    base_sha256,
    joined,
    normal_sigmas,
    start_worker,
    timestep_of,
    worker_model,
)

log = logging.getLogger("demo.erasure")

Judge = Callable[[Tensor], Tensor]
"""Latents [B, 4, H, W] to class numbers [B]; `len(CLASSES)` is "other"."""

BLENDS = (-1.0,)
"""Weights of the base model that a gate may choose for a detected prompt, beside 0, the LoRA alone."""
GATE_SCENES = SCENES[1::3]
"""Scenes that concepts are placed in; other ones than those of the cards' calibration."""
GATE_STEPS = (1, 2, 3, 4, 6)
GATE_REPEATS = (1, 2)
THRESHOLDS = {"alignment": 0.5, "influence": 0.68, "paper": 1.0}
"""The product's defaults; a card's own threshold of the influence comes first."""
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

# ---------------------------------------------------------------- pictures


@torch.no_grad()
def draw(
    narrow: Narrow, prompts: Sequence[str], pictures: int, layers: Layers | None = None, weight: float = 0.0
) -> Tensor:
    """Returns latents drawn for each prompt from the same noises, [prompts, pictures, 4, H, W].

    Args:
        layers: an adapter; None draws with the base model.
        weight: the base model's weight in the blend with the adapted one; 0 is the adapter alone.
    """
    states = narrow.encode([*prompts, ""])
    base = narrow.table(states)
    table = base if layers is None else joined(adapted_table(base, states, layers), base)
    noise = torch.stack(
        [torch.randn(LATENT, generator=torch.Generator().manual_seed(10_000 + i)) for i in range(pictures)]
    )
    sigmas = normal_sigmas()
    start = to_sigma_space(noise, float(sigmas[0])).repeat(len(prompts), 1, 1, 1)
    rows = torch.arange(len(prompts)).repeat_interleave(pictures)
    drawn = []
    for x, cond in zip(start.split(64), rows.split(64), strict=True):
        uncond = torch.full_like(cond, len(prompts))
        blended = None
        if layers is not None and weight != 0.0:
            shift = len(states)
            blended = (cond, uncond, torch.full(cond.shape, weight))
            cond, uncond = cond + shift, uncond + shift
        with torch.autocast("cpu", torch.bfloat16):
            drawn.append(partial_denoise(narrow.denoise(table, cond, uncond, adapted=blended), x, sigmas))
    return torch.cat(drawn).unflatten(0, (len(prompts), pictures))


def accuracies(narrow: Narrow, judge: Judge, prompts: Mapping[str, str], pictures: int, **drawing) -> dict[str, float]:
    """Returns the share of each prompt's pictures that the judge takes for the prompt's class, in percent.

    Args:
        prompts: class by prompt.
        drawing: `layers` and `weight` of `draw`.
    """
    latents = draw(narrow, list(prompts), pictures, **drawing)
    labels = judge(latents.flatten(0, 1)).view(len(prompts), pictures)
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
    inside = _mean([shares[placed(concept, scene)] for scene in GATE_SCENES])
    return Accuracy(shares[photo(concept)], general, inside, *spared)


def own_prompts(concept: str) -> dict[str, str]:
    """Returns the prompts that shall not be drawn any more, with the class."""
    prompts = [photo(word) for word in words_for(concept)] + [placed(concept, scene) for scene in GATE_SCENES]
    return dict.fromkeys(prompts, concept)


def other_prompts(concept: str) -> dict[str, str]:
    """Returns the prompts of the nine other classes, with the class."""
    return {photo(other): other for other in CLASSES if other != concept}


# ---------------------------------------------------------------- gate


@dataclass(frozen=True)
class GatePrompt:
    """A prompt with what it is: the class it names ("" for none), and whether a word alone or in a scene."""

    text: str
    klass: str = ""
    kind: str = "word"


def gate_prompts(scenes: Sequence[str] = GATE_SCENES) -> list[GatePrompt]:
    """Returns all words alone, all scenes, the empty prompt, and each class in some scenes."""
    words = [GatePrompt(photo(word), klass) for klass in CLASSES for word in words_for(klass)]
    plain = [GatePrompt(photo(scene)) for scene in SCENES]
    inside = [GatePrompt(placed(klass, scene), klass, "placed") for klass in CLASSES for scene in scenes]
    return [*words, *plain, GatePrompt(""), *inside]


@dataclass(frozen=True)
class GateScores:
    """Statistics of prompts for all concepts, before averaging over repeats, at one number of probe steps.

    alignments: [prompts, concepts, repeats].
    influences: by set of adapters, likewise.
    """

    alignments: Tensor
    influences: dict[str, Tensor]

    @staticmethod
    def joined(parts: Sequence[GateScores]) -> GateScores:
        """Returns the statistics of the prompts of all parts."""
        influences = {name: torch.cat([part.influences[name] for part in parts]) for name in parts[0].influences}
        return GateScores(torch.cat([part.alignments for part in parts]), influences)

    def scores(self, statistic: str, repeats: int, prompts: Sequence[GatePrompt], objective: str = "") -> Tensor:
        """Returns the product's score, [prompts, concepts].

        Alignment as it is; influence relative to that on the concept's own prompt, the mean over all repeats as in the
        card; paper relative to that on the empty prompt.
        """
        if statistic == "alignment":
            return self.alignments[..., :repeats].mean(-1)
        texts = [prompt.text for prompt in prompts]
        values = self.influences[objective]
        means = values[..., :repeats].mean(-1)
        if statistic == "paper":
            return means / means[texts.index("")]
        return means / torch.stack([values[texts.index(photo(c)), i].mean() for i, c in enumerate(CLASSES)])


@torch.no_grad()
def gate_scores(
    narrow: Narrow,
    prompts: Sequence[GatePrompt],
    adapters: Mapping[str, Sequence[Layers]],
    steps: Sequence[int],
    repeats: int,
) -> dict[int, GateScores]:
    """Returns every statistic of every prompt by number of probe steps, from one trajectory per prompt and repeat.

    Args:
        adapters: by set, one per class.
    """
    texts = [*(photo(concept) for concept in CLASSES), ""]
    states = narrow.encode([*texts, *(prompt.text for prompt in prompts)])
    base = narrow.table(states)
    every = [layers for objective in adapters.values() for layers in objective]
    sigmas = normal_sigmas()
    noise = torch.stack([torch.randn(LATENT, generator=torch.Generator().manual_seed(i)) for i in range(repeats)])
    start = to_sigma_space(noise, float(sigmas[0]))
    results: dict[int, list[GateScores]] = {step: [] for step in steps}
    for number in range(len(texts), len(states)):
        own = [number, *range(len(texts))]
        adapted = [adapted_table({n: v[[number]] for n, v in base.items()}, states[[number]], a) for a in every]
        table = joined({name: values[own] for name, values in base.items()}, *adapted)
        latents = probed(narrow, table, 0, len(texts), start, sigmas[: max(steps) + 1])
        for step in steps:
            x = from_sigma_space(latents[step], float(sigmas[step]))
            rows = torch.arange(len(own) + len(every)).repeat_interleave(repeats)
            times = timestep_of(sigmas[step : step + 1]).expand(len(rows))
            eps = narrow.eps(x.repeat(len(own) + len(every), 1, 1, 1), times, table, rows).unflatten(0, (-1, repeats))
            alignments = torch.stack([alignment(eps[0], eps[len(texts)], concept) for concept in eps[1 : len(texts)]])
            norms = torch.stack([influence(eps[0], other) for other in eps[len(own) :]]) if every else torch.zeros(0)
            shares = dict(zip(adapters, norms[None].split(len(CLASSES), dim=1), strict=True)) if every else {}
            results[step].append(GateScores(alignments[None], shares))
    return {step: GateScores.joined(parts) for step, parts in results.items()}


def probed(narrow: Narrow, table: Table, cond: int, uncond: int, start: Tensor, sigmas: Tensor) -> list[Tensor]:
    """Returns the latents at each of `sigmas` on the way of one prompt, in sigma space."""
    rows = torch.full((len(start),), cond)
    denoise = narrow.denoise(table, rows, torch.full_like(rows, uncond))
    met: list[Tensor] = []

    def note(state: dict) -> None:
        met.append(state["x"])

    last = partial_denoise(denoise, start, sigmas, callback=note)
    return [*met, last]


@dataclass(frozen=True)
class Separation:
    """How well scores tell a concept's prompts from all others, over all concepts.

    auc: the share of (own, other) pairs in the right order, whatever their concepts.
    perfect: concepts all of whose own prompts score above all others.
    highest_other, lowest_own: any threshold in between, if there is one, makes no mistake.
    best: the threshold with the fewest mistakes, in the middle of the widest stretch of these.
    misses, alarms: mistakes at each concept's threshold, of `own` and `other` pairs; `best_mistakes` at `best`.
    wrong: the first dozen of them.
    """

    auc: float
    perfect: int
    highest_other: float
    lowest_own: float
    misses: int
    own: int
    alarms: int
    other: int
    best: float
    best_mistakes: int
    wrong: tuple[str, ...]


def separation(scores: Tensor, prompts: Sequence[GatePrompt], kind: str, thresholds: Tensor) -> Separation:
    """Returns how well scores [prompts, concepts] separate the prompts of one kind, with thresholds [concepts]."""
    kept = [i for i, prompt in enumerate(prompts) if prompt.kind == kind]
    own = torch.tensor([[prompts[i].klass == concept for concept in CLASSES] for i in kept])
    values = scores[kept]
    positive, negative = values[own], values[~own]
    order = (positive[:, None] > negative).float() + 0.5 * (positive[:, None] == negative)
    perfect = sum(bool(values[own[:, i], i].min() > values[~own[:, i], i].max()) for i in range(len(CLASSES)))
    mistaken = ((values >= thresholds) != own).nonzero().tolist()
    best = best_threshold(positive, negative)
    return Separation(
        auc=float(order.mean()),
        perfect=perfect,
        highest_other=float(negative.max()),
        lowest_own=float(positive.min()),
        misses=int((own & (values < thresholds)).sum()),
        own=len(positive),
        alarms=int((~own & (values >= thresholds)).sum()),
        other=len(negative),
        best=best,
        best_mistakes=int((positive < best).sum() + (negative >= best).sum()),
        wrong=tuple(f"{CLASSES[c]}: '{prompts[kept[i]].text}' {values[i, c]:.2f}" for i, c in mistaken[:12]),
    )


def best_threshold(positive: Tensor, negative: Tensor) -> float:
    """Returns the threshold with the fewest mistakes, in the middle of the widest stretch of these."""
    values = torch.cat([positive, negative]).sort().values
    middles = (values[1:] + values[:-1]) / 2
    mistakes = (positive < middles[:, None]).sum(1) + (negative >= middles[:, None]).sum(1)
    gaps = values.diff().masked_fill(mistakes > mistakes.min(), -1.0)
    return float(middles[int(gaps.argmax())])


# ---------------------------------------------------------------- command


def judge(latents: Tensor) -> Tensor:
    """Returns what the demo's classifier takes decoded latents for, as numbers of its `LABELS`."""
    decoder = worker_model().decoder
    pictures = torch.cat([decoder(part).clamp(0, 1) for part in latents.split(64)])
    return classify(pictures).argmax(dim=-1)


def picture_task(path: Path | None, prompts: dict[str, str], pictures: int, weight: float) -> dict[str, float]:
    """Returns the accuracies of prompts under an adapter's file, in percent."""
    layers = None if path is None else narrowed(load_adapter(path))
    return accuracies(worker_model(), judge, prompts, pictures, layers=layers, weight=weight)


def gate_task(
    paths: dict[str, list[Path]], prompts: list[GatePrompt], steps: Sequence[int], repeats: int
) -> dict[int, GateScores]:
    """Returns the statistics of some prompts, with adapters from files."""
    adapters = {name: [narrowed(load_adapter(path)) for path in files] for name, files in paths.items()}
    return gate_scores(worker_model(), prompts, adapters, steps, repeats)


def evaluate(options: argparse.Namespace) -> None:
    """Measures the sets, prints the tables, and writes figures and tables beside the sets."""
    out: Path = options.out
    measured_path, report_path = out / "measured.json", out.parent / "LORAS.md"
    measured = json.loads(measured_path.read_text()) if measured_path.exists() else {}
    base_hash = base_sha256(options.model)
    if measured.get("base_hash") != base_hash:
        measured = {"base_hash": base_hash}
    worker = (options.tokenizer, options.model)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), start_worker, worker) as pool:
        if "pictures" in options.part:
            measured["pictures"] = measure_pictures(pool, options, measured.get("pictures", {}))
        if "gate" in options.part:
            measured["gate"] = {**measured.get("gate", {}), **measure_gate(pool, options)}
    measured_path.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")
    tables = report(measured)
    print(tables)
    text = report_path.read_text() if report_path.exists() else f"{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    report_path.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{rest.split(END)[1]}")


def measure_pictures(pool: ProcessPoolExecutor, options: argparse.Namespace, known: dict) -> dict:
    """Returns accuracies by concept: of the base model, and by set of the LoRA alone and of blends.

    Args:
        known: what was measured before; kept where nothing new is asked for.
    """
    began = time.monotonic()
    every = {prompt: klass for klass in CLASSES for prompt in own_prompts(klass)}
    counts = {"pictures": options.pictures, "others": options.others}
    result = known if {name: known.get(name) for name in counts} == counts else dict(counts)
    base = None if "base" in result else pool.submit(picture_task, None, every, options.pictures, 1.0)
    tasks = {}
    for objective in options.set:
        for concept in options.concept:
            path = path_of(options.out, objective, concept)
            own, others = own_prompts(concept), other_prompts(concept)
            tasks[objective, concept, "alone"] = pool.submit(picture_task, path, own, options.pictures, 0.0)
            tasks[objective, concept, "others"] = pool.submit(picture_task, path, others, options.others, 0.0)
            for weight in BLENDS:
                task = pool.submit(picture_task, path, own, options.pictures, weight)
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


def measure_gate(pool: ProcessPoolExecutor, options: argparse.Namespace) -> dict:
    """Returns the separation by every statistic, by probe steps, repeats, set and kind of prompt."""
    prompts = gate_prompts()
    paths = {objective: [path_of(options.out, objective, concept) for concept in CLASSES] for objective in options.set}
    paths = {objective: files for objective, files in paths.items() if all(file.exists() for file in files)}
    parts = [prompts[i : i + 8] for i in range(0, len(prompts), 8)]
    tasks = [pool.submit(gate_task, paths, part, GATE_STEPS, max(GATE_REPEATS)) for part in parts]
    done = []
    for number, task in enumerate(tasks, start=1):
        done.append(task.result())
        log.info("gate: %d of %d prompts", min(8 * number, len(prompts)), len(prompts))
    cards = {objective: [load_adapter(path).card.calibration for path in files] for objective, files in paths.items()}
    result: dict = {}
    for step in GATE_STEPS:
        scores = GateScores.joined([part[step] for part in done])
        for statistic, objective in [("alignment", ""), *((s, o) for o in paths for s in ("influence", "paper"))]:
            thresholds = torch.full((len(CLASSES),), THRESHOLDS[statistic])
            if statistic == "influence" and step == PROBE_STEPS:
                thresholds = torch.tensor([card.get("threshold", THRESHOLDS[statistic]) for card in cards[objective]])
            for repeats in GATE_REPEATS:
                values = scores.scores(statistic, repeats, prompts, objective)
                for kind in ("word", "placed"):
                    key = f"{statistic} {objective}".strip() + f", {step} steps, {repeats} repeats, {kind}"
                    result[key] = asdict(separation(values, prompts, kind, thresholds))
    return result


# ---------------------------------------------------------------- tables


def report(measured: dict) -> str:
    """Returns the measured figures as Markdown tables."""
    parts = []
    if "pictures" in measured:
        parts.append(picture_table(measured["pictures"]))
    if "gate" in measured:
        parts.append(gate_table(measured["gate"]))
    return "\n\n".join(parts)


def picture_table(result: dict) -> str:
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


def gate_table(result: dict) -> str:
    """Returns a row per statistic and kind of prompt at the product's probe steps, and of alignment at all others."""
    chosen = {
        name: s
        for name, s in result.items()
        if f"{max(GATE_REPEATS)} repeats" in name and (f"{PROBE_STEPS} steps" in name or name.startswith("alignment"))
    }
    lines = [
        "| statistic | AUC | concepts apart | highest other | lowest own | misses | false alarms | best threshold |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, s in chosen.items():
        lines.append(
            f"| {name} | {s['auc']:.4f} | {s['perfect']} of {len(CLASSES)} | {s['highest_other']:.2f} | "
            f"{s['lowest_own']:.2f} | {s['misses']} of {s['own']} | {s['alarms']} of {s['other']} | "
            f"{s['best']:.2f} ({s['best_mistakes']} wrong) |"
        )
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
