"""Prints the script that repeats UnGuide's main experiment (arXiv 2508.05755, Table 1) on a checkpoint of SD 1.4."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from .suites import CLIP_FOLDER, OBJECTS

DESCRIPTION = """\
Prints a shell script that repeats the paper's main experiment from nothing but a checkpoint: it trains ten adapters
by the official recipe, calibrates them, generates and judges the images, and prints the table with the published rows
beside it. It runs nothing. A ComfyUI with this pack must be running where the script is started."""


def reproduce_parser() -> argparse.ArgumentParser:
    """Return the parser of `reproduce`."""
    made = argparse.ArgumentParser(
        prog="python -m unguide_bench reproduce", description=DESCRIPTION, allow_abbrev=False
    )
    made.add_argument(
        "--comfyui", type=Path, default=Path("ComfyUI"), help="its folder, with the checkpoint (default: ComfyUI)"
    )
    made.add_argument(
        "--checkpoint",
        default="sd-v1-4.safetensors",
        help="in its models/checkpoints (default: sd-v1-4.safetensors)",
    )
    made.add_argument("--server", default="http://127.0.0.1:8188", help="default: http://127.0.0.1:8188")
    made.add_argument("--preset", choices=("paper", "selective"), default="paper", help="of training (default: paper)")
    made.add_argument("--data", type=Path, default=Path("data"), help=f"folder with {CLIP_FOLDER} (default: data)")
    made.add_argument("--out", type=Path, default=Path("cifar10"), help="folder of the run (default: cifar10)")
    return made


def reproduce(options: argparse.Namespace) -> str:
    """The script."""
    models = options.comfyui / "models"
    folder = f"unguide-cifar10-{options.preset}"
    base, out = models / "checkpoints" / options.checkpoint, models / "loras" / folder
    train = ["python", "-m", "unguide_train", "--config", f"{options.out}.yaml", "--base", base, "--out", out]
    train += ["--preset", options.preset]
    suite = ["python", "-m", "unguide_bench", "suite", "cifar10", "--server", options.server]
    suite += ["--checkpoint", options.checkpoint, "--lora", f"{folder}/{{concept}}.safetensors"]
    suite += ["--data", options.data, "--out", options.out]
    return "\n".join(
        (
            "#!/bin/sh",
            "# UnGuide's main experiment (arXiv 2508.05755, Table 1), from a checkpoint to the table.",
            f"# Needs: pip install -e '.[train,bench]'; openai/clip-vit-base-patch32 in {options.data / CLIP_FOLDER};",
            f"# and a ComfyUI with this pack at {options.server}.",
            "set -e",
            f"cat > {shlex.quote(f'{options.out}.yaml')} <<'END'",
            *_configuration(),
            "END",
            "# trains the ten adapters, and calibrates each",
            _line(train),
            "# generates, judges, and prints the table; started again, it resumes",
            _line(suite),
            "",
        )
    )


def _configuration() -> list[str]:
    """The ten concepts for unguide_train."""
    lines = ["concepts:"]
    for concept, (reference, synonyms) in OBJECTS.items():
        lines += [f"  - concept: {concept}", f"    reference: {reference}", f"    synonyms: [{', '.join(synonyms)}]"]
    return lines


def _line(words: list[str | Path]) -> str:
    return " ".join(shlex.quote(str(word)) for word in words)
