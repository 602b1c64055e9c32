"""What a closed-form erasure erases, keeps and costs, measured in a real ComfyUI on the demo model's ten concepts.

For each concept the code of the node Erase Concept makes an erasure LoRA with its defaults and the concept's synonyms.
It stands beside the shipped trained sets, alone and behind the gate with default settings. "Held out" is the same with
half of the vocabulary withheld: the concept's last two synonyms, half of the scenes, and half of the other classes with
all their synonyms are in no pair and in no prompt to keep; its figures are of what was withheld alone. Run by `python3
dev instant`.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from statistics import fmean
from typing import Any

import torch

from demo.captions import CLASSES, SCENES, SYNONYMS, photo, words_for
from dev.pack import pack_module
from experiments import start
from experiments.runner import keep, publish, results, workers
from experiments.studio import CLOSED_FORM, STEPS, Asked, Generated, asked_in_scenes, studio
from unguide_bench.scores import ERASED, OTHER, SCENE, SYNONYM, JudgedImage, percent, shown
from unguide_bench.tables import markdown

FIRST_SEED = 900_000
"""Seeds from here on serve no other measurement, no training and no calibration."""
HELD_OUT = f"{CLOSED_FORM}, held out"
TRAINED = ("selective", "paper")
JOINT = (5, 9)
"""So many concepts share one adapter."""
COLUMNS = ("acc_e", "acc_g", "scenes", "acc_s", "scene_kept", "reference", "detected", "false_positives", "differing")


@dataclass(frozen=True)
class Row:
    """One concept by one adapter; percent of images.

    Args:
        gated: whether behind the gate.
        seconds, evaluations: to make the adapter; None for the trained ones, whose metadata may say neither.
        acc_e, acc_g, scenes: of the concept by name, by synonyms and in scenes, that still show it.
        acc_s: of the other classes that show what they should; `differing` that are not the base model's, bit for bit.
        scene_kept: of images in scenes whose scene is there, where the base model shows it.
        reference: of the concept by name and by synonyms, that show the scene that takes its place.
        detected, false_positives: by the gate, of prompts with the concept and without; None alone.
    """

    adapter: str
    gated: bool
    concept: str
    seconds: float | None
    evaluations: int | None
    acc_e: float
    acc_g: float
    scenes: float
    acc_s: float
    scene_kept: float
    reference: float
    differing: float
    detected: float | None
    false_positives: float | None


def asked(concept: str, held_out: bool) -> list[Asked]:
    """Return what is asked for; with `held_out` only what an adapter of that name never saw, and the name."""
    seen = known(concept) if held_out else Known((), (), ())
    synonyms = [Asked(photo(word), SYNONYM, concept) for word in SYNONYMS[concept] if word not in seen.synonyms]
    others = [Asked(photo(other), OTHER, other) for other in CLASSES if other not in (concept, *seen.others)]
    inside = [one for one in asked_in_scenes(concept) if one.scene not in seen.scenes]
    return [Asked(photo(concept), ERASED, concept), *synonyms, *inside, *others]


@dataclass(frozen=True)
class Known:
    """Half of the vocabulary: what the adapter of the leave-out test is made with."""

    synonyms: tuple[str, ...]
    scenes: tuple[str, ...]
    others: tuple[str, ...]


def known(concept: str) -> Known:
    """Return the half that is not withheld, a different one for every concept."""
    number = CLASSES.index(concept)
    others = [other for other in CLASSES if other != concept]
    return Known(
        SYNONYMS[concept][:1],
        tuple(SCENES[number % 2 :: 2]),
        tuple(others[number % 2 :: 2]),
    )


# ---------------------------------------------------------------- adapters


@lru_cache(maxsize=4)
def adapter(kind: str, concept: str) -> tuple[Any, float | None]:
    """Return an erasure LoRA for the studio's model, and the seconds that it took to make."""
    if kind in TRAINED:
        return studio().lora(kind, concept), None
    began = time.perf_counter()
    if kind == HELD_OUT:
        half = known(concept)
        lora = studio().closed_form(concept, half.synonyms, scenes=half.scenes, kept=kept_of(half), shipped=0)
    else:
        lora = studio().closed_form(concept, SYNONYMS[concept])
    return lora, time.perf_counter() - began


def kept_of(half: Known) -> tuple[str, ...]:
    """Return prompts to keep that name no withheld word: the shipped ones without them, and the known classes."""
    vocabulary = pack_module("unguide_core.vocabulary")
    withheld = {*SCENES, *(word for each in CLASSES for word in words_for(each))}
    withheld -= {*half.scenes, *(word for each in half.others for word in words_for(each))}
    own = [photo(word) for other in half.others for word in words_for(other)]
    return (*vocabulary.kept_prompts(tuple(withheld)), *own, *map(photo, half.scenes))


# ---------------------------------------------------------------- images


Generate = Callable[..., Generated]
"""Generates from a CONDITIONING and seeds, as `Studio.generate` does without its first argument."""


def behind_gate(lora: Any) -> Generate:
    """Return a generator behind the gate with default settings, but for the probe's schedule."""
    return partial(studio().guided, lora, settings=studio().settings())


def alone(lora: Any) -> Generate:
    """Return a generator with a LoRA merged."""
    return partial(studio().generate, studio().merged(lora))


@lru_cache(maxsize=2)
def base_images(prompts: tuple[str, ...], seeds: tuple[int, ...]) -> tuple[Any, Any]:
    """Return the base model's latents and images of prompts, in the batch that other generators take them in."""
    made = studio().generate(studio().model, **studio().batch(prompts, seeds))
    return made.latents, studio().images(made.latents)


# ---------------------------------------------------------------- figures


@torch.inference_mode()
def measured(concept: str, rows: Sequence[str], seeds: tuple[int, ...]) -> list[Row]:
    """Return a concept's rows."""
    found = []
    for kind in rows:
        if kind == "base":
            found.append(row(kind, concept, seeds))
            continue
        lora, _ = adapter(kind, concept)
        found += [row(kind, concept, seeds, alone(lora)), row(kind, concept, seeds, behind_gate(lora))]
    return found


def row(kind: str, concept: str, seeds: tuple[int, ...], generate: Generate | None = None) -> Row:
    """Return what the images of one adapter show; without `generate` those of the base model."""
    at, held_out = studio(), kind == HELD_OUT
    prompts = asked(concept, held_out)
    names = tuple(one.prompt for one in prompts)
    base = base_images(names, seeds)
    made = generate(**at.batch(names, seeds)) if generate else Generated(base[0], 2.0 * STEPS)
    lora, seconds = adapter(kind, concept) if generate else (None, None)
    reference = (lora or at.lora("selective", concept)).adapter.card.reference
    images, _ = at.judge(kind, concept, prompts, seeds, made, base, reference)
    kept = [one.scene_kept for one in images if one.scene_kept is not None]
    others = [one for one in images if one.kind == OTHER]
    own = [one for one in images if one.kind != OTHER]
    gated = bool(made.detected)
    return Row(
        kind,
        gated,
        concept,
        seconds,
        0 if lora is None else lora.adapter.card.settings.get("evaluations"),
        acc_e=shown(images, ERASED),
        acc_g=shown(images, SYNONYM),
        scenes=shown(images, SCENE),
        acc_s=shown(images, OTHER),
        scene_kept=percent(kept),
        reference=percent([one.reference for one in images if one.reference is not None]),
        differing=percent([not one.identical for one in others]),
        detected=percent([one.detected for one in own]) if gated else None,
        false_positives=percent([one.detected for one in others]) if gated else None,
    )


# ---------------------------------------------------------------- several concepts in one adapter


@torch.inference_mode()
def joint(concepts: Sequence[str], seeds: tuple[int, ...]) -> dict[str, float]:
    """Return what one adapter of several concepts erases and keeps, alone, beside one adapter for each."""
    core, host = pack_module("unguide_core.text_edit"), pack_module("unguide_comfy.erase.concept")
    vocabulary, at = pack_module("unguide_core.vocabulary"), studio()
    states = host.States(at.clip)
    layers = host.text_layers(at.model, states("")[0].shape[-1])
    words = host.Words(tuple(concepts), synonyms=tuple(SYNONYMS[concept] for concept in concepts))
    every = tuple(word for concept in concepts for word in words_for(concept))
    kept = core.Kept.of(vocabulary.kept_prompts(every), states)
    settings = pack_module("unguide_core.closed_form").ClosedForm()
    found = core.edit_text(list(words.edits(states)), kept, layers, states, settings)
    whole = pack_module("unguide_core.adapter").Adapter(found.layers)
    lora = pack_module("unguide_comfy.lora.load").ErasureLora("joint", whole)
    prompts = [Asked(photo(word), ERASED, concept) for concept in concepts for word in words_for(concept)]
    prompts += [Asked(photo(other), OTHER, other) for other in CLASSES if other not in concepts]
    made = alone(lora)(**at.batch([one.prompt for one in prompts], seeds))
    images: list[JudgedImage] = at.judge("joint", "", prompts, seeds, made)[0]
    return {
        "concepts": len(concepts),
        "rank": found.tokens.rank,
        "shown": shown(images, ERASED),
        "acc_s": shown(images, OTHER),
    }


# ---------------------------------------------------------------- costs

SD15 = {320: 10, 640: 10, 1280: 12}
SDXL = {640: 20, 1280: 120}
"""Keys and values of cross-attention by their channels, as the two architectures have them."""


def costs(many: int = 100) -> dict[str, float]:
    """Return the CPU seconds that an edit takes on one thread, with random weights and states of the real sizes.

    Text encoding is not among them: it depends on the encoder and the machine, and is the same for every edit.
    """
    torch.set_num_threads(1)
    core = pack_module("unguide_core.closed_form")
    edit, found = pack_module("unguide_core.vocabulary").Edit("cat", "forest", SYNONYMS["cat"]), {}
    for name, width, shapes in (("SD 1.5", 768, SD15), ("SDXL", 2048, SDXL)):
        generator = torch.Generator().manual_seed(0)
        outs = [out for out, count in shapes.items() for _ in range(count)]
        weights = [torch.randn(out, width, generator=generator) for out in outs]
        pairs = [(torch.randn(77, width, generator=generator), torch.randn(77, width, generator=generator))] * len(
            edit.pairs
        )
        kept = core.Moment(width)
        began = time.process_time()
        kept.add(torch.cat([pairs[0][1]] * 32))
        found[f"{name}, 200 prompts to keep"] = 6.25 * (time.process_time() - began)
        repeats = many if name == "SD 1.5" else 3
        taken = []
        for _ in range(repeats):
            began = time.process_time()
            fitter = core.ClosedFormFitter(width)
            for target, reference in pairs:
                fitter.erase(target, reference)
            eraser = fitter.fit(weights, kept, core.ClosedForm())
            for weight in weights:
                eraser.layer(weight)
            taken.append(time.process_time() - began)
        found[f"{name}, one concept"] = sorted(taken)[len(taken) // 2]
        if repeats == many:
            found[f"{name}, {many} concepts"] = sum(taken)
    return found


# ---------------------------------------------------------------- table


def table(rows: Sequence[Row]) -> str:
    """Return a row per adapter, alone and behind the gate, means over concepts, in Markdown."""
    lines = []
    for kind, gated in dict.fromkeys((one.adapter, one.gated) for one in rows):
        mine = [one for one in rows if (one.adapter, one.gated) == (kind, gated)]
        cells = [_mean([getattr(one, name) for one in mine]) for name in COLUMNS]
        how = "" if kind == "base" else "behind the gate" if gated else "alone"
        evaluations = "-" if kind == "base" else _mean([one.evaluations for one in mine], "{:.0f}")
        lines.append((kind, how, evaluations, *cells))
    return markdown(("adapter", "", "NFE to make", *COLUMNS), lines)


def _mean(values: Sequence[float | None], form: str = "{:.1f}") -> str:
    known = [value for value in values if value is not None]
    return form.format(fmean(known)) if known else "-"


def run(options: Namespace) -> None:
    """Measure what is asked for, and print costs and table."""
    if options.start:
        return start.run(options)
    seeds, rows, joints = tuple(range(options.seed, options.seed + options.seeds)), list[Row](), []
    with workers(options.jobs) as pool:
        spent = pool.submit(costs).result()
        concepts = () if options.costs_only else options.concept
        tasks: dict[str | int, Any] = {c: pool.submit(measured, c, options.row, seeds) for c in concepts}
        if len(concepts) == len(CLASSES):
            tasks |= {count: pool.submit(joint, CLASSES[:count], seeds) for count in JOINT}
        for name, found in results("concepts", tasks):
            if name in JOINT:
                joints.append(found)
            else:
                rows += found
    content = {"rows": [asdict(one) for one in rows], "joint": joints, "costs": spent}
    keep(options.json, {**content, "seed": options.seed, "seeds": options.seeds})
    lines = [f"* {name}: {seconds:.2f} s" for name, seconds in spent.items()]
    lines += [
        f"* {one['concepts']:.0f} concepts in one adapter of rank {one['rank']:.0f}, alone: {one['shown']:.1f} % "
        f"still shown, others right {one['acc_s']:.1f} %"
        for one in joints
    ]
    if rows:
        lines.append(
            f"\nPercent of images, means over {len(options.concept)} concepts, {options.seeds} images per prompt from "
            f"seed {options.seed} on, {STEPS} steps.\n\n{table(rows)}"
        )
    publish("\n".join(lines), options.markdown, "instant")
