"""Calibrate Erasure LoRA."""

import json
from typing import Any

import comfy.sample
from comfy_api.latest import io

from ..unguide_comfy.calibration import CalibrationSettings, Prompts, calibrated, concept_prompts
from ..unguide_comfy.erasure import ErasureLora
from ..unguide_core.prompts import OTHER_PROMPTS, names_a_word
from .wires import ErasureLoraWire, erasure_lora_input, schema


class CalibrateErasureLora(io.ComfyNode):
    """Measures what the gate's threshold should be for this model, and puts it into the erasure LoRA's card."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnGuideCalibrate",
            display_name="Calibrate Erasure LoRA",
            description="Measures how an erasure LoRA acts on prompts with its concept and on others, so that the gate "
            "has a threshold with a known rate of false alarms, and needs no baseline while sampling. Done once for a "
            "model; save the result with Save Erasure LoRA.",
            search_aliases=["unguide calibrate", "threshold", "false alarm rate"],
            inputs=[
                io.Model.Input("model", tooltip="The base model, with the patches that it will be sampled with."),
                io.Clip.Input("clip", tooltip="Encodes the prompts to calibrate with."),
                erasure_lora_input(),
                io.Latent.Input("latent_image", tooltip="A latent of the pictures' size; its content is not used."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance, as in the sampler.",
                ),
                io.String.Input(
                    "concept_prompts",
                    default="",
                    multiline=True,
                    tooltip="Prompts with the concept, one per line. Empty: the card's synonyms, and the concept's own "
                    "prompt in three scenes.",
                ),
                io.String.Input(
                    "other_prompts",
                    default="\n".join(OTHER_PROMPTS[1:]),
                    multiline=True,
                    tooltip="Prompts without the concept, one per line, the more like your own the better. The empty "
                    "prompt is always among them; those that name the concept are left out. The false alarm rate is "
                    "measured on these.",
                ),
                io.Int.Input(
                    "repeats", default=4, min=1, max=64, tooltip="Noise seeds for each prompt. More is steadier."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of the noise.",
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
        concept_prompts: str,
        other_prompts: str,
        repeats: int,
        seed: int,
    ) -> io.NodeOutput:
        def encode(prompt: str) -> Any:
            return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))

        others = {line: encode(line) for line in ("", *_lines(other_prompts))}
        prompts = [
            Prompts(
                [encode(line) for line in _lines(concept_prompts) or _own(lora)],
                [encoded for line, encoded in others.items() if not names_a_word(line, _words(lora))],
            )
            for lora in erasure_lora
        ]
        latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        settings = CalibrationSettings(repeats=repeats, seed=seed)
        found = calibrated(model, erasure_lora, prompts, others[""], cfg, latent, settings)
        report = {lora.name: dict(lora.adapter.card.calibration) for lora in found}
        return io.NodeOutput(tuple(found), json.dumps(report, indent=1))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _words(lora: ErasureLora) -> list[str]:
    return [word for word in (lora.adapter.card.concept, *lora.adapter.card.synonyms) if word]


def _own(lora: ErasureLora) -> list[str]:
    card = lora.adapter.card
    return concept_prompts(card.concept, lora.concept_prompt, card.synonyms)


NODES = [CalibrateErasureLora]
