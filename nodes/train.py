"""Train Erasure LoRA."""

from dataclasses import replace
from typing import Any

import comfy.sample
import torch
from comfy_api.latest import io

from ..unguide_comfy.announcing import Announcer, say
from ..unguide_comfy.erasure import encode_prompts
from ..unguide_comfy.training import (
    DISCARD,
    ON_CANCEL,
    Job,
    calibrated,
    train_erasure_lora,
    usable,
)
from ..unguide_core.adapter import Card
from ..unguide_core.layers import CUSTOM, LAYERS
from ..unguide_core.prompts import KEPT, PREFIX, SCENES, calibration_prompts, lines, listed, prompts_for
from ..unguide_core.training import PRESETS, Pair, Prompts
from .wires import ErasureLoraWire, advanced, schema

LossMap = io.Custom("LOSS_MAP")
TARGET, REFERENCE, NEUTRAL = "target", "reference", "neutral"


class TrainErasureLora(io.ComfyNode):
    """Trains an erasure adapter on the model as it is loaded; the model itself is not touched."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnGuideTrainErasureLora",
            display_name="Train Erasure LoRA",
            description="Trains a LoRA that makes the model forget one concept. It needs no pictures: only the "
            "concept's name and what shall be drawn in its place. The result can be used at once, in the same graph.",
            search_aliases=["train lora", "unlearning", "concept erasure", "ESD", "LECO"],
            inputs=[
                io.Model.Input("model", tooltip="The model to train on, as it is: precision and other LoRAs included."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="A latent of the size to train at, such as Empty Latent Image gives; its content is not "
                    "used. Smaller than the pictures is faster and mostly enough.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The checkpoint's CLIP, which encodes the prompts made of the words below. Without it, "
                    "connect target, reference and neutral.",
                ),
                io.String.Input(
                    "concept", default="", tooltip="What shall be forgotten, a word or two, such as 'cat'."
                ),
                io.String.Input(
                    "reference",
                    default="",
                    tooltip="What shall be drawn in its place, such as 'forest': something that the model knows and "
                    "that is not too near.",
                ),
                io.String.Input(
                    "synonyms",
                    default="",
                    tooltip="Other words for the concept, with commas: 'kitty, feline'. They are erased along with it; "
                    "words that are not listed may survive.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS)[::-1],
                    default="selective",
                    tooltip="selective: trains synonyms too, holds other prompts to the base model, with less than "
                    "a third of the paper's evaluations. paper: the official recipe (arXiv 2508.05755).",
                ),
                io.Combo.Input(
                    "layers",
                    options=[*LAYERS, CUSTOM],
                    default="object",
                    tooltip="Which layers are trained. object: keys and values of cross-attention. explicit content: "
                    "everything but cross-attention. style: all of cross-attention. custom: layer_pattern.",
                ),
                io.Int.Input(
                    "iterations",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip="Steps of the optimiser, at most. 0: the preset's (paper 200, selective 100).",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.000001,
                    round=False,
                    tooltip="Adam's learning rate. 0: the preset's. Small models want more than the paper's 3e-5.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of everything random. The same seed, settings and model give the same LoRA.",
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
                    tooltip="Learning rate of the factor that reads the prompt. Ten times the other one lets it turn "
                    "to the concept's words and away from others. 0: the preset's ratio.",
                ),
                advanced(
                    io.Int,
                    "rank",
                    default=1,
                    min=1,
                    max=128,
                    optional=True,
                    tooltip="Of every layer. 1 is enough.",
                ),
                advanced(
                    io.Float,
                    "alpha",
                    default=8.0,
                    min=0.01,
                    max=1024.0,
                    step=0.5,
                    optional=True,
                    tooltip="The LoRA's scale is alpha / rank. The official recipe has 8.",
                ),
                advanced(
                    io.Float,
                    "erasure_strength",
                    default=2.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    optional=True,
                    tooltip="How far beyond the reference, away from the concept (eta). 0 is the reference itself; the "
                    "paper has 2.",
                ),
                advanced(
                    io.Float,
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="Guidance while the latents to train at are sampled. 0: the preset's (paper 9, selective "
                    "4).",
                ),
                advanced(
                    io.Int,
                    "sampling_steps",
                    default=0,
                    min=0,
                    max=500,
                    optional=True,
                    tooltip="Steps of that sampling. 0: the preset's (paper 50, selective 10).",
                ),
                advanced(
                    io.String,
                    "layer_pattern",
                    default="",
                    optional=True,
                    tooltip="For the layers 'custom': a regular expression on the names of linear layers, such as "
                    "output_blocks.*attn2.to_v$",
                ),
                advanced(
                    io.String,
                    "prefix",
                    default=PREFIX,
                    optional=True,
                    tooltip="What stands before a word to make a prompt of it: 'a photo of the' cat. For a style: 'a "
                    "painting by'.",
                ),
                advanced(
                    io.String,
                    "scenes",
                    default=", ".join(SCENES),
                    optional=True,
                    tooltip="Preset selective: scenes in which the concept is erased as well ('a cat in the forest'), "
                    "with commas. Leave empty for concepts that stand in no scene, such as a style.",
                ),
                advanced(
                    io.String,
                    "keep_prompts",
                    default="\n".join(KEPT),
                    multiline=True,
                    optional=True,
                    tooltip="Preset selective: prompts that are held to the base model, one a line; an empty line is "
                    "the empty prompt. Those that name the concept are left out. Each beyond 24 costs 20 evaluations.",
                ),
                advanced(
                    io.Int,
                    "rows",
                    default=16,
                    min=1,
                    max=256,
                    optional=True,
                    tooltip="Latents computed at once, at most. Less takes less memory and more time.",
                ),
                advanced(
                    io.Int,
                    "preview_every",
                    default=0,
                    min=0,
                    max=10000,
                    optional=True,
                    tooltip="Iterations between previews of what the concept's prompt gives by now. 0: none. Each "
                    "costs 20 evaluations, and needs previews to be on in ComfyUI's settings.",
                ),
                advanced(
                    io.Combo,
                    "on_cancel",
                    options=list(ON_CANCEL),
                    default=DISCARD,
                    optional=True,
                    tooltip="When the run is cancelled while this node trains: discard ends the run; keep goes on with "
                    "the LoRA as it is by then, which ComfyUI then remembers: change the seed to train anew.",
                ),
                io.Conditioning.Input(
                    "target",
                    optional=True,
                    tooltip="An encoded prompt of the concept, in place of the words. Needs reference_prompt and "
                    "neutral.",
                ),
                io.Conditioning.Input(
                    "reference_prompt", optional=True, tooltip="An encoded prompt of what is drawn in its place."
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
        reference: str,
        synonyms: str,
        preset: str,
        layers: str,
        iterations: int,
        learning_rate: float,
        seed: int,
        clip: Any = None,
        learning_rate_down: float = 0.0,
        rank: int = 1,
        alpha: float = 8.0,
        erasure_strength: float = 2.0,
        cfg: float = 0.0,
        sampling_steps: int = 0,
        layer_pattern: str = "",
        prefix: str = PREFIX,
        scenes: str = ", ".join(SCENES),
        keep_prompts: str = "\n".join(KEPT),
        rows: int = 16,
        preview_every: int = 0,
        on_cancel: str = DISCARD,
        target: Any = None,
        reference_prompt: Any = None,
        neutral: Any = None,
    ) -> io.NodeOutput:
        recipe = PRESETS[preset].with_rates(learning_rate or None, learning_rate_down or None)
        recipe = replace(
            recipe,
            iterations=iterations or recipe.iterations,
            rank=rank,
            alpha=alpha,
            negative_guidance=erasure_strength,
            guidance_scale=cfg or recipe.guidance_scale,
            schedule_steps=sampling_steps or recipe.schedule_steps,
            seed=seed,
        )
        synonyms, concept = listed(synonyms), concept.strip()
        card = Card(concept=concept, synonyms=synonyms, objective=preset)
        given, words = (target, reference_prompt, neutral), None
        if any(part is not None for part in given):
            prompts, conditionings = given_prompts(*given)
            named = [f"{prefix} {word}".strip() if word.strip() else "" for word in (concept, reference)]
            card = replace(card, target=named[0], reference=named[1])
        else:
            words = prompts_for(
                concept, reference, synonyms, prefix=prefix, scenes=listed(scenes), kept=lines(keep_prompts)
            )
            prompts = words.looked_at(recipe)
            conditionings = encode_prompts(clip, prompts.names)
            card = replace(card, target=words.erased[0].target, reference=words.erased[0].reference)
        job = Job(recipe, prompts, conditionings, card, layers, layer_pattern, on_cancel, rows, preview_every)
        latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        say("Drawing the latents to train at")
        trained = train_erasure_lora(model, job, latent, Announcer(model, recipe.iterations))
        lora = usable(trained, concept or "trained here", conditionings, prompts)
        own, others = calibration_prompts(words, [word for word in (concept, *synonyms) if word])
        say(f"Trained in {len(trained.losses)} iterations; calibrating the gate")
        texts = [] if clip is None else [own, others]
        encoded = [list(encode_prompts(clip, part).values()) for part in texts] or [[], []]
        lora = calibrated(model, lora, *encoded, latent, on_cancel)
        return io.NodeOutput((lora,), {"loss": list(trained.losses)})


def given_prompts(target: Any, reference: Any, neutral: Any) -> tuple[Prompts, dict[str, Any]]:
    """Prompts by name for conditionings that were connected. Raises: ValueError if one is missing or two are equal."""
    parts = {TARGET: target, REFERENCE: reference, NEUTRAL: neutral}
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise ValueError(
            f"of target, reference_prompt and neutral {len(missing)} are not connected ({', '.join(missing)}); connect "
            "all three, or none and a CLIP"
        )
    if torch.equal(target[0][0], reference[0][0]):
        raise ValueError(
            "target and reference_prompt are the same prompt, so there is nothing to learn; use as reference what "
            "shall be drawn in place of the concept"
        )
    return Prompts((Pair(TARGET, REFERENCE),), (NEUTRAL,), NEUTRAL), parts


NODES = [TrainErasureLora]
