"""Save Erasure LoRA."""

from comfy_api.latest import io

from ..unguide_comfy.lora.load import ErasureLora
from ..unguide_comfy.lora.save import save_erasure_loras
from ..unguide_comfy.report.progress import say
from ..unguide_core.formats import FORMATS
from .wires import erasure_lora_input, schema


class SaveErasureLora(io.ComfyNode):
    """Writes erasure adapters with their metadata."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnGuideSaveErasureLora",
            display_name="Save Erasure LoRA",
            description="Saves an erasure LoRA with its metadata in the output folder. Load Erasure LoRA also looks "
            "into output/loras. No file is ever replaced: each gets a new number.",
            search_aliases=["export lora", "convert lora", "save lora"],
            inputs=[
                erasure_lora_input(),
                io.String.Input(
                    "filename_prefix",
                    default="loras/unguide_erasure",
                    tooltip="Folders and name of the file; a number is added. %year%, %month%, %day% are replaced. A "
                    "stack is saved as one file each.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="kohya",
                    tooltip="generic: ComfyUI's own names. kohya: for most other programs. diffusers: for pipelines. "
                    "peft: a folder for PEFT. official: the research code's lora.pth, without convolutions.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, erasure_lora: tuple[ErasureLora, ...], filename_prefix: str, format: str) -> io.NodeOutput:
        names = save_erasure_loras(erasure_lora, filename_prefix, format)
        say(f"saved: {', '.join(names)}")
        return io.NodeOutput(ui={"text": names})


NODES = [SaveErasureLora]
