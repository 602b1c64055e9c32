"""Load Erasure LoRA."""

from typing import Any

import folder_paths
from comfy_api.latest import io

from ..unguide_comfy.erasure import ErasureLora, load_erasure_lora, loading_report
from ..unguide_core.formats import ENERGY
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
            search_aliases=["unlearning", "concept erasure", "erase lora", "ESD", "LECO", "SPM"],
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="The erasure LoRA's file, in models/loras: UnGuide .pth, LECO, SPM, sliders, PEFT, "
                    "diffusers, ComfyUI; with a model connected also full weights (ESD, UCE, concept ablation).",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How strongly the LoRA acts where it is used. 1 is what it was trained for.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The checkpoint's CLIP. Encodes the concept's own prompt and the empty one, which the gate "
                    "compares with. Without it the gate has less to go by.",
                ),
                io.String.Input(
                    "concept",
                    default="",
                    optional=True,
                    tooltip="The erased concept's own prompt, such as 'a photo of the cat'. Empty: the one that the "
                    "file names.",
                ),
                advanced(
                    io.Float,
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    optional=True,
                    tooltip="Overrides the file's alpha; the LoRA's scale is alpha / rank. 0: what the file says.",
                ),
                advanced(
                    io.Boolean,
                    "allow_partial",
                    default=False,
                    optional=True,
                    tooltip="Goes on without layers that the model lacks, instead of stopping. The report lists them.",
                ),
                advanced(
                    io.Float,
                    "energy",
                    default=ENERGY,
                    min=0.01,
                    max=1.0,
                    step=0.005,
                    optional=True,
                    tooltip="Of files with full weights: the share of each layer's change that the LoRA made of them "
                    "keeps. Its rank follows from it.",
                ),
                ErasureLoraWire.Input(
                    "erasure_lora",
                    optional=True,
                    tooltip="Another erasure LoRA, to erase several concepts at once; each has its own decision.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The base model. Needed for files with full weights (ESD, UCE, concept ablation), which "
                    "are compared with it. With others it is checked that the layers fit.",
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
        loaded = load_erasure_lora(lora_name, strength, clip, concept, alpha or None, model, allow_partial, energy)
        return io.NodeOutput((*erasure_lora, loaded), loading_report(loaded, model))


NODES = [LoadErasureLora]
