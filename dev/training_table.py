"""Trains the demo's ten concepts by each of the two ways, the node's and unguide_train's, and by the official loop.

On the narrow demo model, which computes what the shipped checkpoint computes: for the node as the host's own SD 1.5
class, for unguide_train as a checkpoint file of that width. Everything but the images' size has each one's default. The
official loop is the node's preset `paper` with the learning rate that this model needs. What the adapters erase and
keep is measured as `python -m demo.ablation` does. Run by `python3 dev training`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from dev.host import Host
from dev.narrow_host import load_narrow_model
from dev.pack import pack_module, start_host

CHECKPOINT = "unguide-demo.safetensors"
SIZE = 64
WAYS = ("node", "unguide_train", "official loop")
COLUMNS = ("Acc_e", "Acc_g", "in scenes", "Acc_s")


def write_narrow_checkpoint(path: Path) -> None:
    """Write the narrow UNet and the working layers of the text encoder as an SD 1.x checkpoint file."""
    from safetensors.torch import save_file

    from demo.seed import clip_state_dict, narrow_unet_state_dict
    from demo.shapes import TEXT_LAYERS

    text = {
        f"cond_stage_model.transformer.text_model.{name}": weight
        for name, weight in clip_state_dict().items()
        if not name.startswith("encoder.layers.") or int(name.split(".")[2]) < TEXT_LAYERS
    }
    unet = {f"model.diffusion_model.{name}": weight for name, weight in narrow_unet_state_dict().items()}
    save_file({**text, **unet}, str(path))


class OutsideTheHost:
    """unguide_train.

    Args:
        folder: for the checkpoint file and the results.
    """

    def __init__(self, folder: Path, seed: int):
        from unguide_train.model import load_base

        self.folder, self.seed = folder, seed
        self.checkpoint = folder / "narrow.safetensors"
        self.tokenizer = Host.from_environment().comfyui / "comfy" / "sd1_tokenizer"
        write_narrow_checkpoint(self.checkpoint)
        self.base = load_base(self.checkpoint, self.tokenizer)

    def train(self, concept: str, reference: str, synonyms: tuple[str, ...]) -> tuple[Any, float]:
        """Train a concept; return the adapter, its layers by kohya's names, and the seconds it took."""
        import copy

        from unguide_core.formats import load_adapter
        from unguide_train.config import from_values
        from unguide_train.job import train_concept

        config = from_values(
            {
                "base": self.checkpoint,
                "tokenizer": self.tokenizer,
                "out": self.folder,
                "size": SIZE,
                "recipe": {"seed": self.seed},
                "concepts": [{"concept": concept, "reference": reference, "synonyms": synonyms}],
            }
        )
        base = replace(self.base, unet=copy.deepcopy(self.base.unet))
        done = train_concept(config, config.concepts[0], base, quiet=True)
        return load_adapter(done.path), done.seconds


class InTheGraph:
    """The node's own code on the host's own model.

    Args:
        official: by the official loop, else by the defaults.
    """

    def __init__(self, seed: int, official: bool = False):
        import nodes
        from demo.erasure import RECIPES
        from demo.shapes import TEXT_LAYERS

        self.changes: dict[str, Any] = {"seed": seed}
        if official:
            self.changes |= {"preset": "paper", "learning_rate": RECIPES["paper"].rate_up}
        self.model = load_narrow_model()
        loader = nodes.CheckpointLoaderSimple()  # type: ignore[attr-defined]  # ComfyUI's nodes, not ours
        _, self.clip, _ = loader.load_checkpoint(CHECKPOINT)
        # the demo's other layers change nothing, and would take most of the time
        del self.clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[TEXT_LAYERS:]
        self.node = pack_module("nodes.train").TrainErasureLora
        self.kohya = pack_module("unguide_comfy.train.predictor")._kohya_names(self.model.model)

    def train(self, concept: str, reference: str, synonyms: tuple[str, ...]) -> tuple[Any, float]:
        """As `OutsideTheHost.train`."""
        began = time.perf_counter()
        lora = self.lora(concept, reference, synonyms)
        layers = {self.kohya[path]: layer for path, layer in lora.adapter.layers.items()}
        return replace(lora.adapter, layers=layers), time.perf_counter() - began

    def lora(self, concept: str, reference: str, synonyms: tuple[str, ...]) -> Any:
        """Train a concept; return the erasure LoRA as the node gives it."""
        import torch

        inputs = {
            one.id: one.default for one in self.node.define_schema().inputs if getattr(one, "default", None) is not None
        }
        words = {"concept": concept, "generate_instead": reference, "synonyms": ", ".join(synonyms)}
        with torch.inference_mode():
            latent = {"samples": torch.zeros(1, 4, SIZE // 8, SIZE // 8)}
            out = self.node.execute(
                model=self.model, latent_image=latent, clip=self.clip, **{**inputs, **words, **self.changes}
            )
        ((lora,), _) = out.args
        return lora


def narrow_layers(adapter: Any) -> dict[str, Any]:
    """Return an adapter's layers by the module paths of the narrow UNet, given kohya's names."""
    from demo.erasure import PREFIX
    from unguide_core.adapter import LowRank
    from unguide_core.adapter.names import HOST, renamed

    names = renamed(adapter.layers, HOST, "demo")
    return {
        names[name].removeprefix(PREFIX): LowRank(layer.down.float(), layer.up.float(), layer.scale)
        for name, layer in adapter.layers.items()
    }


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return the largest relative difference of a layer's change between two adapters of the same layers."""
    assert set(one) == set(other)
    differences = []
    for name, layer in one.items():
        delta = layer.weight_delta()
        differences.append(float((delta - other[name].weight_delta()).norm() / delta.norm()))
    return max(differences)


# ---------------------------------------------------------------- one concept, in a process of its own


_ways: dict[str, Any] = {}


def start(folder: Path, seed: int, asked: Sequence[str]) -> None:
    """Load, in a process with one core, what `measure` needs."""
    import torch

    start_host()
    torch.set_num_threads(1)
    from demo.narrow import start_worker
    from demo.seed import SEED_PATH

    own = folder / str(os.getpid())
    own.mkdir()
    makers = (lambda: InTheGraph(seed), lambda: OutsideTheHost(own, seed), lambda: InTheGraph(seed, official=True))
    _ways.update({way: make() for way, make in zip(WAYS, makers, strict=True) if way in asked})
    start_worker(Host.from_environment().comfyui / "comfy" / "sd1_tokenizer", SEED_PATH)


def measure(concept: str, images: int) -> dict[str, Any]:
    """Return the figures of a concept's adapters, by way."""
    from demo.ablation import measured
    from demo.captions import REFERENCES, SYNONYMS

    row: dict[str, Any] = {"concept": concept}
    layers = {}
    for name, way in _ways.items():
        adapter, seconds = way.train(concept, REFERENCES[concept], SYNONYMS[concept])
        layers[name] = narrow_layers(adapter)
        cost = {"evaluations": adapter.card.settings["evaluations"], "seconds": seconds}
        row[name] = {**cost, **measured(concept, layers[name], images)}
    if set(WAYS[:2]) <= set(layers):
        row["difference"] = difference(layers["node"], layers["unguide_train"])
    return row


# ---------------------------------------------------------------- tables


def tables(rows: list[dict[str, Any]]) -> str:
    """Return what the adapters of every concept and way erase and keep, and what they cost, with means, in Markdown."""
    ways = [way for way in WAYS if all(way in row for row in rows)]
    columns = [(way, how) for way in ways for how in ("alone", "gated")]
    heads = [f"{way}, {'with its gate' if how == 'gated' else how}" for way, how in columns]
    lines = [_row("concept", *heads, "difference"), "|---" * (len(heads) + 2) + "|"]
    for row in rows:
        accuracies = [_cell(row[way][how]) for way, how in columns]
        lines.append(_row(row["concept"], *accuracies, _percent(row.get("difference"))))
    means = [_cell({name: fmean(row[way][how][name] for row in rows) for name in COLUMNS}) for way, how in columns]
    lines.append(_row("**mean**", *means, ""))
    costs = [(way, cost) for cost in ("evaluations", "seconds") for way in ways]
    lines += ["", _row("concept", *(f"{cost}, {way}" for way, cost in costs)), "|---" * (len(costs) + 1) + "|"]
    for row in rows:
        lines.append(_row(row["concept"], *(f"{row[way][cost]:.0f}" for way, cost in costs)))
    lines.append(_row("**mean**", *(f"{fmean(row[way][cost] for row in rows):.0f}" for way, cost in costs)))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _cell(figures: Mapping[str, float]) -> str:
    return " / ".join(f"{figures[name]:.0f}" for name in COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 dev training")
    parser.add_argument("--concept", nargs="+", help="default: all ten")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=WAYS, help="default: all three")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=10, help="per prompt (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one core each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="every concept's figures; those in the file already are kept")
    options = parser.parse_args()
    from demo.captions import CLASSES

    rows = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    left = [concept for concept in options.concept or CLASSES if concept not in {row["concept"] for row in rows}]
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(
            options.jobs, get_context("spawn"), start, (Path(folder), options.seed, options.way)
        ) as pool,
    ):
        for task in [pool.submit(measure, concept, options.images) for concept in left]:
            rows.append(task.result())
            sys.stderr.write(f"{json.dumps(rows[-1])}\n")
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
    print(f"{' / '.join(COLUMNS)}, percent\n\n{tables(rows)}")


if __name__ == "__main__":
    main()
