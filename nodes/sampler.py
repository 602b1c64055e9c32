"""UnGuide Sampler: KSampler with erasure LoRAs."""

from typing import Any

import comfy.samplers
from comfy_api.latest import io

import nodes as host_nodes

from ..unguide_comfy.erasure import ErasureLora
from ..unguide_comfy.gating import guided
from ..unguide_comfy.outcomes import RunReport
from ..unguide_comfy.plotting import report_plot
from ..unguide_comfy.reporting import report_json
from .wires import (
    erasure_lora_input,
    gate_from,
    gate_inputs,
    gate_mode_input,
    neutral_input,
    probe_inputs,
    schema,
    weight_inputs,
)


class UnGuideSampler(io.ComfyNode):
    """The host's KSampler on a guided model, with the report of the run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnGuideSampler",
            display_name="UnGuide Sampler",
            description="KSampler that erases a concept where the prompt carries it and draws every other picture "
            "exactly as KSampler does. Says what it found, and what it cost.",
            search_aliases=["unguide sampler", "ksampler erase", "concept erasure"],
            inputs=[
                io.Model.Input("model", tooltip="The base model, without the erasure LoRA."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the picture's noise, as in KSampler.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Denoising steps, as in KSampler."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance scale, as in KSampler.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    tooltip="The sampling algorithm, as in KSampler; any of them works.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    tooltip="How the noise level falls over the steps, as in KSampler.",
                ),
                io.Conditioning.Input("positive", tooltip="What to draw."),
                io.Conditioning.Input("negative", tooltip="What not to draw."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise, as in KSampler."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the latent is redrawn, as in KSampler; below 1 for image to image.",
                ),
                erasure_lora_input(),
                neutral_input(),
                gate_mode_input(),
                *weight_inputs(),
                *probe_inputs(),
                *gate_inputs(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The denoised latent."),
                io.Image.Output(display_name="plot", tooltip="What the gate measured against its threshold."),
                io.String.Output(display_name="report", tooltip="What was decided and what it cost, as JSON."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        denoise: float,
        erasure_lora: tuple[ErasureLora, ...],
        gate_mode: str,
        weight_detected: float,
        weight_otherwise: float,
        neutral: Any = None,
        **options: Any,
    ) -> io.NodeOutput:
        gate = gate_from(options, neutral, weight_detected, weight_otherwise, gate_mode)
        reports: list[RunReport] = []
        patched = guided(model, erasure_lora, gate, observer=reports.append)
        (latent,) = host_nodes.common_ksampler(  # type: ignore[attr-defined]
            patched, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise
        )
        report = reports[-1] if reports else RunReport((), {}, 0.0, 0.0)
        return io.NodeOutput(latent, report_plot(report), report_json(report))


NODES = [UnGuideSampler]
