"""The experiments' command lines: what each measures, where its tables are, and its options.

Standard library only, so that `python3 dev` shows and checks them without a ComfyUI. An experiment's module has
`run(options)`.
"""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from demo.captions import CLASSES
from dev import prepare

GATE_SETS = ("selective", "preset", "paper")
STATISTICS = ("automatic", "influence", "alignment", "paper")
CALIBRATED_SETS = ("paper", "selective")
ADAPTERS = ("base", "closed form", "closed form, held out", "selective", "paper")
WAYS = ("node", "unguide_train", "official loop")
VARIANTS = ("official", "selective", "fewer latents", "one rate", "nothing kept", "no synonyms", "three classes kept")
"""Ablations of the recipe of training."""


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Args:
        module: below `experiments`.
        summary: what it measures, in a line.
        document: where its tables are.
        add_arguments: adds its options.
    """

    module: str
    summary: str
    document: str
    add_arguments: Callable[[ArgumentParser], None]


def _concepts(parser: ArgumentParser) -> None:
    parser.add_argument("--concept", nargs="+", choices=CLASSES, default=CLASSES, help="default: all ten")


def _jobs(parser: ArgumentParser, default: int = 2) -> None:
    parser.add_argument("--jobs", type=int, default=default, help="processes, one core each (default: %(default)s)")


def _seeds(parser: ArgumentParser, count: int, first: int | None = None) -> None:
    parser.add_argument("--seeds", type=int, default=count, help="images per prompt (default: %(default)s)")
    if first is not None:
        parser.add_argument("--seed", type=int, default=first, help="the first image's (default: %(default)s)")


def _json(parser: ArgumentParser, what: str = "where to write every figure") -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help=what)


def _markdown(parser: ArgumentParser, document: str) -> None:
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help=f"a document whose table is replaced, such as {document}"
    )


def _gate(parser: ArgumentParser) -> None:
    parser.add_argument("--set", nargs="+", default=["selective"], choices=GATE_SETS, help="of erasure LoRAs")
    parser.add_argument(
        "--trained", type=Path, metavar="FOLDER", help="adapters of the set 'preset', which is trained without it"
    )
    parser.add_argument("--statistic", default=STATISTICS[0], choices=STATISTICS, help="what decides")
    parser.add_argument("--resist-adversarial", action="store_true", help="influence or alignment decides")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--images", type=int, default=20, help="noise seeds for each prompt (default: %(default)s)")
    parser.add_argument("--probe-steps", type=int, default=3, help="of 30 (default: %(default)s)")
    _json(parser, "where to write the figures and every score")
    _markdown(parser, "docs/gate.md")
    parser.add_argument(
        "--diagram",
        type=Path,
        metavar="FILE",
        help="where to write the diagram of the cascade with the first set's figures (PNG)",
    )


def _few_steps(parser: ArgumentParser) -> None:
    _seeds(parser, 4, 800_000)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=(1, 2, 3, 4, 6, 8, 10, 20, 30), help="default: %(default)s"
    )
    parser.add_argument("--scheduler", nargs="+", default=("normal", "karras"), help="default: %(default)s")
    parser.add_argument("--probe-steps", type=int, default=2, help="of 20, after which to probe (default: %(default)s)")
    _concepts(parser)
    _jobs(parser)
    _json(parser)
    _markdown(parser, "docs/gate.md")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="where to write images of the fewest steps (PNG)")


def _images(parser: ArgumentParser) -> None:
    _concepts(parser)
    parser.add_argument("--seeds", type=int, default=2, help="images per trial (default: %(default)s)")
    _json(parser)
    _markdown(parser, "docs/gate.md")


def _benchmark(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder of images and report; what is there is not generated again")
    _json(parser, "where to write the scores")
    _markdown(parser, "docs/benchmark.md")
    parser.add_argument("--quick", action="store_true", help="3 seeds, eight methods, no attacks")
    parser.add_argument("--seeds", type=int, help="images per prompt (default: 5)")
    parser.add_argument("--method", nargs="+", metavar="METHOD", help="only these of the table, and base")
    _concepts(parser)
    _jobs(parser)


def _training(parser: ArgumentParser) -> None:
    _concepts(parser)
    ways = (*WAYS, *VARIANTS)
    parser.add_argument("--way", nargs="+", choices=ways, default=WAYS, help="default: the first three")
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="of training, one or more (default: 0)")
    parser.add_argument("--images", type=int, default=10, help="per prompt (default: %(default)s)")
    _jobs(parser)
    _json(parser, "every concept's figures; those in the file already are kept")


def _instant(parser: ArgumentParser) -> None:
    _seeds(parser, 4, 900_000)
    _concepts(parser)
    parser.add_argument("--row", nargs="+", choices=ADAPTERS, default=ADAPTERS, help="default: all")
    parser.add_argument("--costs-only", action="store_true", help="measure seconds alone")
    _jobs(parser, 1)
    parser.add_argument("--start", action="store_true", help="measure closed form as a start for training instead")
    _json(parser)
    _markdown(parser, "docs/closed-form.md")


def _bench(parser: ArgumentParser) -> None:
    _json(parser)
    _markdown(parser, "docs/bench.md")
    parser.add_argument("--quick", action="store_true", help="8x8 latents and batch 1 only")
    parser.add_argument("--times", type=int, default=5, help="of each case at 8x8 and batch 1; once at larger sizes")
    parser.add_argument("--case", nargs="+", help="only these")


def _calibrate(parser: ArgumentParser) -> None:
    parser.add_argument("--set", nargs="+", default=CALIBRATED_SETS, choices=CALIBRATED_SETS, help="default: both")
    _concepts(parser)
    parser.add_argument("--repeats", type=int, default=4, help="noise seeds for each prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", action="store_true", help="calibrate the text stage alone, in seconds")
    parser.add_argument("--images", action="store_true", help="fit the image stage's probes alone")


def _policy(parser: ArgumentParser) -> None:
    _json(parser)
    _markdown(parser, "docs/policy.md")
    parser.add_argument("--images", type=int, default=2, help="of each graph (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only graphs with this in their name")
    parser.add_argument("--soak", type=int, metavar="IMAGES", help="generate so many images under the policy instead")


EXPERIMENTS = {
    "gate": Experiment("gate", "how well the gate decides, over ten concepts", "docs/gate.md", _gate),
    "few-steps": Experiment("few_steps", "the gate in schedules of 1 to 30 steps", "docs/gate.md", _few_steps),
    "images": Experiment("images", "what the gate's image stage adds", "docs/gate.md", _images),
    "benchmark": Experiment("erasure", "how well each method erases, and the attacks", "docs/benchmark.md", _benchmark),
    "training": Experiment(
        "training", "what adapters that are trained in each way erase", "docs/training.md", _training
    ),
    "instant": Experiment("instant", "erasure in closed form", "docs/closed-form.md", _instant),
    "bench": Experiment("cost", "what UnGuide costs: evaluations, time, memory", "docs/bench.md", _bench),
    "calibrate": Experiment("calibration", "writes the calibrations of the demo's LoRAs", "demo/LORAS.md", _calibrate),
    "policy": Experiment("policy.main", "graphs and attacks on a server with a policy", "docs/policy.md", _policy),
}
"""By the name of the command, in the order in which the documents come."""


def parser_of(name: str) -> ArgumentParser:
    """Return an experiment's parser, with the options that choose a host."""
    experiment = EXPERIMENTS[name]
    made = ArgumentParser(
        prog=f"python3 dev {name}", description=f"{experiment.summary} ({experiment.document})", allow_abbrev=False
    )
    prepare.add_arguments(made)
    experiment.add_arguments(made)
    return made


def main() -> None:
    """Run the experiment that the command line names, in the host's python."""
    name, *given = sys.argv[1:]
    options = parser_of(name).parse_args(given)
    importlib.import_module(f"experiments.{EXPERIMENTS[name].module}").run(options)
