"""UnGuide: a model for any sampler node."""

from typing import Any

from comfy_api.latest import io

from ..unguide_comfy.erasure import ErasureLora
from ..unguide_comfy.gating import guided
from ..unguide_core.probe import Decision
from .wires import (
    DecisionWire,
    erasure_lora_input,
    gate_from,
    gate_inputs,
    gate_mode_input,
    neutral_input,
    probe_inputs,
    schema,
    weight_inputs,
)


class UnGuideModel(io.ComfyNode):
    """Puts erasure LoRAs on a model, each behind a gate."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnGuideModel",
            display_name="UnGuide",
            description="Makes any sampler node erase the concept where a prompt carries it, and leave every other "
            "picture as the base model draws it, bit for bit. Connect the model to KSampler, SamplerCustom, ...",
            search_aliases=["unguide", "concept erasure", "guidance", "unlearning"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The base model, without the erasure LoRA. Other LoRAs and patches may be on it."
                ),
                erasure_lora_input(),
                gate_mode_input(),
                *weight_inputs(),
                neutral_input(),
                DecisionWire.Input(
                    "decision",
                    optional=True,
                    tooltip="A decision from Stability Probe for this model and erasure LoRA, used instead of a probe.",
                ),
                *probe_inputs(),
                *gate_inputs(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, for any sampler node.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        erasure_lora: tuple[ErasureLora, ...],
        gate_mode: str,
        weight_detected: float,
        weight_otherwise: float,
        neutral: Any = None,
        decision: tuple[Decision, ...] | None = None,
        **options: Any,
    ) -> io.NodeOutput:
        gate = gate_from(options, neutral, weight_detected, weight_otherwise, gate_mode)
        return io.NodeOutput(guided(model, erasure_lora, gate, decision))


NODES = [UnGuideModel]
