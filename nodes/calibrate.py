"""Calibrate Erasure LoRA."""

import json
from functools import partial
from typing import Any

import comfy.sample
from comfy_api.latest import io

from ..unguide_comfy.lora.load import ErasureLora
from ..unguide_comfy.probe.calibrate import CalibrationSettings, calibrate_from_texts
from ..unguide_comfy.report.progress import Counter
from ..unguide_core.training.prompts import OTHER_PROMPTS
from .wires import ErasureLoraWire, advanced, erasure_lora_input, schema


class CalibrateErasureLora(io.ComfyNode):
    """Measures what the gate's threshold should be for this model, and puts it into the erasure LoRA's metadata."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnGuideCalibrate",
            display_name="Calibrate Erasure LoRA",
            description="Measures how an erasure LoRA acts on prompts with its concept and on others, so that the gate "
            "has a threshold with a known false-positive rate and needs no baseline while sampling. At the end it "
            "generates about 64 images, from which the gate learns what the concept looks like. Do it "
            "once for a model, and save the result with Save Erasure LoRA.",
            search_aliases=["unguide calibrate", "threshold", "false positive rate"],
            inputs=[
                io.Model.Input("model", tooltip="The base model, with the patches with which it will be sampled."),
                io.Clip.Input("clip", tooltip="Encodes the prompts to calibrate with."),
                erasure_lora_input(),
                io.Latent.Input("latent_image", tooltip="A latent of the images' size; its content is not used."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance scale, as in the sampler.",
                ),
                advanced(
                    io.String,
                    "concept_prompts",
                    default="",
                    multiline=True,
                    tooltip="Prompts with the concept, one per line. Empty: the synonyms in the LoRA's metadata, and "
                    "the concept's own prompt in three scenes.",
                ),
                advanced(
                    io.String,
                    "other_prompts",
                    default="\n".join(OTHER_PROMPTS[1:]),
                    multiline=True,
                    tooltip="Prompts without the concept, one per line; the more they resemble your own, the better. "
                    "The false-positive rate is measured on these. The empty prompt is always among them; prompts that "
                    "name the concept are left out.",
                ),
                advanced(
                    io.Int,
                    "repeats",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Noise seeds for each prompt. More is steadier and slower.",
                ),
                advanced(
                    io.Int,
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Seed of the noise.",
                ),
            ],
            outputs=[
                ErasureLoraWire.Output(display_name="erasure_lora", tooltip="The erasure LoRA, calibrated."),
                io.String.Output(display_name="calibration", tooltip="What was measured, as JSON."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        erasure_lora: tuple[ErasureLora, ...],
        latent_image: dict[str, Any],
        cfg: float,
        concept_prompts: str = "",
        other_prompts: str = "\n".join(OTHER_PROMPTS[1:]),
        repeats: int = 4,
        seed: int = 0,
    ) -> io.NodeOutput:
        latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        settings = CalibrationSettings(cfg, repeats=repeats, seed=seed)
        texts = [_lines(text) for text in (concept_prompts, other_prompts)]
        calibrated = calibrate_from_texts(
            model, clip, erasure_lora, *texts, latent, settings, partial(Counter, "Calibrating")
        )
        report = {lora.name: dict(lora.adapter.card.calibration) for lora in calibrated}
        return io.NodeOutput(tuple(calibrated), json.dumps(report, indent=1))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


NODES = [CalibrateErasureLora]
