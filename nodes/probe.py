"""Stability Probe."""

from typing import Any

import comfy.sample
import comfy.samplers
from comfy_api.latest import io

from ..unguide_comfy.deciding import ProbeSettings
from ..unguide_comfy.erasure import ErasureLora
from ..unguide_comfy.gating import probe_prompt
from ..unguide_comfy.outcomes import leading
from ..unguide_comfy.plotting import report_plot
from ..unguide_comfy.reporting import report_json
from .wires import DecisionWire, erasure_lora_input, neutral_input, probe_inputs, schema, weight_inputs


class StabilityProbe(io.ComfyNode):
    """Decides, before any sampling, whether a prompt carries an erased concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnGuideProbe",
            display_name="Stability Probe",
            description="Denoises a few steps of the prompt with the base model and decides whether it carries the "
            "erased concept. Gives the decision to UnGuide, and as plain numbers to anything else; shows all "
            "statistics.",
            search_aliases=["concept detector", "unguide decision", "safety check"],
            inputs=[
                io.Model.Input("model", tooltip="The base model, without the erasure LoRA."),
                erasure_lora_input(),
                io.Conditioning.Input("positive", tooltip="The prompt to look at."),
                io.Conditioning.Input("negative", tooltip="The negative prompt that the picture will be sampled with."),
                io.Latent.Input("latent_image", tooltip="A latent of the picture's size; its content is not used."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance of the probe's steps: the same as in the sampler.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Seed of the probe's own noise. The picture's seed need not be the same.",
                ),
                *weight_inputs(),
                neutral_input(),
                *probe_inputs(),
            ],
            outputs=[
                DecisionWire.Output(display_name="decision", tooltip="The decision, for the UnGuide node."),
                io.Float.Output(display_name="weight", tooltip="The weight that the decision gives the base model."),
                io.Float.Output(display_name="score", tooltip="The deciding statistic; of a stack, the highest one."),
                io.Boolean.Output(display_name="detected", tooltip="Whether the prompt carries an erased concept."),
                io.Image.Output(display_name="plot", tooltip="All statistics against their thresholds."),
                io.String.Output(display_name="report", tooltip="Everything the probe measured, as JSON."),
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
        weight_detected: float,
        weight_otherwise: float,
        neutral: Any = None,
        **probe: Any,
    ) -> io.NodeOutput:
        settings = ProbeSettings(seed=seed, weight_detected=weight_detected, weight_otherwise=weight_otherwise, **probe)

        def guider(patched: Any) -> comfy.samplers.CFGGuider:
            made = comfy.samplers.CFGGuider(patched)
            made.set_conds(positive, negative)
            made.set_cfg(cfg)
            return made

        latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        decisions, report = probe_prompt(model, erasure_lora, settings, guider, latent, neutral)
        first = leading(decisions)
        return io.NodeOutput(
            tuple(decisions), first.weight, first.score, first.detected, report_plot(report), report_json(report)
        )


NODES = [StabilityProbe]
