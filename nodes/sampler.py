"""UnGuide Sampler: KSampler with erasure LoRAs."""

from collections.abc import Sequence
from typing import Any

import comfy.samplers
from comfy_api.latest import io

import nodes as host_nodes

from ..unguide_comfy.gate.attach import guided
from ..unguide_comfy.lora.load import ErasureLora
from ..unguide_comfy.probe.settings import Settings
from ..unguide_comfy.report.plot import report_plot
from ..unguide_comfy.report.records import Cost, Verdict
from ..unguide_comfy.report.text import report_json, report_text, verdict_line
from .wires import erasure_lora_input, schema, settings_input, shown


class UnGuideSampler(io.ComfyNode):
    """The host's KSampler on a guided model, with the report of the run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnGuideSampler",
            display_name="UnGuide Sampler",
            description="KSampler that erases a concept where the prompt asks for it and generates every other image "
            "exactly as KSampler does. Reports what it detected, and what that cost.",
            search_aliases=["erase", "forget", "remove", "concept", "negative", "censor", "nsfw", "concept erasure"],
            inputs=[
                io.Model.Input("model", tooltip="The base model, without the erasure LoRA."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the image's noise, as in KSampler.",
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
                io.Conditioning.Input("positive", tooltip="What to generate."),
                io.Conditioning.Input("negative", tooltip="What to avoid."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise, as in KSampler."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the latent is denoised, as in KSampler; below 1 for image to image.",
                ),
                erasure_lora_input(),
                settings_input(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The denoised latent."),
                io.Image.Output(display_name="plot", tooltip="What the gate measured, against its threshold."),
                io.String.Output(display_name="report", tooltip="What was decided and what it cost, to read."),
                io.String.Output(display_name="json", tooltip="The same as JSON, for programs."),
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
        settings: Settings | None = None,
    ) -> io.NodeOutput:
        runs: list[tuple[Sequence[Verdict], Cost]] = []
        patched = guided(model, erasure_lora, settings or Settings(), observer=lambda *run: runs.append(run))
        (latent,) = host_nodes.common_ksampler(  # type: ignore[attr-defined]
            patched, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise
        )
        verdicts, cost = runs[-1] if runs else ((), Cost({}, 0.0, 0.0))  # at denoise 0 nothing is sampled
        plot = report_plot(verdicts)
        report = report_text(verdicts, cost), report_json(verdicts, cost)
        return io.NodeOutput(latent, plot, *report, ui=shown(cls, plot, verdict_line(verdicts, finished=True)))


NODES = [UnGuideSampler]
