"""Calibrates erasure LoRAs of the demo model with the pack, and writes the shipped ones' results into their metadata.

Measured at the demo UNet's narrow width, which computes what the checkpoint computes, and written for the checkpoint.
Objects are calibrated in other scenes than those in which `python3 dev gate` measures. With --text only the text stage
is calibrated, which takes no model evaluation; with --images only the image stage. The rest of the cards is kept.

Run by `python3 dev calibrate`.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from demo.captions import CLASSES, SCENES, photo, placed, words_for
from demo.erasure import LORAS, path_of
from dev.pack import pack_module
from experiments.narrow import narrow_lora, wide_probe
from experiments.studio import CFG, LATENT, Studio, studio

OWN_REPEATS = 8


def prompts_for(at: Studio, concept: str, lora: Any) -> Any:
    """Return the prompts that a concept's erasure LoRA is calibrated with."""

    def of(klass: str) -> list[str]:
        return [*map(photo, words_for(klass)), *(placed(klass, scene) for scene in SCENES[0::3])]

    others = ["", *map(photo, SCENES), *(prompt for other in CLASSES if other != concept for prompt in of(other))]
    within = [prompt for prompt in of(concept) if prompt != lora.concept_prompt]
    make = pack_module("unguide_core.probe.calibration").CalibrationPrompts
    return make(lora.concept, list(map(at.encode, within)), list(map(at.encode, others)), lora.name)


def settings(repeats: int = 4, seed: int = 0) -> Any:
    """Return how calibrations are measured."""
    make = pack_module("unguide_comfy.probe.calibrate").CalibrationSettings
    return make(CFG, repeats=repeats, own_repeats=OWN_REPEATS, seed=seed)


def calibrations(at: Studio, concepts: Sequence[str], loras: Sequence[Any], chosen: Any) -> list[Any]:
    """Return the calibrations of concepts' erasure LoRAs for the studio's model."""
    prompts = [prompts_for(at, concept, lora) for concept, lora in zip(concepts, loras, strict=True)]
    calibrate = pack_module("unguide_comfy.probe.calibrate").calibrate
    found: list[Any] = calibrate(at.model, loras, prompts, at.encode(""), torch.zeros(1, *LATENT), chosen)
    return found


def calibrated(at: Studio, concepts: Sequence[str], loras: Sequence[Any]) -> list[Any]:
    """Return the erasure LoRAs with calibrations for the studio's model."""
    found = calibrations(at, concepts, loras, settings())
    return list(map(pack_module("unguide_comfy.probe.calibrate").with_calibration, loras, found))


@torch.inference_mode()
def run(options: Namespace) -> None:
    """Calibrate the erasure LoRAs of the sets for the concepts, and rewrite the repository's files."""
    at, calibrate = studio(), pack_module("unguide_comfy.probe.calibrate")
    keys, formats = pack_module("unguide_comfy.model.key"), pack_module("unguide_core.formats")
    kept = pack_module("unguide_core.probe.calibration").Calibration
    wide_key = keys.model_key(at.checkpoint)
    files = {path_of(LORAS, name, concept): concept for name in options.set for concept in options.concept}
    load = pack_module("unguide_comfy.lora.load").load_erasure_lora
    loras = [load(path.name, 1.0, at.clip, path=path) for path in files]
    concepts, chosen = list(files.values()), settings(options.repeats, options.seed)
    measured, started = [narrow_lora(lora, at.model) for lora in loras], time.perf_counter()
    if options.text:
        asked = [prompts_for(at, *pair) for pair in zip(concepts, loras, strict=True)]
        done = [calibrate.with_text_calibration(at.checkpoint, *pair) for pair in zip(loras, asked, strict=True)]
    elif options.images:
        asked = [prompts_for(at, *pair) for pair in zip(concepts, measured, strict=True)]
        probes = calibrate.image_probes(at.model, measured, asked, at.encode(""), torch.zeros(1, *LATENT), chosen)
        known = [
            kept.from_card(lora.adapter.card.calibration) or kept(wide_key, lora.adapter.signature) for lora in loras
        ]
        done = [
            calibrate.with_calibration(lora, replace(one, image=probe and wide_probe(probe)))
            for lora, one, probe in zip(loras, known, probes, strict=True)
        ]
    else:
        done = [
            calibrate.with_calibration(
                lora,
                replace(one, model=wide_key, adapter=lora.adapter.signature, image=one.image and wide_probe(one.image)),
            )
            for lora, one in zip(loras, calibrations(at, concepts, measured, chosen), strict=True)
        ]
    for path, lora in zip(files, done, strict=True):
        formats.save_adapter(lora.adapter, path)
        print(f"{path.parent.name}/{path.stem}: {described(kept.from_card(lora.adapter.card.calibration))}")
    print(f"{len(done)} erasure LoRAs calibrated in {time.perf_counter() - started:.0f} s")


def described(calibration: Any) -> str:
    """Return thresholds by falling noise level with the share of the concept's prompts below, and the other stages'."""
    parts = []
    for name, levels in calibration.levels.items():
        scores = [level.threshold(0.01) for level in levels]
        missed = [level.concept.share_below(score) for level, score in zip(levels, scores, strict=True)]
        parts.append(f"{name} " + " ".join(f"{at:.2f} ({share:.0%})" for at, share in zip(scores, missed, strict=True)))
    thresholds = calibration.text and calibration.text.text.thresholds(0.01)
    parts.append("text {:.2f} to {:.2f}".format(*thresholds) if thresholds else "text does not separate")
    probe = calibration.image
    parts.append(
        f"images: {probe.missed:.1%} of {probe.images[0]} missed, {probe.mistaken:.1%} of {probe.images[1]} mistaken"
        if probe
        else "images do not separate"
    )
    return "; ".join(parts)
