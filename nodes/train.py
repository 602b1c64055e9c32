"""Train Erasure LoRA."""

from dataclasses import replace
from typing import Any

import comfy.sample
from comfy_api.latest import io, ui

from ..unguide_comfy.report.plot import as_image, loss_curve
from ..unguide_comfy.train.finish import Concept, Encoded, train_concept
from ..unguide_comfy.train.job import DISCARD, ON_CANCEL
from ..unguide_comfy.train.show import SIDE
from ..unguide_core.training.layers import CUSTOM, LAYERS
from ..unguide_core.training.prompts import KEPT, PREFIX, SCENES, lines, listed
from ..unguide_core.training.recipe import PRESETS
from .wires import ErasureLoraWire, advanced, schema

LossMap = io.Custom("LOSS_MAP")


class TrainErasureLora(io.ComfyNode):
    """Trains an erasure adapter on the model as it is loaded; the model itself is not touched."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnGuideTrainErasureLora",
            display_name="Train Erasure LoRA",
            description="Trains a LoRA that makes the model forget one concept. It needs no images: only the "
            "concept's name and what to generate instead. The result can be used at once, in the same graph.",
            search_aliases=["unlearn", "unlearning", "train lora", "forget concept", "ESD", "LECO"],
            inputs=[
                io.Model.Input("model", tooltip="The model to train on, as it is: precision and other LoRAs included."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The checkpoint's CLIP, which encodes the prompts made of the words below. Without it, "
                    "connect target, reference_prompt and neutral.",
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="A latent of the size to train at, such as Empty Latent Image gives; its content is not "
                    "used. Smaller than your images is faster, and mostly enough.",
                ),
                io.String.Input("concept", default="", tooltip="What to forget, a word or two, such as 'cat'."),
                io.String.Input(
                    "generate_instead",
                    default="",
                    tooltip="What to generate in its place (the reference), such as 'forest': something that the "
                    "model knows and that does not resemble the concept.",
                ),
                io.String.Input(
                    "synonyms",
                    default="",
                    tooltip="Other words for the concept, separated by commas: 'kitty, feline'. They are erased along "
                    "with it; words that are not listed may survive.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS)[::-1],
                    default="selective",
                    tooltip="selective: trains synonyms too and holds other prompts to the base model, with less than "
                    "a third of the paper's model evaluations. paper: the official recipe (arXiv 2508.05755).",
                ),
                io.Int.Input(
                    "iterations",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip="Steps of the optimiser, at most. 0: the preset's (paper 200, selective 100).",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Seed of everything random. The same seed, settings and model give the same LoRA.",
                ),
                advanced(
                    io.Combo,
                    "layers",
                    options=[*LAYERS, CUSTOM],
                    default="object",
                    optional=True,
                    tooltip="Which layers to train. object: keys and values of cross-attention. explicit content: "
                    "every linear layer but those of cross-attention and the time embedding. style: all of "
                    "cross-attention. custom: layer_pattern.",
                ),
                advanced(
                    io.Float,
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.000001,
                    round=False,
                    optional=True,
                    tooltip="Adam's learning rate. 0: the preset's. Small models need more than the paper's 3e-5.",
                ),
                advanced(
                    io.Float,
                    "learning_rate_down",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.000001,
                    round=False,
                    optional=True,
                    tooltip="Learning rate of the LoRA's down factor, which reads the prompt. Ten times learning_rate "
                    "lets it turn to the concept's words and away from others. 0: the preset's ratio.",
                ),
                advanced(
                    io.Int,
                    "rank",
                    default=0,
                    min=0,
                    max=128,
                    optional=True,
                    tooltip="Rank of every layer. 0: the preset's (paper 1, selective 8).",
                ),
                advanced(
                    io.Float,
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    optional=True,
                    tooltip="The LoRA's scale is alpha / rank. 0: 8 times the rank, as in the official recipe.",
                ),
                advanced(
                    io.Float,
                    "erasure_strength",
                    default=2.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    optional=True,
                    tooltip="How far to go beyond the reference, away from the concept (eta). 0 is the reference "
                    "itself; the paper uses 2.",
                ),
                advanced(
                    io.Float,
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="Guidance scale of the rollouts that give the latents to train at. 0: the preset's (paper "
                    "9, selective 4).",
                ),
                advanced(
                    io.Int,
                    "sampling_steps",
                    default=0,
                    min=0,
                    max=500,
                    optional=True,
                    tooltip="Steps of the rollouts that give the latents to train at. 0: the preset's (paper 50, "
                    "selective 10).",
                ),
                advanced(
                    io.String,
                    "layer_pattern",
                    default="",
                    optional=True,
                    tooltip="With the layers 'custom': a regular expression on the names of linear layers, such as "
                    "output_blocks.*attn2.to_v$",
                ),
                advanced(
                    io.String,
                    "prefix",
                    default=PREFIX,
                    optional=True,
                    tooltip="Text before a word that makes a prompt of it: 'a photo of the' cat. For a style: 'a "
                    "painting by'.",
                ),
                advanced(
                    io.String,
                    "scenes",
                    default=", ".join(SCENES),
                    optional=True,
                    tooltip="Preset selective: scenes in which the concept is erased as well ('a cat in the forest'), "
                    "separated by commas. Leave it empty for concepts that are in no scene, such as a style.",
                ),
                advanced(
                    io.String,
                    "keep_prompts",
                    default="\n".join(KEPT),
                    multiline=True,
                    optional=True,
                    tooltip="Preset selective: prompts that are held to the base model, one per line; an empty line is "
                    "the empty prompt. Prompts that name the concept are left out. Each beyond 24 costs 20 model "
                    "evaluations.",
                ),
                advanced(
                    io.Int,
                    "rows",
                    default=16,
                    min=1,
                    max=256,
                    optional=True,
                    tooltip="Batch size, at most. Less takes less memory and more time.",
                ),
                advanced(
                    io.Int,
                    "preview_every",
                    default=20,
                    min=0,
                    max=10000,
                    optional=True,
                    tooltip="Iterations between previews of the concept's prompt, shown on the node beside the loss. "
                    "Each costs 20 model evaluations. 0: none.",
                ),
                advanced(
                    io.Combo,
                    "on_cancel",
                    options=list(ON_CANCEL),
                    default=DISCARD,
                    optional=True,
                    tooltip="When you cancel the run while this node trains. discard: the run ends. keep: the run "
                    "continues with the LoRA as it is then. ComfyUI caches that; change the seed to train again.",
                ),
                io.Conditioning.Input(
                    "target",
                    optional=True,
                    tooltip="An encoded prompt of the concept, in place of the words. Needs reference_prompt and "
                    "neutral as well.",
                ),
                io.Conditioning.Input(
                    "reference_prompt", optional=True, tooltip="An encoded prompt of what to generate instead."
                ),
                io.Conditioning.Input("neutral", optional=True, tooltip="The encoded empty prompt."),
            ],
            outputs=[
                ErasureLoraWire.Output(
                    display_name="erasure_lora", tooltip="The trained LoRA, for UnGuide, UnGuide Sampler, ..."
                ),
                LossMap.Output(display_name="loss_map", tooltip="The loss by iteration, for Plot Loss Graph."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        latent_image: dict[str, Any],
        concept: str,
        generate_instead: str,
        synonyms: str,
        preset: str,
        iterations: int,
        seed: int,
        clip: Any = None,
        layers: str = "object",
        learning_rate: float = 0.0,
        learning_rate_down: float = 0.0,
        rank: int = 0,
        alpha: float = 0.0,
        erasure_strength: float = 2.0,
        cfg: float = 0.0,
        sampling_steps: int = 0,
        layer_pattern: str = "",
        prefix: str = PREFIX,
        scenes: str = ", ".join(SCENES),
        keep_prompts: str = "\n".join(KEPT),
        rows: int = 16,
        preview_every: int = 20,
        on_cancel: str = DISCARD,
        target: Any = None,
        reference_prompt: Any = None,
        neutral: Any = None,
    ) -> io.NodeOutput:
        recipe = PRESETS[preset].with_rates(learning_rate or None, learning_rate_down or None)
        recipe = replace(
            recipe.with_rank(rank or None, alpha or None),
            iterations=iterations or recipe.iterations,
            negative_guidance=erasure_strength,
            guidance_scale=cfg or recipe.guidance_scale,
            schedule_steps=sampling_steps or recipe.schedule_steps,
            seed=seed,
        )
        lora, losses = train_concept(
            model,
            clip,
            comfy.sample.fix_empty_latent_channels(model, latent_image["samples"]),
            Concept(concept, generate_instead, listed(synonyms), prefix, listed(scenes), lines(keep_prompts)),
            recipe,
            preset,
            Encoded(target, reference_prompt, neutral),
            layers=layers,
            pattern=layer_pattern,
            on_cancel=on_cancel,
            rows=rows,
            preview_every=preview_every,
        )
        curve = as_image(loss_curve(losses, recipe.iterations, SIDE))
        return io.NodeOutput((lora,), {"loss": list(losses)}, ui=ui.PreviewImage(curve, cls=cls))


NODES = [TrainErasureLora]
