"""The command line of `python -m unguide_train`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unguide_core.closed_form import ClosedForm
from unguide_core.training.prompts import lines
from unguide_core.training.recipe import PRESETS
from unguide_core.vocabulary import KEPT_PROMPTS, KINDS, Edit, pairs_of

from .config import Concept, Config, ConfigError, from_values, read_yaml

log = logging.getLogger("unguide_train")

RECIPE = {
    "iterations": int,
    "learning_rate": float,
    "learning_rate_down": float,
    "rank": int,
    "alpha": float,
    "erasure_strength": float,
    "cfg": float,
    "schedule_steps": int,
    "seed": int,
}
"""Options that change the recipe, with their types."""
_NAMES = {"learning_rate": "rate_up", "learning_rate_down": "rate_down"}
_NAMES |= {"erasure_strength": "negative_guidance", "cfg": "guidance_scale"}


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the options."""
    made = argparse.ArgumentParser(
        prog="python -m unguide_train",
        description="Trains LoRAs that erase a concept from a Stable Diffusion 1.x or SDXL model. No images needed.",
    )
    made.add_argument(
        "--config", type=Path, help="YAML file with settings and any number of concepts; options override it"
    )
    made.add_argument("--base", type=Path, help="checkpoint (.safetensors), or a folder that diffusers saved")
    made.add_argument(
        "--tokenizer",
        type=Path,
        help="folder of CLIP's tokenizer (default: that of the ComfyUI that the checkpoint or this program is in; a "
        "diffusers folder has its own)",
    )
    made.add_argument("--concept", help="what to erase, a word or two")
    made.add_argument("--reference", help="what to generate instead")
    made.add_argument("--synonym", action="append", default=[], help="another word for the concept; may be repeated")
    made.add_argument("--out", type=Path, help="the result (.safetensors); with --config a folder")
    made.add_argument("--preset", choices=("selective", "paper"), help="default: selective")
    made.add_argument("--layers", help="object, explicit content, style or custom (default: object)")
    made.add_argument("--pattern", help="for --layers custom: a regular expression on names of linear layers")
    for name, kind in RECIPE.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=kind, help="default: the preset's")
    made.add_argument("--size", type=int, help="of images, in pixels (default: 512, SDXL 1024)")
    made.add_argument("--precision", choices=("fp32", "fp16", "bf16"), help="of the base model (default: fp32)")
    made.add_argument("--rows", type=int, help="maximum batch size (default: 16)")
    made.add_argument(
        "--no-calibration", dest="calibrate", action="store_false", default=None, help="skip the calibration"
    )
    made.add_argument("--logs", type=Path, help="folder of TensorBoard logs")
    made.add_argument(
        "--ray", metavar="ADDRESS", help="train on Ray: auto (the cluster that is running), local, or an address"
    )
    made.add_argument("--workers", type=int, help="of --ray local (default: one per core)")
    closed = made.add_argument_group("without training")
    closed.add_argument(
        "--closed-form", action="store_true", help="solve for the LoRA instead of training it: see docs/closed-form.md"
    )
    closed.add_argument("--list", type=Path, help="file of concepts, a line each: 'cat, kitty, feline -> forest'")
    closed.add_argument("--kind", choices=KINDS, default="object", help="how prompts name the concepts")
    closed.add_argument("--prompts", type=Path, help="file of further prompts to erase: 'prompt -> replacement' lines")
    closed.add_argument("--keep", type=Path, help="file of prompts to keep besides the shipped ones, one per line")
    closed.add_argument("--shipped", type=int, default=KEPT_PROMPTS, help="number of shipped prompts to keep")
    closed.add_argument("--joint", action="store_true", help="write one LoRA for all concepts instead of one each")
    return made


def config_of(options: argparse.Namespace) -> Config:
    """Returns the configuration from options and file. Raises: ConfigError."""
    values: dict[str, Any] = read_yaml(options.config) if options.config else {}
    for name in ("base", "tokenizer", "preset", "layers", "pattern", "size", "precision", "rows", "calibrate", "logs"):
        if getattr(options, name) is not None:
            values[name] = getattr(options, name)
    changes = {_NAMES.get(name, name): getattr(options, name) for name in RECIPE if getattr(options, name) is not None}
    if "rate_up" in changes:
        preset = PRESETS.get(values.get("preset", ""), PRESETS["selective"])
        changes.setdefault("rate_down", preset.with_rates(changes["rate_up"]).rate_down)
    if changes:
        values["recipe"] = {**values.get("recipe", {}), **changes}
    if options.concept or not options.config:
        concept: dict[str, Any] = {"concept": options.concept or "", "reference": options.reference or ""}
        concept["synonyms"] = tuple(options.synonym)
        if options.out and not options.config:
            concept["out"] = options.out
        values["concepts"] = [concept]
    elif options.reference or options.synonym:
        raise ConfigError(
            "--reference and --synonym belong to one concept: give --concept too, or put them into the file"
        )
    if options.config and options.out:
        values["out"] = options.out
    if "base" not in values:
        raise ConfigError("there is no base model; give --base, or 'base:' in the configuration")
    return from_values(values)


def task_of(options: argparse.Namespace) -> Any:
    """Returns what to erase in closed form, a `closed_form.Task`. Raises: ConfigError."""
    from .closed_form import Task, read_list

    if options.config or options.ray:
        raise ConfigError("--closed-form takes neither --config nor --ray; name concepts with --concept or --list")
    if options.base is None or options.out is None:
        raise ConfigError("--closed-form needs --base, the model, and --out, the file or folder to write")
    try:
        edits = read_list(options.list, options.kind) if options.list else ()
        more = pairs_of(options.prompts.read_text(encoding="utf-8")) if options.prompts else ()
        kept = lines(options.keep.read_text(encoding="utf-8")) if options.keep else ()
        if options.concept or more:
            reference = options.reference or KINDS[options.kind].reference or ""
            own = Edit(options.concept or "", reference, tuple(options.synonym), options.kind, more=more)
            edits = (own, *edits)
        changes = {"rank": options.rank, "eta": options.erasure_strength}
        settings = ClosedForm(**{name: value for name, value in changes.items() if value is not None})
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return Task(options.base, edits, options.out, options.tokenizer, options.joint, kept, options.shipped, settings)


def results(config: Config, options: argparse.Namespace) -> Iterator[tuple[Concept, Any]]:
    """Yields every concept with its summary, or the exception that it failed with."""
    if options.ray:
        from .cluster import train_on_ray

        yield from train_on_ray(config, config.concepts, options.ray, options.workers)
        return
    from .job import train_concept

    for concept in config.concepts:
        try:
            yield concept, train_concept(config, concept)
        except (ValueError, RuntimeError, OSError) as error:
            yield concept, error


def table(rows: Sequence[Any]) -> str:
    """Returns the summaries of all concepts as a table."""
    columns = ("concept", "iterations", "loss", "held out", "evaluations", "seconds", "file")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        held = "-" if row.held_out is None else f"{row.held_out:.3f}"
        lines.append(
            f"| {row.concept} | {row.iterations} | {row.loss:.4f} | {held} | {row.evaluations} | {row.seconds:.0f} "
            f"| {row.path} |"
        )
    return "\n".join(lines)


def erased(task: Any) -> int:
    """Writes the adapters of a `closed_form.Task`; returns 0 if all were written, else 1."""
    from .closed_form import erase

    done: list[Any] = []
    try:
        done += erase(task, log.info)
    except (ValueError, RuntimeError, OSError) as error:
        sys.stderr.write(f"unguide_train: {error}\n")
        return 1
    sys.stdout.write(table(done) + "\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains the concepts; returns 0 if all were written, 1 if one failed, 2 for wrong settings."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parser().parse_args(arguments)
    try:
        if options.closed_form:
            task = task_of(options)
        else:
            config = config_of(options)
    except ConfigError as error:
        sys.stderr.write(f"unguide_train: {error}\n")
        return 2
    if options.closed_form:
        return erased(task)
    done, failed = [], False
    try:
        for concept, result in results(config, options):
            if isinstance(result, Exception):
                failed = True
                sys.stderr.write(f"unguide_train: {concept.concept}: {result}\n")
            else:
                done.append(result)
    except RuntimeError as error:
        sys.stderr.write(f"unguide_train: {error}\n")
        return 1
    if done:
        sys.stdout.write(table(done) + "\n")
    return 1 if failed else 0
