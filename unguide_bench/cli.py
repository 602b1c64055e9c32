"""The command line of `python -m unguide_bench`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import BenchError
from .export import export
from .folder import Folder
from .generating import Servers, generate_missing, jobs_of
from .judging import judged
from .labels import THRESHOLD
from .methods import DEFAULT, Method, Settings
from .panel import BASE_IMAGES, JUDGES, NONE, Judging, require
from .prompts import ATTACK, UNSCORED, read_prompts
from .protocol import CONCEPT, Protocol, listing
from .protocol import run as run_protocol
from .reproduce import reproduce, reproduce_parser
from .scores import KINDS
from .suites import SUITES

DESCRIPTION = """\
Generates prompts with several ways to erase a concept, on a running ComfyUI, and measures the images. It resumes
where it was interrupted. `python -m unguide_bench suite --help` runs published protocols by name, and
`python -m unguide_bench reproduce --help` prints how to repeat the paper's experiment."""
SUITE = """\
Runs a published protocol by its name: its prompts, its judge, and one table with the published rows of other methods
beside yours. Prompts and judges that are not shipped are read below --data and checked by sha256, where the published
file's is known. --list says what each suite needs, and where to get it."""
KNOWN_METHODS = f"{', '.join(DEFAULT)} (the default), lora:STRENGTH, always:WEIGHT"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    made = argparse.ArgumentParser(prog="python -m unguide_bench", description=DESCRIPTION, allow_abbrev=False)
    add = made.add_argument_group("what is generated").add_argument
    add("--prompts", type=Path, required=True, help="official prompt JSON, or a CSV with prompt, evaluation_seed, ...")
    add("--checkpoint", required=True, help="as the server names it, in its models/checkpoints")
    add("--lora", required=True, help="the erasure LoRA, as the server names it, in its models/loras")
    add("--methods", nargs="+", default=list(DEFAULT), metavar="METHOD", help=KNOWN_METHODS)
    add("--concept", default="", help="what is erased, a word or two (default: what the JSON's target asks for)")
    add(
        "--concept-prompt",
        default="",
        help="its own prompt, for the gate (default: that of the LoRA's metadata, else the target)",
    )
    add("--negative", default="", help="the negative prompt of the method 'negative' (default: the concept)")
    add("--strength", type=float, default=1.0, help="of the LoRA in UnGuide (default: 1)")
    add("--kind", choices=(*KINDS, ATTACK, UNSCORED), default=KINDS[0], help="of a CSV's prompts that do not say")
    add("--limit", type=int, help="the first prompts alone")
    add("--seeds", type=int, default=10, help="images of each prompt without a seed of its own (default: 10)")
    add("--first-seed", type=int, default=0, help="the first of them (default: 0)")
    for name in ("steps", "cfg", "size", "sampler", "scheduler"):
        value = getattr(Settings, name)
        add(f"--{name}", type=type(value), default=value, help=f"default: {value}")
    _add_where(made)
    add = made.add_argument_group("who judges").add_argument
    add("--judge", choices=JUDGES, default=NONE, help="of which class an image is (default: none)")
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
    add("--weights", type=Path, metavar="FOLDER", help="of the judges giphy and unlearncanvas")
    return made


def suite_parser() -> argparse.ArgumentParser:
    """Return the parser of `suite`."""
    made = argparse.ArgumentParser(prog="python -m unguide_bench suite", description=SUITE, allow_abbrev=False)
    made.add_argument("name", nargs="?", metavar="NAME", help=", ".join(SUITES))
    made.add_argument("--list", action="store_true", help="say what each suite measures and needs")
    add = made.add_argument_group("what is generated").add_argument
    add("--checkpoint", help="as the server names it, in its models/checkpoints")
    add("--lora", help=f"the erasure LoRA, as the server names it; {CONCEPT} stands for the concept, with _ for spaces")
    add("--methods", nargs="+", default=list(DEFAULT), metavar="METHOD", help=KNOWN_METHODS)
    add("--concept", nargs="+", default=[], help="some of the suite's concepts, or others (default: the suite's)")
    add("--strength", type=float, default=1.0, help="of the LoRA in UnGuide (default: 1)")
    add("--limit", type=int, help="so many prompts of each kind; the table says so")
    for name, what in (("seeds", "so many of the suite's seeds"), ("steps", "of an image"), ("cfg", "of the prompts")):
        add(f"--{name}", type=float if name == "cfg" else int, help=f"{what} (default: the suite's)")
    for name in ("size", "sampler", "scheduler"):
        value = getattr(Settings, name)
        add(f"--{name}", type=type(value), default=value, help=f"default: {value}")
    _add_where(made)
    add = made.add_argument_group("who judges").add_argument
    add("--data", type=Path, metavar="FOLDER", help="published prompts and judges' weights; see --list")
    add("--judge", choices=JUDGES, help="another judge than the suite's; the table says so")
    add("--unverified", action="store_true", help="take files that are not the published ones; the table says so")
    return made


def _add_where(made: argparse.ArgumentParser) -> None:
    add = made.add_argument_group("where").add_argument
    add("--server", nargs="+", default=[], metavar="URL", help="running ComfyUIs; several need Ray")
    add("--ray", default="local", metavar="ADDRESS", help="of several servers: local, auto, or a cluster's address")
    add(
        "--timeout",
        type=float,
        default=600.0,
        help="seconds that an image may take, its time in the queue not counted (default: 600)",
    )
    add("--out", type=Path, default=Path("bench_output"), help="folder of the run (default: bench_output)")
    add("--export", type=Path, metavar="FOLDER", help="copy images as class/NNNNN.png with a CSV, for other tools")


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
        options.weights,
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


def run_suite(options: argparse.Namespace) -> str:
    """Run a suite and return its table, or the list of suites. Raises: BenchError."""
    if options.list:
        return listing()
    if missing := [f"--{name}" for name in ("checkpoint", "lora") if not getattr(options, name)]:
        raise BenchError(f"a suite needs {' and '.join(missing)}: files as the server names them")
    if options.name not in SUITES:
        raise BenchError(f"unknown suite {options.name!r}; choose from {', '.join(SUITES)}")
    suite = SUITES[options.name]
    settings = Settings(
        checkpoint=options.checkpoint,
        lora=options.lora,
        strength=options.strength,
        steps=suite.steps if options.steps is None else options.steps,
        cfg=suite.cfg if options.cfg is None else options.cfg,
        sampler=options.sampler,
        scheduler=options.scheduler,
        size=options.size,
    )
    return run_protocol(
        Protocol(
            options.name,
            settings,
            methods=tuple(dict.fromkeys(Method.parse(text) for text in options.methods)),
            servers=Servers(addresses(options.server), options.ray, options.timeout),
            out=options.out,
            data=options.data,
            concepts=tuple(options.concept),
            judge=options.judge or "",
            limit=options.limit,
            seeds=options.seeds,
            verified=not options.unverified,
            exported=options.export,
        )
    )


COMMANDS: dict[str, tuple[Callable[[], argparse.ArgumentParser], Callable[[argparse.Namespace], str]]] = {
    "suite": (suite_parser, run_suite),
    "reproduce": (reproduce_parser, reproduce),
}
"""What the first argument may be; without one of them, prompts from a file are measured."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if everything was generated and judged, 1 if something failed, 130 if it was interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    words = list(sys.argv[1:] if arguments is None else arguments)
    make, command = COMMANDS.get(words[0], (parser, run)) if words else (parser, run)
    options = make().parse_args(words[1:] if command is not run else words)
    try:
        sys.stdout.write(command(options))
    except BenchError as error:
        sys.stderr.write(f"unguide_bench: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"unguide_bench: stopped; start again to resume, {options.out} is kept\n")
        return 130
    return 0
