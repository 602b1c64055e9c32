"""Calibrates the demo's erasure LoRAs with the pack in a real ComfyUI, and writes their cards.

Run by `python3 dev calibrate`. Measured at the demo UNet's narrow width, which computes what the checkpoint computes
(`dev.narrow_host`), and written for the checkpoint.

Objects are calibrated in other scenes than those in which `python3 dev gate` measures.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from typing import Any

from dev.narrow_host import load_narrow_model, narrow_lora
from dev.pack import pack_module, start_host
from dev.workspace import PACK

CHECKPOINT = "unguide-demo.safetensors"
SETS = ("paper", "selective")
LATENT, CFG = (1, 4, 8, 8), 4.0
LOOKS, OWN_REPEATS = (1, 2, 4), 8


def calibrate(names: list[str], concepts: list[str], settings: dict[str, Any]) -> None:
    """Measures the erasure LoRAs of the sets for the concepts, and replaces the cards of the repository's files."""
    import torch

    import nodes
    from demo.captions import CLASSES, PLACES, SCENES, article, words_for

    calibration, erasure = pack_module("unguide_comfy.calibration"), pack_module("unguide_comfy.erasure")
    save_adapter = pack_module("unguide_core.formats").save_adapter
    loader = nodes.CheckpointLoaderSimple()  # type: ignore[attr-defined]  # ComfyUI's nodes, not ours
    model, clip, _ = loader.load_checkpoint(CHECKPOINT)
    model_key, narrow = pack_module("unguide_comfy.identity").model_key(model), load_narrow_model()
    known: dict[str, object] = {}

    def encode(prompt: str) -> object:
        if prompt not in known:
            known[prompt] = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        return known[prompt]

    def of(klass: str) -> list[str]:
        words = [f"a photo of the {word}" for word in words_for(klass)]
        return words + [f"{article(klass)} {klass} {PLACES[scene]}" for scene in SCENES[0::3]]

    plain = ["", *(f"a photo of the {scene}" for scene in SCENES)]
    loras, prompts, paths = [], [], []
    for name in names:
        for concept in concepts:
            path = PACK / "demo" / "loras" / name / f"{concept}.safetensors"
            adapter = pack_module("unguide_core.formats").load_adapter(path)
            own = adapter.card.concept_prompt
            loras.append(erasure.ErasureLora(path.name, adapter, 1.0, own, encode(own), encode("")))
            others = [*plain, *(prompt for other in CLASSES if other != concept for prompt in of(other))]
            within = [encode(prompt) for prompt in of(concept) if prompt != own]
            prompts.append(calibration.Prompts(within, [encode(prompt) for prompt in others]))
            paths.append(path)
    started = time.perf_counter()
    chosen = calibration.CalibrationSettings(**settings)
    measured = [narrow_lora(lora, narrow) for lora in loras]
    found = calibration.calibrated(narrow, measured, prompts, encode(""), CFG, torch.zeros(LATENT), chosen)
    for path, lora, of_narrow in zip(paths, loras, found, strict=True):
        keys = {"model": model_key, "adapter": lora.calibration_key}
        card = replace(of_narrow.adapter.card, calibration={**of_narrow.adapter.card.calibration, **keys})
        save_adapter(replace(lora.adapter, card=card), path)
        sys.stdout.write(f"{path.parent.name}/{path.stem}: {_described(of_narrow)}\n")
    sys.stdout.write(f"{len(found)} erasure LoRAs calibrated in {time.perf_counter() - started:.0f} s\n")


def _described(lora: object) -> str:
    core = pack_module("unguide_core.calibration")
    calibration = core.Calibration.from_card(lora.adapter.card.calibration)  # type: ignore[attr-defined]
    parts = []
    for name, levels in calibration.levels.items():
        scores = [level.threshold(0.01).score for level in levels]
        missed = [level.concept.share_below(score) for level, score in zip(levels, scores, strict=True)]
        parts.append(f"{name} " + " ".join(f"{at:.2f} ({share:.0%})" for at, share in zip(scores, missed, strict=True)))
    return ", ".join(parts) + " (thresholds by falling noise level, and the share of the concept's prompts below)"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--concept", nargs="+", help="default: all ten")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start_host()
    import torch

    from demo.captions import CLASSES

    if unknown := set(arguments.concept or ()) - set(CLASSES):
        parser.error(f"no such concept: {', '.join(sorted(unknown))}; choose from {', '.join(CLASSES)}")
    with torch.inference_mode():
        settings = {"looks": LOOKS, "repeats": arguments.repeats, "own_repeats": OWN_REPEATS, "seed": arguments.seed}
        calibrate(arguments.set, arguments.concept or list(CLASSES), settings)


if __name__ == "__main__":
    main()
