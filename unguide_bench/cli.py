"""The command line of `python -m unguide_bench`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from .drawing import Servers, generate_missing, jobs_of
from .errors import BenchError
from .export import export
from .folder import Folder
from .judging import judged
from .labels import THRESHOLD
from .looking import BASE_IMAGES, JUDGES, Judging, require
from .methods import DEFAULT, Method, Settings
from .prompts import UNSCORED, read_prompts
from .scores import KINDS

DESCRIPTION = """\
Generates prompts with several ways to erase a concept, on a running ComfyUI, and measures the images. It resumes
where it was interrupted."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    made = argparse.ArgumentParser(prog="python -m unguide_bench", description=DESCRIPTION, allow_abbrev=False)
    add = made.add_argument_group("what is generated").add_argument
    add("--prompts", type=Path, required=True, help="official prompt JSON, or a CSV with prompt, evaluation_seed, ...")
    add("--checkpoint", required=True, help="as the server names it, in its models/checkpoints")
    add("--lora", required=True, help="the erasure LoRA, as the server names it, in its models/loras")
    known = f"{', '.join(DEFAULT)} (the default), lora:STRENGTH, always:WEIGHT"
    add("--methods", nargs="+", default=list(DEFAULT), metavar="METHOD", help=known)
    add("--concept", default="", help="what is erased, a word or two (default: what the JSON's target asks for)")
    add(
        "--concept-prompt",
        default="",
        help="its own prompt, for the gate (default: that of the LoRA's metadata, else the target)",
    )
    add("--negative", default="", help="the negative prompt of the method 'negative' (default: the concept)")
    add("--strength", type=float, default=1.0, help="of the LoRA in UnGuide (default: 1)")
    add("--kind", choices=(*KINDS, UNSCORED), default=KINDS[0], help="of a CSV's prompts that do not say")
    add("--limit", type=int, help="the first prompts alone")
    add("--seeds", type=int, default=10, help="images of each prompt without a seed of its own (default: 10)")
    add("--first-seed", type=int, default=0, help="the first of them (default: 0)")
    for name, kind, value in (("steps", int, 50), ("cfg", float, 7.5), ("size", int, 512)):
        add(f"--{name}", type=kind, default=value, help=f"default: {value}")
    add("--sampler", default="ddim", help="default: ddim")
    add("--scheduler", default="normal", help="default: normal")
    add = made.add_argument_group("where").add_argument
    add("--server", nargs="+", default=[], metavar="URL", help="running ComfyUIs; several need Ray")
    add("--ray", default="local", metavar="ADDRESS", help="of several servers: local, auto, or a cluster's address")
    add("--timeout", type=float, default=600.0, help="seconds that an image may take (default: 600)")
    add("--out", type=Path, default=Path("bench_output"), help="folder of the run (default: bench_output)")
    add("--export", type=Path, metavar="FOLDER", help="copy images as class/NNNNN.png with a CSV, for other tools")
    add = made.add_argument_group("who judges").add_argument
    add("--judge", choices=JUDGES, default="none", help="of which class an image is (default: none)")
    add("--classes", nargs="+", default=[], help="for CLIP to choose among (default: those of the prompts)")
    add("--clip", type=Path, metavar="FOLDER", help="CLIP's weights, as openai/clip-vit-base-patch32 is downloaded")
    add("--clip-score", action="store_true", help="measure CLIPScore")
    add("--fid", default="", metavar="FOLDER", help=f"measure FID against these images, or '{BASE_IMAGES}'")
    add(
        "--fid-weights",
        type=Path,
        metavar="FILE",
        help="torch-fidelity's InceptionV3 (default: CLIP's image vectors)",
    )
    add("--threshold", type=float, default=THRESHOLD, help=f"of NudeNet's detections (default: {THRESHOLD})")
    return made


def run(options: argparse.Namespace) -> str:
    """Generate what is missing, judge, and return the tables. Raises: BenchError."""
    judging = Judging(
        options.judge,
        tuple(options.classes),
        options.clip,
        options.clip_score,
        options.fid,
        options.fid_weights,
        options.threshold,
    )
    require(judging)
    prompts = read_prompts(options.prompts, options.concept, options.kind).first(options.limit)
    methods = list(dict.fromkeys(Method.parse(text) for text in options.methods))
    if options.seeds < 1 or not 0 <= options.first_seed <= (1 << 64) - options.seeds:
        raise BenchError(f"there are {options.seeds} seeds from {options.first_seed} on; expected one at least, from 0")
    settings = Settings(
        checkpoint=options.checkpoint,
        lora=options.lora,
        strength=options.strength,
        concept_prompt=options.concept_prompt,
        negative=options.negative or prompts.concept,
        steps=options.steps,
        cfg=options.cfg,
        sampler=options.sampler,
        scheduler=options.scheduler,
        size=options.size,
    )
    if not prompts.concept:
        raise BenchError(f"{options.prompts} does not say what is erased; give --concept")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    jobs = jobs_of(prompts, methods, seeds, options.cfg)
    folder = Folder(options.out, settings)
    generate_missing(
        folder, settings, jobs, prompts.target, Servers(addresses(options.server), options.ray, options.timeout)
    )
    if options.export:
        export(folder, jobs, prompts, options.export)
    return str(judged(folder, jobs, prompts, judging)["tables"])


def addresses(urls: Sequence[str]) -> tuple[str, ...]:
    """Return the servers' addresses, each once, with the scheme that they lack."""
    return tuple(dict.fromkeys((url if "://" in url else f"http://{url}").rstrip("/") for url in urls))


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if everything was generated and judged, 1 if something failed, 130 if it was interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = parser().parse_args(arguments)
    try:
        sys.stdout.write(run(options))
    except BenchError as error:
        sys.stderr.write(f"unguide_bench: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"unguide_bench: stopped; start again to resume, {options.out} is kept\n")
        return 130
    return 0
