"""Trains the demo's ten concepts by each of the two ways, the node's and unguide_train's, and measures both.

On the narrow demo model, which computes what the shipped checkpoint computes: for the node as the host's own SD 1.5
class, for unguide_train as a checkpoint file of that width. Everything is left at what the two ship as defaults but the
pictures' size. What the adapters erase and spare is measured as `python -m demo.ablation` does. Run by
`python3 dev training`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from dev.host import Host
from dev.narrow_host import load_narrow_model
from dev.pack import pack_module, start_host

CHECKPOINT = "unguide-demo.safetensors"
SIZE = 64
WAYS = ("node", "unguide_train")
COLUMNS = ("Acc_e", "Acc_g", "in scenes", "Acc_s")


def write_narrow_checkpoint(path: Path) -> None:
    """Writes the narrow UNet and the working layers of the text encoder as an SD 1.x checkpoint file."""
    from safetensors.torch import save_file

    from demo.seed import clip_state_dict, narrow_unet_state_dict
    from demo.text import LAYERS

    text = {
        f"cond_stage_model.transformer.text_model.{name}": weight
        for name, weight in clip_state_dict().items()
        if not name.startswith("encoder.layers.") or int(name.split(".")[2]) < LAYERS
    }
    unet = {f"model.diffusion_model.{name}": weight for name, weight in narrow_unet_state_dict().items()}
    save_file({**text, **unet}, str(path))


class OutsideTheHost:
    """unguide_train.

    Args:
        folder: for the checkpoint file and the results.
        recipe: changes of the preset's values, besides the seed.
    """

    def __init__(self, folder: Path, seed: int, preset: str):
        from unguide_train.model import load_base

        self.folder, self.seed, self.preset = folder, seed, preset
        self.checkpoint = folder / "narrow.safetensors"
        self.tokenizer = Host.from_environment().comfyui / "comfy" / "sd1_tokenizer"
        write_narrow_checkpoint(self.checkpoint)
        self.base = load_base(self.checkpoint, self.tokenizer)

    def train(self, concept: str, reference: str, synonyms: tuple[str, ...]) -> tuple[Any, dict[str, float]]:
        """The adapter, its layers by kohya's names, and what it cost."""
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
                "preset": self.preset,
                "recipe": {"seed": self.seed},
                "concepts": [{"concept": concept, "reference": reference, "synonyms": synonyms}],
            }
        )
        base = replace(self.base, unet=copy.deepcopy(self.base.unet))
        done = train_concept(config, config.concepts[0], base, quiet=True)
        return load_adapter(done.path), {"evaluations": done.evaluations, "seconds": done.seconds}


class InTheGraph:
    """The node's own code on the host's own model."""

    def __init__(self, seed: int, preset: str):
        import nodes
        from demo.text import LAYERS

        self.seed, self.preset = seed, preset
        self.model = load_narrow_model()
        loader = nodes.CheckpointLoaderSimple()  # type: ignore[attr-defined]  # ComfyUI's nodes, not ours
        _, self.clip, _ = loader.load_checkpoint(CHECKPOINT)
        # the demo's other layers change nothing, and would take most of the time
        del self.clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[LAYERS:]
        self.node = pack_module("nodes.train").TrainErasureLora
        self.kohya = pack_module("unguide_comfy.training")._kohya_names(self.model.model)

    def train(self, concept: str, reference: str, synonyms: tuple[str, ...]) -> tuple[Any, dict[str, float]]:
        """As `OutsideTheHost.train`."""
        import time

        import torch

        inputs = {
            one.id: one.default for one in self.node.define_schema().inputs if getattr(one, "default", None) is not None
        }
        words = {"concept": concept, "reference": reference, "synonyms": ", ".join(synonyms)}
        own = {**inputs, **words, "preset": self.preset, "seed": self.seed}
        began = time.perf_counter()
        with torch.inference_mode():
            latent = {"samples": torch.zeros(1, 4, SIZE // 8, SIZE // 8)}
            out = self.node.execute(model=self.model, latent_image=latent, clip=self.clip, **own)
        ((lora,), losses) = out.args
        layers = {self.kohya[path]: layer for path, layer in lora.adapter.layers.items()}
        seconds = time.perf_counter() - began
        return replace(lora.adapter, layers=layers), {"iterations": len(losses["loss"]), "seconds": seconds}


def narrow_layers(adapter: Any) -> dict[str, Any]:
    """The layers of an adapter in kohya's names, by the module paths of the narrow UNet."""
    from demo.erasure import PREFIX
    from unguide_core.adapter import LowRank
    from unguide_core.names import HOST, renamed

    names = renamed(adapter.layers, HOST, "demo")
    return {
        names[name].removeprefix(PREFIX): LowRank(layer.down.float(), layer.up.float(), layer.scale)
        for name, layer in adapter.layers.items()
    }


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest relative difference of a layer's change between two adapters of the same layers."""
    assert set(one) == set(other)
    found = []
    for name, layer in one.items():
        delta = layer.weight_delta()
        found.append(float((delta - other[name].weight_delta()).norm() / delta.norm()))
    return max(found)


def table(rows: list[dict[str, Any]]) -> str:
    """The figures of every concept, both ways, and their means, in Markdown."""
    heads = [f"{way}, {how}" for way in WAYS for how in ("alone", "with its gate")]
    lines = [f"| concept | {' | '.join(heads)} | difference | seconds, each |", "|---" * (len(heads) + 3) + "|"]
    for row in rows:
        cells = [_cell(row[way][how]) for way in WAYS for how in ("alone", "gated")]
        seconds = " / ".join(f"{row[way]['seconds']:.0f}" for way in WAYS)
        lines.append(f"| {row['concept']} | {' | '.join(cells)} | {100 * row['difference']:.1f} % | {seconds} |")
    means = [
        _cell({name: fmean(row[way][how][name] for row in rows) for name in COLUMNS})
        for way in WAYS
        for how in ("alone", "gated")
    ]
    largest = max(row["difference"] for row in rows)
    lines.append(f"| **mean** | {' | '.join(means)} | at most {100 * largest:.1f} % | |")
    return "\n".join(lines)


def _cell(figures: Mapping[str, float]) -> str:
    return " / ".join(f"{figures[name]:.0f}" for name in COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--concept", nargs="+", help="default: all ten")
    parser.add_argument("--preset", default="selective", choices=("selective", "paper"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=10, help="per prompt (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="every concept's figures; those in the file already are kept")
    options = parser.parse_args()
    start_host()
    from demo.ablation import measured
    from demo.captions import CLASSES, SYNONYMS
    from demo.erasure import REFERENCES
    from demo.narrow import start_worker
    from demo.seed import SEED_PATH

    rows = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    done = {row["concept"] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        outside = OutsideTheHost(Path(folder), options.seed, options.preset)
        ways: tuple[Any, ...] = (InTheGraph(options.seed, options.preset), outside)
        start_worker(outside.tokenizer, SEED_PATH)
        for concept in options.concept or CLASSES:
            if concept in done:
                continue
            row: dict[str, Any] = {"concept": concept}
            layers = []
            for name, way in zip(WAYS, ways, strict=True):
                adapter, cost = way.train(concept, REFERENCES[concept], SYNONYMS[concept])
                layers.append(narrow_layers(adapter))
                row[name] = {**cost, **measured(concept, layers[-1], options.pictures)}
            row["difference"] = difference(*layers)
            rows.append(row)
            sys.stderr.write(f"{json.dumps(row)}\n")
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
    print(f"{' / '.join(COLUMNS)}, percent\n\n{table(rows)}")


if __name__ == "__main__":
    main()
