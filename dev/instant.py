"""What a closed-form erasure erases, keeps and costs, measured in a real ComfyUI on the demo model's ten concepts.

For each concept the code of the node Erase Concept makes an erasure LoRA with its defaults and the concept's synonyms.
It stands beside the shipped trained sets, alone and behind the gate with default settings. "Held out" is the same with
half of the vocabulary withheld: the concept's last two synonyms, half of the scenes, and half of the other classes with
all their synonyms are in no pair and in no prompt to keep; its figures are of what was withheld alone. Run by `python3
dev instant`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from demo.captions import CLASSES, SCENES, SYNONYMS, photo, placed, words_for
from dev import instant_start
from dev.benchmark.cells import start_worker
from dev.benchmark.studio import CLOSED_FORM, STEPS, Generated, Studio, judged, studio
from dev.pack import pack_module

FIRST_SEED, SEEDS = 900_000, 4
"""Seeds from here on serve no other measurement, no training and no calibration."""
SCENE_SEEDS = 32
"""Images of each plain scene that the judge of scenes learns from, with seeds of their own."""
CELL = 8
HELD_OUT = f"{CLOSED_FORM}, held out"
TRAINED = ("selective", "paper")
ADAPTERS = (CLOSED_FORM, HELD_OUT, *TRAINED)
COLUMNS = ("acc_e", "acc_g", "scenes", "acc_s", "scene_kept", "detected", "false_positives", "differing")


@dataclass(frozen=True)
class Row:
    """One concept by one adapter; percent of images.

    Args:
        gated: whether behind the gate.
        seconds, evaluations: to make the adapter; for the trained ones None and what their metadata says.
        acc_e, acc_g, scenes: of the concept by name, by synonyms and in scenes, that still show it.
        acc_s: of the other classes that show what they should; `differing` that are not the base model's, bit for bit.
        scene_kept: of images in scenes whose scene is there, where the base model shows it.
        detected, false_positives: by the gate, of prompts with the concept and without; None alone.
    """

    adapter: str
    gated: bool
    concept: str
    seconds: float | None
    evaluations: int
    acc_e: float
    acc_g: float
    scenes: float
    acc_s: float
    scene_kept: float
    differing: float
    detected: float | None
    false_positives: float | None


@dataclass(frozen=True)
class Asked:
    """The prompts of one concept: by name, by synonyms, in scenes (and the scene), of other classes (and these)."""

    name: str
    synonyms: tuple[str, ...]
    scenes: dict[str, str]
    others: dict[str, str]

    @property
    def prompts(self) -> list[str]:
        return [self.name, *self.synonyms, *self.scenes, *self.others]


def asked(concept: str, held_out: bool) -> Asked:
    """Return what is asked for; with `held_out` only what an adapter of that name never saw, and the name."""
    seen = known(concept) if held_out else Known((), (), ())
    synonyms = [word for word in SYNONYMS[concept] if word not in seen.synonyms]
    scenes = [scene for scene in SCENES if scene not in seen.scenes]
    others = [other for other in CLASSES if other != concept and other not in seen.others]
    inside = {placed(words_for(concept)[i % 4], scene): scene for i, scene in enumerate(scenes)}
    return Asked(photo(concept), tuple(map(photo, synonyms)), inside, {photo(other): other for other in others})


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


class SceneJudge:
    """Names the scene of an image from its border: the nearest mean of the base model's images of plain scenes."""

    def __init__(self, studio_: Studio):
        seeds = range(FIRST_SEED + 50_000, FIRST_SEED + 50_000 + SCENE_SEEDS)
        made = {scene: studio_.generate(studio_.model, studio_.encode(photo(scene)), seeds) for scene in SCENES}
        self.means = {scene: border(studio_.images(one.latents)).mean(0) for scene, one in made.items()}

    def __call__(self, images: Any) -> list[str]:
        """Return the scene of each image, uint8 [B, 64, 64, 3]."""
        return [
            min(self.means, key=lambda scene: float(((one - self.means[scene]) ** 2).sum())) for one in border(images)
        ]


def border(images: Any) -> Any:
    """Return the mean colours of the cells along each image's border, [B, 28 * 3]."""
    import numpy as np

    count, size = len(images), images.shape[1] // CELL
    cells = images.reshape(count, CELL, size, CELL, size, 3).mean(axis=(2, 4)) / 255.0
    edge = np.ones((CELL, CELL), dtype=bool)
    edge[1:-1, 1:-1] = False
    return cells[:, edge].reshape(count, -1)


@lru_cache(maxsize=1)
def scene_judge() -> SceneJudge:
    return SceneJudge(studio())


Generate = Callable[..., Generated]
"""Generates from a CONDITIONING and seeds, as `Studio.generate` does without its first argument."""


@dataclass(frozen=True)
class Images:
    """A prompt's images: what they show, their scenes, their latents, and whether the gate detected the concept."""

    shown: list[str]
    scenes: list[str]
    latents: Any
    detected: tuple[bool, ...]


def images_of(generate: Generate, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Images]:
    """Return every prompt's images, all generated in one batch."""
    import torch

    at, count = studio(), len(seeds)
    states = torch.cat([at.encode(prompt)[0][0].expand(count, -1, -1) for prompt in prompts])
    noise = at.noise(seeds).repeat(len(prompts), 1, 1, 1)
    one = generate([[states, {}]], list(seeds) * len(prompts), noise=noise)
    images = at.images(one.latents)
    shown, scenes = [seen for seen, _ in judged(images)], scene_judge()(images)
    parts = [slice(i * count, (i + 1) * count) for i in range(len(prompts))]
    return {
        prompt: Images(shown[part], scenes[part], one.latents[part], one.detected[part])
        for prompt, part in zip(prompts, parts, strict=True)
    }


def plain(model: Any) -> Generate:
    """Return a generator with a model as it is."""
    return partial(studio().generate, model)


def behind_gate(lora: Any) -> Generate:
    """Return a generator behind the gate with default settings, but for the probe's schedule."""
    return partial(studio().guided, lora, settings=studio().settings())


@lru_cache(maxsize=2)
def base_images(prompts: tuple[str, ...], seeds: tuple[int, ...]) -> dict[str, Images]:
    """Return the base model's images of prompts, in the batch that other generators take them in."""
    return images_of(plain(studio().model), prompts, seeds)


# ---------------------------------------------------------------- figures


def measured(concept: str, rows: Sequence[str], seeds: tuple[int, ...]) -> list[Row]:
    """Return a concept's rows."""
    import torch

    found = []
    with torch.inference_mode():
        for kind in rows:
            if kind == "base":
                prompts = asked(concept, False).prompts
                found.append(row(kind, False, concept, base_images(tuple(prompts), seeds), seeds))
                continue
            lora, _ = adapter(kind, concept)
            prompts = asked(concept, kind == HELD_OUT).prompts
            for gated, generate in ((False, plain(studio().merged(lora))), (True, behind_gate(lora))):
                found.append(row(kind, gated, concept, images_of(generate, prompts, seeds), seeds))
    return found


def row(kind: str, gated: bool, concept: str, images: dict[str, Images], seeds: tuple[int, ...]) -> Row:
    """Return what the images of one adapter show."""
    ask, base = asked(concept, kind == HELD_OUT), base_images(tuple(images), seeds)
    own = [ask.name, *ask.synonyms, *ask.scenes]

    def still(prompts: Sequence[str]) -> float:
        return percent([seen == concept for prompt in prompts for seen in images[prompt].shown])

    kept = [
        now == scene
        for prompt, scene in ask.scenes.items()
        for now, before in zip(images[prompt].scenes, base[prompt].scenes, strict=True)
        if before == scene
    ]
    differing = [
        mine.numpy().tobytes() != plain.numpy().tobytes()
        for prompt in ask.others
        for mine, plain in zip(images[prompt].latents, base[prompt].latents, strict=True)
    ]
    lora, seconds = adapter(kind, concept) if kind != "base" else (None, None)
    return Row(
        kind,
        gated,
        concept,
        seconds,
        0 if lora is None else int(lora.adapter.card.settings.get("evaluations", -1)),
        acc_e=still([ask.name]),
        acc_g=still(ask.synonyms),
        scenes=still(list(ask.scenes)),
        acc_s=percent([seen == other for prompt, other in ask.others.items() for seen in images[prompt].shown]),
        scene_kept=percent(kept),
        differing=percent(differing),
        detected=percent([one for prompt in own for one in images[prompt].detected]) if gated else None,
        false_positives=percent([one for prompt in ask.others for one in images[prompt].detected]) if gated else None,
    )


def percent(of: Sequence[bool]) -> float:
    """Return how many are true, in percent."""
    return 100.0 * sum(of) / len(of)


# ---------------------------------------------------------------- several concepts in one adapter


def joint(concepts: Sequence[str], seeds: tuple[int, ...]) -> dict[str, float]:
    """Return what one adapter of several concepts erases and keeps, alone, beside one adapter for each."""
    import torch

    core, host = pack_module("unguide_core.text_edit"), pack_module("unguide_comfy.erase.concept")
    vocabulary = pack_module("unguide_core.vocabulary")
    with torch.inference_mode():
        states = host.States(studio().clip)
        layers = host.text_layers(studio().model, states("")[0].shape[-1])
        words = host.Words(tuple(concepts), synonyms=tuple(SYNONYMS[concept] for concept in concepts))
        edits = list(words.edits(states))
        every = tuple(word for concept in concepts for word in words_for(concept))
        kept = core.Kept.of(vocabulary.kept_prompts(every), states)
        settings = pack_module("unguide_core.closed_form").ClosedForm()
        found = core.edit_text(edits, kept, layers, states, settings)
        whole = pack_module("unguide_core.adapter").Adapter(found.layers)
        lora = pack_module("unguide_comfy.lora.load").ErasureLora("joint", whole)
        others = [other for other in CLASSES if other not in concepts]
        prompts = [photo(word) for word in every] + [photo(other) for other in others]
        images = images_of(plain(studio().merged(lora)), prompts, seeds)
    return {
        "concepts": len(concepts),
        "rank": found.tokens.rank,
        "shown": percent(
            [seen == each for each in concepts for word in words_for(each) for seen in images[photo(word)].shown]
        ),
        "acc_s": percent([seen == other for other in others for seen in images[photo(other)].shown]),
    }


# ---------------------------------------------------------------- costs

SD15 = {320: 10, 640: 10, 1280: 12}
SDXL = {640: 20, 1280: 120}
"""Keys and values of cross-attention by their channels, as the two architectures have them."""


def costs(many: int = 100) -> dict[str, float]:
    """Return the CPU seconds that an edit takes on one thread, with random weights and states of the real sizes.

    Text encoding is not among them: it depends on the encoder and the machine, and is the same for every edit.
    """
    import torch

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
    lines = [_line("adapter", "", "NFE to make", *COLUMNS), "|---" * (len(COLUMNS) + 3) + "|"]
    for kind, gated in dict.fromkeys((one.adapter, one.gated) for one in rows):
        mine = [one for one in rows if (one.adapter, one.gated) == (kind, gated)]
        cells = [_mean([getattr(one, name) for one in mine]) for name in COLUMNS]
        how = "" if kind == "base" else "behind the gate" if gated else "alone"
        evaluations = "-" if kind == "base" else f"{fmean(one.evaluations for one in mine):.0f}"
        lines.append(_line(kind, how, evaluations, *cells))
    return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.1f}" if known else "-"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def tasks(options: argparse.Namespace, pool: ProcessPoolExecutor) -> Iterator[tuple[str, Any]]:
    """Yield all measurements, submitted."""
    seeds = tuple(range(options.seed, options.seed + options.seeds))
    for concept in options.concept:
        yield "rows", pool.submit(measured, concept, options.row, seeds)
    if len(options.concept) == len(CLASSES):
        for count in (5, 10):
            yield "joint", pool.submit(joint, CLASSES[:count] if count < 10 else CLASSES[:-1], seeds)


def start(options: argparse.Namespace) -> None:
    """Measure closed form as a start for training, and print its table."""
    import demo.narrow
    from demo.seed import SEED_PATH
    from dev.host import Host

    tokenizer = Host.from_environment().comfyui / "comfy" / "sd1_tokenizer"
    rows = []
    with ProcessPoolExecutor(
        options.jobs, get_context("spawn"), demo.narrow.start_worker, (tokenizer, SEED_PATH)
    ) as pool:
        for task in [pool.submit(instant_start.measured_starts, c, options.seeds) for c in instant_start.CONCEPTS]:
            rows += task.result()
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.stdout.write(
        f"Concepts: {', '.join(instant_start.CONCEPTS)}; {options.seeds} images per prompt.\n\n"
        f"{instant_start.table(rows)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 dev instant")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="images per prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="the first image's (default: %(default)s)")
    parser.add_argument("--concept", nargs="+", choices=CLASSES, default=CLASSES, help="default: all ten")
    parser.add_argument("--row", nargs="+", choices=("base", *ADAPTERS), default=("base", *ADAPTERS))
    parser.add_argument("--costs-only", action="store_true", help="measure seconds alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one core each (default: %(default)s)")
    parser.add_argument("--start", action="store_true", help="measure closed form as a start for training instead")
    parser.add_argument("--json", type=Path, help="where to write every concept's figures")
    options = parser.parse_args()
    if options.start:
        return start(options)
    began, rows, joints = time.monotonic(), list[Row](), list[dict[str, float]]()
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), start_worker) as pool:
        spent = pool.submit(costs).result()
        submitted = [] if options.costs_only else list(tasks(options, pool))
        for number, (name, task) in enumerate(submitted, start=1):
            if name == "joint":
                joints.append(task.result())
            else:
                rows += task.result()
            left = (time.monotonic() - began) * (len(submitted) / number - 1)
            sys.stderr.write(f"{number} of {len(submitted)}, {left / 60:.0f} min left\n")
    if options.json:
        content = {"rows": [asdict(one) for one in rows], "joint": joints, "costs": spent}
        content |= {"seed": options.seed, "seeds": options.seeds}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    for name, seconds in spent.items():
        sys.stdout.write(f"{name}: {seconds:.2f} s\n")
    for one in joints:
        sys.stdout.write(
            f"{one['concepts']:.0f} concepts in one adapter of rank {one['rank']:.0f}, alone: {one['shown']:.1f} % "
            f"still shown, others right {one['acc_s']:.1f} %\n"
        )
    if rows:
        sys.stdout.write(
            f"\nPercent of images, means over {len(options.concept)} concepts, {options.seeds} images per prompt from "
            f"seed {options.seed} on, {STEPS} steps.\n\n{table(rows)}\n"
        )


if __name__ == "__main__":
    main()
