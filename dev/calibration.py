"""Calibrates the demo's erasure LoRAs with the pack in a real ComfyUI, and writes the result into their metadata.

Run by `python3 dev calibrate`. Measured at the demo UNet's narrow width, which computes what the checkpoint computes
(`dev.narrow_host`), and written for the checkpoint.

Objects are calibrated in other scenes than those in which `python3 dev gate` measures. With --text only the text stage
is calibrated, which takes no model evaluation; with --images only the image stage. The rest of the cards is kept.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from typing import Any

from dev.narrow_host import load_narrow_model, narrow_lora, wide_probe
from dev.pack import pack_module, start_host
from dev.workspace import PACK

CHECKPOINT = "unguide-demo.safetensors"
SETS = ("paper", "selective")
LATENT, CFG = (1, 4, 8, 8), 4.0
OWN_REPEATS = 8


def calibrate(
    names: list[str], concepts: list[str], repeats: int, seed: int, text_alone: bool, images_alone: bool
) -> None:
    """Calibrate the erasure LoRAs of the sets for the concepts, and rewrite the repository's files."""
    import torch

    import nodes
    from demo.captions import CLASSES, PLACES, SCENES, article, words_for

    calibration, formats = pack_module("unguide_comfy.probe.calibrate"), pack_module("unguide_core.formats")
    erasure_lora = pack_module("unguide_comfy.lora.load").ErasureLora
    loader = nodes.CheckpointLoaderSimple()  # type: ignore[attr-defined]  # ComfyUI's nodes, not ours
    model, clip, _ = loader.load_checkpoint(CHECKPOINT)
    model_key, narrow = pack_module("unguide_comfy.model.key").model_key(model), load_narrow_model()
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
            adapter = formats.load_adapter(path)
            own = adapter.card.concept_prompt
            lora = erasure_lora(path.name, adapter, 1.0, own, encode(own), encode(""))
            loras.append(lora)
            others = [*plain, *(prompt for other in CLASSES if other != concept for prompt in of(other))]
            within = [encode(prompt) for prompt in of(concept) if prompt != own]
            unrelated = [encode(prompt) for prompt in others]
            prompts.append(calibration.CalibrationPrompts(lora.concept, within, unrelated, lora.name))
            paths.append(path)
    if images_alone:
        _write_images(model_key, narrow, list(zip(paths, loras, prompts, strict=True)), seed)
        return
    if text_alone:
        for path, lora, asked in zip(paths, loras, prompts, strict=True):
            done = calibration.with_text_calibration(model, lora, asked)
            formats.save_adapter(done.adapter, path)
            sys.stdout.write(f"{path.parent.name}/{path.stem}: {_text_described(done.adapter.card.calibration)}\n")
        return
    started = time.perf_counter()
    settings = calibration.CalibrationSettings(CFG, repeats=repeats, own_repeats=OWN_REPEATS, seed=seed)
    measured = [narrow_lora(lora, narrow) for lora in loras]
    results = calibration.calibrate(narrow, measured, prompts, encode(""), torch.zeros(LATENT), settings)
    for path, lora, result in zip(paths, loras, results, strict=True):
        image = result.image and wide_probe(result.image)
        of_checkpoint = replace(result, model=model_key, adapter=lora.adapter.signature, image=image)
        formats.save_adapter(calibration.with_calibration(lora, of_checkpoint).adapter, path)
        found = (_described(result), _text_described(result.to_card()), _image_described(image))
        sys.stdout.write(f"{path.parent.name}/{path.stem}: {'; '.join(found)}\n")
    sys.stdout.write(f"{len(results)} erasure LoRAs calibrated in {time.perf_counter() - started:.0f} s\n")


def _described(calibration: Any) -> str:
    parts = []
    for name, levels in calibration.levels.items():
        scores = [level.threshold(0.01) for level in levels]
        missed = [level.concept.share_below(score) for level, score in zip(levels, scores, strict=True)]
        parts.append(f"{name} " + " ".join(f"{at:.2f} ({share:.0%})" for at, share in zip(scores, missed, strict=True)))
    return ", ".join(parts) + " (thresholds by falling noise level, and the share of the concept's prompts below)"


def _write_images(model_key: str, narrow: Any, asked: list[tuple[Any, Any, Any]], seed: int) -> None:
    """Fit the image probes anew, and keep all else in the cards."""
    import torch

    calibration, formats = pack_module("unguide_comfy.probe.calibrate"), pack_module("unguide_core.formats")
    kept = pack_module("unguide_core.probe.calibration").Calibration
    paths, loras, prompts = zip(*asked, strict=True)
    settings = calibration.CalibrationSettings(CFG, seed=seed)
    measured = [narrow_lora(lora, narrow) for lora in loras]
    probes = calibration.image_probes(narrow, measured, prompts, loras[0].neutral, torch.zeros(LATENT), settings)
    for path, lora, probe in zip(paths, loras, probes, strict=True):
        known = kept.from_card(lora.adapter.card.calibration) or kept(model_key, lora.adapter.signature)
        image = probe and wide_probe(probe)
        done = calibration.with_calibration(lora, replace(known, image=image))
        formats.save_adapter(done.adapter, path)
        sys.stdout.write(f"{path.parent.name}/{path.stem}: {_image_described(image)}\n")


def _image_described(probe: Any) -> str:
    if probe is None:
        return "images do not separate"
    return f"images: {probe.missed:.1%} of {probe.images[0]} missed, {probe.mistaken:.1%} of {probe.images[1]} mistaken"


def _text_described(card: Any) -> str:
    text = pack_module("unguide_core.probe.calibration").Calibration.from_card(card).text
    thresholds = text.text.thresholds(0.01)
    return "text does not separate" if thresholds is None else "text {:.2f} to {:.2f}".format(*thresholds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 dev calibrate")
    parser.add_argument("--set", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--concept", nargs="+", help="default: all ten")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", action="store_true", help="calibrate the text stage alone, in seconds")
    parser.add_argument("--images", action="store_true", help="fit the image stage's probes alone")
    arguments = parser.parse_args()
    start_host()
    import torch

    from demo.captions import CLASSES

    if unknown := set(arguments.concept or ()) - set(CLASSES):
        parser.error(f"no such concept: {', '.join(sorted(unknown))}; choose from {', '.join(CLASSES)}")
    with torch.inference_mode():
        calibrate(
            arguments.set,
            arguments.concept or list(CLASSES),
            arguments.repeats,
            arguments.seed,
            arguments.text,
            arguments.images,
        )


if __name__ == "__main__":
    main()
