"""UnGuide: a model for any sampler node."""

from typing import Any

from comfy_api.latest import io

from ..unguide_comfy.gate.attach import guided
from ..unguide_comfy.lora.load import ErasureLora
from ..unguide_comfy.probe.settings import Settings
from ..unguide_core.probe import Decision
from .wires import DecisionWire, erasure_lora_input, schema, settings_input


class UnGuideModel(io.ComfyNode):
    """Puts erasure LoRAs on a model, each behind a gate."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnGuideModel",
            display_name="UnGuide",
            description="Makes any sampler node erase the concept where a prompt asks for it, and leave every other "
            "image as the base model generates it, bit for bit. Connect the model to KSampler, SamplerCustom, ...",
            search_aliases=["erase", "forget", "remove", "concept", "negative", "censor", "nsfw", "unguide"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The base model, without the erasure LoRA. Other LoRAs and patches may be on it."
                ),
                erasure_lora_input(),
                settings_input(),
                DecisionWire.Input(
                    "decision",
                    optional=True,
                    tooltip="A decision from Stability Probe for this model and erasure LoRA, used instead of a probe.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, for any sampler node.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        erasure_lora: tuple[ErasureLora, ...],
        settings: Settings | None = None,
        decision: tuple[Decision, ...] | None = None,
    ) -> io.NodeOutput:
        node = str(getattr(cls.hidden, "unique_id", None) or "")
        return io.NodeOutput(guided(model, erasure_lora, settings or Settings(), decision, node=node))


NODES = [UnGuideModel]
