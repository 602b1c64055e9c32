"""Load Erasure LoRA."""

from typing import Any

import folder_paths
from comfy_api.latest import io

from ..unguide_comfy.lora.load import ErasureLora, load_erasure_lora, loading_report
from ..unguide_core.formats import ENERGY
from .demo import demo_loras
from .wires import ErasureLoraWire, advanced, schema


class LoadErasureLora(io.ComfyNode):
    """Reads an erasure adapter; applies nothing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnGuideLoadErasureLora",
            display_name="Load Erasure LoRA",
            description="Loads a LoRA that was trained to erase one concept. Nothing is applied here: UnGuide decides "
            "per prompt whether it is used. Connect the checkpoint's CLIP, so that the gate can compare prompts with "
            "the concept.",
            search_aliases=["erase lora", "forget concept", "remove concept", "concept erasure", "censor lora"],
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=[*folder_paths.get_filename_list("loras"), *demo_loras()],
                    tooltip="The erasure LoRA's file, in models/loras: UnGuide .pth, LECO, SPM, sliders, PEFT, "
                    "diffusers, ComfyUI, LyCORIS; with a model connected also DoRA, OFT, GLoRA and full weights (ESD, "
                    "UCE, concept ablation). Those under demo/, at the end, are for UnGuide Demo Model.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How strongly to erase where the concept is detected. 1 is the LoRA as trained. Raise it "
                    "to 2 if traces of the concept stay; it costs nothing and changes no other image.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The checkpoint's CLIP. It encodes the concept's own prompt and the empty one, with which "
                    "the gate compares. Without it the gate has less to go by.",
                ),
                io.String.Input(
                    "concept",
                    default="",
                    optional=True,
                    tooltip="The erased concept's own prompt, such as 'a photo of the cat'. Empty: the one in the "
                    "file's metadata.",
                ),
                advanced(
                    io.Float,
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    optional=True,
                    tooltip="Overrides the file's alpha; the LoRA's scale is alpha / rank. 0: as in the file.",
                ),
                advanced(
                    io.Boolean,
                    "allow_partial",
                    default=False,
                    optional=True,
                    tooltip="Leaves out layers that the model lacks, instead of stopping. The report lists them.",
                ),
                advanced(
                    io.Float,
                    "energy",
                    default=ENERGY,
                    min=0.01,
                    max=1.0,
                    step=0.005,
                    optional=True,
                    tooltip="For files with full weights, which become a LoRA: the share of each layer's change that "
                    "it keeps. Its rank follows from it.",
                ),
                ErasureLoraWire.Input(
                    "erasure_lora",
                    display_name="stack with",
                    optional=True,
                    tooltip="Another erasure LoRA, to erase several concepts at once; each has its own decision.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The base model. DoRA, OFT, BOFT, GLoRA and files with full weights (ESD, UCE, concept "
                    "ablation) need it, because they depend on its weights. For other files it checks that the layers "
                    "fit.",
                ),
            ],
            outputs=[
                ErasureLoraWire.Output(
                    display_name="erasure_lora",
                    tooltip="The erasure LoRA, for Stability Probe, UnGuide or UnGuide Sampler.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="How the file was read, as JSON: its format, which rule gave the scale, what was left out, "
                    "and which layers the model or the file lacks.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        lora_name: str,
        strength: float,
        clip: Any = None,
        concept: str = "",
        alpha: float = 0.0,
        allow_partial: bool = False,
        energy: float = ENERGY,
        model: Any = None,
        erasure_lora: tuple[ErasureLora, ...] = (),
    ) -> io.NodeOutput:
        path = demo_loras().get(lora_name)
        loaded = load_erasure_lora(
            lora_name, strength, clip, concept, alpha or None, model, allow_partial, energy, path=path
        )
        return io.NodeOutput((*erasure_lora, loaded), loading_report(loaded, model))


NODES = [LoadErasureLora]
