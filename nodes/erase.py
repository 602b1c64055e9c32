"""Erase Concept."""

from typing import Any

from comfy_api.latest import io

from ..unguide_comfy.erase.concept import Words, erase_concepts
from ..unguide_core.closed_form import RANK_LIMIT, ClosedForm
from ..unguide_core.training.prompts import SCENES, entries, lines, listed
from ..unguide_core.vocabulary import KEPT_PROMPTS, KINDS, pairs_of, shipped_prompts
from .wires import ErasureLoraWire, advanced, schema

_DEFAULT = ClosedForm()


class EraseConcept(io.ComfyNode):
    """Makes erasure LoRAs from words alone, in closed form; the model itself is not touched."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnGuideEraseConcept",
            display_name="Erase Concept",
            description="Makes a LoRA that erases a concept, from the concept's name alone: no training, no images, no "
            "file, no model evaluation. For SD 1.x, SD 2.x and SDXL. The result can be used at once, and saved.",
            search_aliases=["forget concept", "unlearning", "concept erasure", "remove concept", "UCE", "instant"],
            inputs=[
                io.Model.Input("model", tooltip="The model to erase in, as it is: precision and other LoRAs included."),
                io.Clip.Input("clip", tooltip="The same checkpoint's CLIP. The erasure is computed from its states."),
                io.String.Input(
                    "concept",
                    default="",
                    tooltip="What to erase, a word or two, such as 'cat'. Commas separate several concepts; each "
                    "becomes an erasure LoRA with a gate of its own, on the same wire.",
                ),
                io.String.Input(
                    "generate_instead",
                    default="",
                    tooltip="What to generate in its place, such as 'forest'. Empty: the least similar scene, "
                    "another person for a person, a plain image for a style. With several concepts name one for all, "
                    "or one for each, separated by commas.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.05,
                    max=10.0,
                    step=0.05,
                    tooltip="How strongly to erase where the concept is detected. 1 leads to what is generated "
                    "instead; more goes past it. Raise it if traces stay; it changes no other image.",
                ),
                advanced(
                    io.String,
                    "synonyms",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Other words for the concept, separated by commas: 'kitty, feline'. With several concepts "
                    "a line for each. Words that are not listed may survive.",
                ),
                advanced(
                    io.Combo,
                    "kind",
                    options=list(KINDS),
                    default="object",
                    optional=True,
                    tooltip="How prompts name it. object: 'a photo of the cat'. person: a name, which another person "
                    "replaces. style: 'a painting in the style of', which a plain image replaces.",
                ),
                advanced(
                    io.String,
                    "scenes",
                    default=", ".join(SCENES),
                    optional=True,
                    tooltip="Scenes in which the concept is erased as well ('a cat in the forest'), separated by "
                    "commas. The rest of these images is kept; add the scenes that your prompts use.",
                ),
                advanced(
                    io.String,
                    "more_pairs",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Further prompts to erase with the first concept, one per line: 'prompt -> what takes its "
                    "place'. Without an arrow the empty prompt takes its place, so published lists can be pasted.",
                ),
                advanced(
                    io.String,
                    "keep_prompts",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Prompts that must stay as they are, one per line, besides the shipped ones: words close "
                    "to the concept, above all. Prompts that name the concept are left out.",
                ),
                advanced(
                    io.Int,
                    "shipped_prompts",
                    default=KEPT_PROMPTS,
                    min=0,
                    max=len(shipped_prompts()),
                    optional=True,
                    tooltip="How many of the shipped prompts to keep, the commonest first. They are encoded once for a "
                    "text encoder; more takes longer, and leaves more of the rest as it is.",
                ),
                advanced(
                    io.Int,
                    "rank",
                    default=_DEFAULT.rank,
                    min=1,
                    max=RANK_LIMIT,
                    optional=True,
                    tooltip="The LoRA's rank at most; it is lower where fewer directions explain the whole change.",
                ),
                advanced(
                    io.Float,
                    "regularization",
                    default=_DEFAULT.regularization,
                    min=1e-6,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    optional=True,
                    tooltip="Holds the change small in directions of text that the prompts do not use. The result "
                    "depends little on it.",
                ),
            ],
            outputs=[
                ErasureLoraWire.Output(
                    display_name="erasure_lora", tooltip="The erasure LoRA, for UnGuide, UnGuide Sampler, ..."
                ),
                io.String.Output(
                    display_name="report", tooltip="What was erased, how well it separates, and what it cannot do."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        concept: str,
        generate_instead: str,
        strength: float,
        synonyms: str = "",
        kind: str = "object",
        scenes: str = ", ".join(SCENES),
        more_pairs: str = "",
        keep_prompts: str = "",
        shipped_prompts: int = KEPT_PROMPTS,
        rank: int = _DEFAULT.rank,
        regularization: float = _DEFAULT.regularization,
    ) -> io.NodeOutput:
        words = Words(
            concepts=listed(concept),
            references=entries(generate_instead),
            synonyms=tuple(listed(line) for line in synonyms.splitlines()),
            kind=kind,
            scenes=listed(scenes),
            more=pairs_of(more_pairs),
            kept=tuple(line for line in lines(keep_prompts) if line),
            shipped=shipped_prompts,
        )
        loras, report = erase_concepts(
            model, clip, words, ClosedForm(rank=rank, regularization=regularization), strength
        )
        return io.NodeOutput(loras, report)


NODES = [EraseConcept]
