"""Stability Probe."""

from dataclasses import replace
from typing import Any

import comfy.sample
import comfy.samplers
from comfy_api.latest import io

from ..unguide_comfy.gate.before import probe_prompt
from ..unguide_comfy.lora.load import ErasureLora
from ..unguide_comfy.probe.settings import Settings
from ..unguide_comfy.report.plot import report_plot
from ..unguide_comfy.report.progress import show
from ..unguide_comfy.report.records import leading
from ..unguide_comfy.report.text import report_json, report_text, verdict_line
from .wires import DecisionWire, erasure_lora_input, schema, settings_input, shown


class StabilityProbe(io.ComfyNode):
    """Decides, before any sampling, whether a prompt asks for an erased concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnGuideProbe",
            display_name="Stability Probe",
            description="Decides whether a prompt asks for the erased concept: by its text where the LoRA is "
            "calibrated, else by denoising it for a few steps with the base model. Gives the decision to UnGuide, "
            "and as plain values to any other node; shows all statistics.",
            search_aliases=["concept detector", "safety check", "nsfw check", "censor check"],
            inputs=[
                io.Model.Input("model", tooltip="The base model, without the erasure LoRA."),
                erasure_lora_input(),
                io.Conditioning.Input("positive", tooltip="The prompt to probe."),
                io.Conditioning.Input(
                    "negative", tooltip="The negative prompt with which the image will be generated."
                ),
                io.Latent.Input("latent_image", tooltip="A latent of the image's size; its content is not used."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance scale of the probe's steps: the same as in the sampler.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Seed of the probe's own noise. It need not be the image's seed.",
                ),
                settings_input(),
            ],
            outputs=[
                DecisionWire.Output(display_name="decision", tooltip="The decision, for the UnGuide node."),
                io.Float.Output(display_name="weight", tooltip="The base model's weight that follows."),
                io.Float.Output(display_name="score", tooltip="The deciding statistic; of a stack, the highest one."),
                io.Boolean.Output(display_name="detected", tooltip="Whether the prompt asks for an erased concept."),
                io.Image.Output(display_name="plot", tooltip="All statistics, against their thresholds."),
                io.String.Output(display_name="report", tooltip="What the probe measured, to read."),
                io.String.Output(display_name="json", tooltip="Everything that the probe measured, as JSON."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        erasure_lora: tuple[ErasureLora, ...],
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        cfg: float,
        seed: int,
        settings: Settings | None = None,
    ) -> io.NodeOutput:
        def guider(patched: Any) -> comfy.samplers.CFGGuider:
            made = comfy.samplers.CFGGuider(patched)
            made.set_conds(positive, negative)
            made.set_cfg(cfg)
            return made

        chosen = replace(settings or Settings(), seed=seed)
        latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        decisions, verdicts, cost = probe_prompt(model, erasure_lora, chosen, guider, latent)
        show(verdicts, sampling=False)
        plot = report_plot(verdicts)
        first = leading(decisions)
        return io.NodeOutput(
            tuple(decisions),
            first.weight,
            first.score,
            first.detected,
            plot,
            report_text(verdicts, cost),
            report_json(verdicts, cost),
            ui=shown(cls, plot, verdict_line(verdicts, sampling=False)),
        )


NODES = [StabilityProbe]
