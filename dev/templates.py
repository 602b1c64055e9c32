"""The workflows that ship as templates, in the order of the template browser. `python3 dev templates` writes them.

Those with the demo model run in a bare ComfyUI; the others need a checkpoint, and take the first one of the user's.
"""

from __future__ import annotations

import re
from typing import Any

from dev.layout import NODE_WIDTH, NOTE, Blueprint, Column, Group, Node, Output, Template

CAT = "a photo of the cat"
SAMPLING = {"seed": 7, "steps": 20, "cfg": 4, "sampler_name": "euler", "scheduler": "normal"}
SIZE = {"width": 64, "height": 64}
NARROW, WIDE = NODE_WIDTH, 520


def readme(text: str, height: int) -> Group:
    """A note that stands free; its paragraphs are wrapped here and not in the file."""
    unwrapped = re.sub(r"(?<!\n)\n(?=[^\n\-#\d])\s*", " ", text.strip())
    return Group("", (Node("note", NOTE, height, {"text": unwrapped}, "Read me"),))


def demo_model() -> Node:
    return Node("checkpoint", "UnGuideDemoModel", 110)


def own_checkpoint() -> Node:
    return Node("checkpoint", "CheckpointLoaderSimple", 130, title="Your checkpoint", own_first=True)


def of_model(name: str) -> Output:
    """An output of the model's node: those of Load Checkpoint are spelt in capitals."""
    return Output("checkpoint", name)


def erasure_lora(concept: str = "cat") -> Node:
    given = {"lora_name": f"demo/{concept}", "strength": 1, "clip": of_model("clip")}
    return Node("lora", "UnGuideLoadErasureLora", 360, given)


def prompts(clip: Output, size: dict[str, Any], positive: str = CAT) -> tuple[Node, Node, Node]:
    """The prompt, the negative prompt and the empty latent."""
    return (
        Node("prompt", "CLIPTextEncode", 150, {"text": positive, "clip": clip}, "Prompt", "positive"),
        Node("negative", "CLIPTextEncode", 130, {"text": "", "clip": clip}, "Negative prompt", "negative"),
        Node("latent", "EmptyLatentImage", 170, {**size, "batch_size": 1}),
    )


CONDS = {
    "positive": Output("prompt", "CONDITIONING"),
    "negative": Output("negative", "CONDITIONING"),
    "latent_image": Output("latent", "LATENT"),
}


def unguide_sampler(model: Output, **more: Any) -> Node:
    given = {"model": model, **CONDS, "erasure_lora": Output("lora", "erasure_lora"), **SAMPLING, **more}
    return Node("sampler", "UnGuideSampler", 800, given)


def ksampler(name: str, title: str, model: Output, height: int = 350, **more: Any) -> Node:
    return Node(name, "KSampler", height, {"model": model, **CONDS, **SAMPLING, **more}, title)


def decoded(samples: Output, vae: Output, prefix: str, name: str = "", title: str = "Image") -> tuple[Node, Node]:
    """VAE Decode and Save Image."""
    images = {"images": Output(f"decode{name}", "IMAGE"), "filename_prefix": f"unguide/{prefix}"}
    return (
        Node(f"decode{name}", "VAEDecode", 60, {"samples": samples, "vae": vae}),
        Node(f"save{name}", "SaveImage", 310, images, title),
    )


def enlarged(title: str, height: int, image: Output, by: int = 5) -> tuple[Node, Node]:
    """The demo's small image, larger."""
    scale = {"image": image, "upscale_method": "lanczos", "scale_by": by}
    shown = {"images": Output("scale", "IMAGE")}
    return Node("scale", "ImageScaleBy", 120, scale), Node("shown", "PreviewImage", height, shown, title)


def report(source: Output, height: int) -> Node:
    return Node("report", "PreviewAny", height, {"source": source}, "Report")


def guided(name: str = "guided", **more: Output) -> Node:
    """A model with the erasure LoRA behind its gate."""
    given = {"model": of_model("model"), "erasure_lora": Output("lora", "erasure_lora"), **more}
    return Node(name, "UnGuideModel", 170, given)


def trained(model: Output, clip: Output, latent: Output, synonyms: str) -> Node:
    words = {"concept": "cat", "generate_instead": "forest", "synonyms": synonyms}
    return Node(
        "lora", "UnGuideTrainErasureLora", 1180, {"model": model, "latent_image": latent, "clip": clip, **words}
    )


# columns that several templates share


def model_and_lora(text: str, height: int) -> Column:
    """The demo model with its erasure LoRA, and the note."""
    return Column(
        NARROW + 40, (Group("1. Model and erasure LoRA", (demo_model(), erasure_lora())), readme(text, height))
    )


def prompts_for_demo() -> Column:
    return Column(NARROW + 40, (Group("2. What to generate", prompts(of_model("clip"), SIZE)),))


def image_of(samples: Output, title: str, prefix: str, *more: Node) -> Column:
    """The demo's image, saved and enlarged."""
    nodes = decoded(samples, of_model("vae"), prefix) + enlarged("Image, enlarged", 380, Output("decode", "IMAGE"))
    return Column(NARROW + 40, (Group(title, (*nodes, *more)),))


def sampled(prefix: str) -> tuple[Column, Column, Column]:
    """UnGuide Sampler, its image and its report."""
    return (
        Column(NARROW + 40, (Group("3. Sample", (unguide_sampler(of_model("model")),)),)),
        image_of(Output("sampler", "latent"), "4. Image", prefix),
        Column(WIDE, (Group("5. Report", (report(Output("sampler", "report"), 500),)),)),
    )


ERASE = Template(
    "0_erase_a_word",
    (
        Column(
            NARROW + 40,
            (
                Group(
                    "1. Model, and the word to erase",
                    (
                        demo_model(),
                        Node(
                            "lora",
                            "UnGuideEraseConcept",
                            600,
                            {"model": of_model("model"), "clip": of_model("clip"), "concept": "cat"},
                        ),
                    ),
                ),
                readme(
                    """
## Erase a word

**Erase Concept** makes an erasure LoRA from a word: no training, no file. **UnGuide Sampler** is a KSampler
that uses it only where your prompt asks for the concept.

- **If it does**, the image is generated without it.
- **If it does not**, you get exactly KSampler's image, bit for bit.

**Try it:** press *Run*. Then change *Prompt* to *a photo of the dog* and run again.

For a model of your own, put *Load Checkpoint* (SD 1.x, SD 2.x, SDXL) in place of the demo model, and type your
own *concept*.
""",
                    420,
                ),
            ),
        ),
        Column(
            NARROW + 40,
            (
                Group("2. What to generate", prompts(of_model("clip"), SIZE)),
                Group(
                    "What was erased",
                    (Node("erased", "PreviewAny", 300, {"source": Output("lora", "report")}, "What was erased"),),
                ),
            ),
        ),
        *sampled("erase_a_word"),
    ),
    app=(
        (("prompt", "text"), ("lora", "concept"), ("sampler", "seed"), ("report", "preview_text")),
        ("shown", "sampler", "report"),
    ),
)

QUICK_START = Template(
    "1_quick_start",
    (
        model_and_lora(
            """
## Erase a concept

The **erasure LoRA** makes the model forget *cats*. **UnGuide Sampler** is a KSampler that detects at an early
step whether your prompt asks for a cat.

- **If it does**, the image is generated without one.
- **If it does not**, you get exactly KSampler's image, bit for bit.

**Try it:** press *Run*. Then change *Prompt* to *a photo of the dog* and run again.

For a model of your own, put *Load Checkpoint* in place of the demo model, and choose an erasure LoRA made for
it.
""",
            420,
        ),
        prompts_for_demo(),
        *sampled("quick_start"),
    ),
    app=(
        (("prompt", "text"), ("lora", "lora_name"), ("sampler", "seed"), ("report", "preview_text")),
        ("shown", "sampler", "report"),
    ),
)

PROBE = Template(
    "2_probe_then_sample",
    (
        model_and_lora(
            """
## Probe first, then sample

**Stability Probe** decides before any sampling whether the prompt asks for the erased concept.

- *decision* goes to **UnGuide**, which uses it instead of a probe of its own.
- *weight*, *score* and *detected* are plain values for other nodes: a switch, a filter, a log.

**UnGuide** returns a model for *any* sampler node; here it is KSampler. Connect the same model and the same
erasure LoRA to both: a decision for another model or LoRA is refused.
""",
            420,
        ),
        prompts_for_demo(),
        Column(
            WIDE,
            (
                Group(
                    "3. Probe: does the prompt contain the concept?",
                    (
                        Node(
                            "probe",
                            "UnGuideProbe",
                            700,
                            {
                                "model": of_model("model"),
                                "erasure_lora": Output("lora", "erasure_lora"),
                                **CONDS,
                                "cfg": 4,
                                "seed": 0,
                            },
                        ),
                        report(Output("probe", "report"), 360),
                    ),
                ),
            ),
        ),
        Column(
            NARROW + 40,
            (
                Group(
                    "4. Sample with the decision",
                    (
                        guided(decision=Output("probe", "decision")),
                        ksampler("sampler", "", Output("guided", "model")),
                    ),
                ),
            ),
        ),
        image_of(Output("sampler", "LATENT"), "5. Image", "probe_then_sample"),
    ),
)


def _seeded(name: str, title: str, model: Output, height: int = 350) -> Node:
    return ksampler(name, title, model, height, seed=Output("seed", "INT"))


def _stitch(name: str, one: Output, other: Output) -> Node:
    given = {"image1": one, "image2": other, "direction": "right", "match_image_size": True, "spacing_width": 4}
    return Node(name, "ImageStitch", 190, {**given, "spacing_color": "white"})


COMPARISON = Template(
    "3_compare_base_lora_unguide",
    (
        model_and_lora(
            """
## Same prompt, same seed, three ways

1. **Base**: the model as it is.
2. **LoRA only**: the erasure LoRA on every prompt, as a LoRA loader applies it. It also changes images that
  have nothing to do with the concept.
3. **UnGuide**: the erasure LoRA behind a gate.

**Try it:** with *a photo of the cat*, image 3 shows no cat. With *a photo of the dog*, images 1 and 3 are
identical, bit for bit, and image 2 differs.
""",
            400,
        ),
        Column(
            NARROW,
            (
                Group(
                    "2. What to generate",
                    (
                        *prompts(of_model("clip"), SIZE),
                        Node("seed", "PrimitiveInt", 90, {"value": 7}, "One seed for all three"),
                    ),
                ),
                Group(
                    "For the LoRA alone",
                    (Node("always", "UnGuideSettings", 480, {"decide": "always erase"}, "Erase on every prompt"),),
                ),
            ),
        ),
        Column(
            NARROW,
            (
                Group(
                    "3. Base",
                    (
                        _seeded("base", "Base", of_model("model")),
                        *decoded(Output("base", "LATENT"), of_model("vae"), "compare_base", "1", "1: base"),
                    ),
                ),
            ),
        ),
        Column(
            NARROW,
            (
                Group(
                    "4. LoRA only",
                    (
                        guided("lora_only", settings=Output("always", "settings")),
                        _seeded("adapted", "LoRA only", Output("lora_only", "model")),
                        *decoded(Output("adapted", "LATENT"), of_model("vae"), "compare_lora", "2", "2: LoRA only"),
                    ),
                ),
            ),
        ),
        Column(
            NARROW,
            (
                Group(
                    "5. UnGuide",
                    (
                        unguide_sampler(of_model("model"), seed=Output("seed", "INT")),
                        *decoded(Output("sampler", "latent"), of_model("vae"), "compare_unguide", "3", "3: UnGuide"),
                    ),
                ),
            ),
        ),
        Column(
            WIDE,
            (
                Group(
                    "6. Side by side",
                    (
                        _stitch("pair", Output("decode1", "IMAGE"), Output("decode2", "IMAGE")),
                        _stitch("row", Output("pair", "IMAGE"), Output("decode3", "IMAGE")),
                        *enlarged("Base, LoRA only, UnGuide", 260, Output("row", "IMAGE"), 4),
                        report(Output("sampler", "report"), 300),
                    ),
                ),
            ),
        ),
    ),
)

CUSTOM = Template(
    "4_custom_sampling",
    (
        model_and_lora(
            """
## UnGuide with custom sampling

**UnGuide** returns an ordinary model. Here it goes to a *guider* and a *scheduler*, as in every workflow with
SamplerCustomAdvanced. Any guider, sampler and schedule will do.

The gate decides during sampling, from the guider's positive prompt. Bypass UnGuide, and you get the base
model's image.

**UnGuide Settings** is optional; these are the defaults. **Try it:** set *on_detection* to *restart*, and the
concept is erased from the first step on. Or set *decide* to *always erase*, and the LoRA acts on every
prompt.
""",
            440,
        ),
        prompts_for_demo(),
        Column(
            NARROW + 40,
            (
                Group(
                    "3. UnGuide",
                    (
                        guided(settings=Output("settings", "settings")),
                        Node("settings", "UnGuideSettings", 620),
                    ),
                ),
            ),
        ),
        Column(
            NARROW + 40,
            (
                Group(
                    "4. Custom sampling",
                    (
                        Node("noise", "RandomNoise", 130, {"noise_seed": 7}),
                        Node(
                            "guider",
                            "CFGGuider",
                            140,
                            {
                                "model": Output("guided", "model"),
                                "positive": CONDS["positive"],
                                "negative": CONDS["negative"],
                                "cfg": 4,
                            },
                        ),
                        Node("method", "KSamplerSelect", 90, {"sampler_name": "euler"}),
                        Node(
                            "schedule",
                            "BasicScheduler",
                            170,
                            {"model": Output("guided", "model"), "scheduler": "normal", "steps": 20, "denoise": 1},
                        ),
                        Node(
                            "sampler",
                            "SamplerCustomAdvanced",
                            160,
                            {
                                "noise": Output("noise", "NOISE"),
                                "guider": Output("guider", "GUIDER"),
                                "sampler": Output("method", "SAMPLER"),
                                "sigmas": Output("schedule", "SIGMAS"),
                                "latent_image": CONDS["latent_image"],
                            },
                        ),
                    ),
                ),
            ),
        ),
        image_of(Output("sampler", "output"), "5. Image", "custom_sampling"),
    ),
)

TRAIN = Template(
    "5_train_erasure_lora",
    (
        Column(
            NARROW + 40,
            (
                Group("1. Model", (demo_model(), Node("latent", "EmptyLatentImage", 170, {**SIZE, "batch_size": 1}))),
                readme(
                    """
## Train an erasure LoRA

**Train Erasure LoRA** makes the model forget a concept. It needs no images, only words: the *concept*, its
*synonyms*, and what to *generate instead*. The result goes straight into **UnGuide Sampler**.

Training on the demo model takes one to three minutes on a CPU. ComfyUI keeps the trained LoRA; change the
*seed* of Train Erasure LoRA to train again.

**Try it:** press *Run*, change *Prompt* to *a photo of the dog*, and run again. Nothing is trained a second
time, and the dog is the same with and without UnGuide.
""",
                    480,
                ),
            ),
        ),
        Column(
            NARROW + 60,
            (
                Group(
                    "2. Train",
                    (trained(of_model("model"), of_model("clip"), CONDS["latent_image"], "kitty, feline, housecat"),),
                ),
            ),
        ),
        Column(
            NARROW + 40,
            (
                Group(
                    "3. Generate",
                    (
                        *prompts(of_model("clip"), SIZE)[:2],
                        unguide_sampler(of_model("model")),
                    ),
                ),
            ),
        ),
        image_of(Output("sampler", "latent"), "4. With UnGuide", "trained", report(Output("sampler", "report"), 240)),
        Column(
            NARROW + 40,
            (
                Group(
                    "5. Without UnGuide",
                    (
                        ksampler("plain", "KSampler, for comparison", of_model("model")),
                        Node(
                            "decode2", "VAEDecode", 60, {"samples": Output("plain", "LATENT"), "vae": of_model("vae")}
                        ),
                        Node("shown2", "PreviewImage", 310, {"images": Output("decode2", "IMAGE")}, "Without UnGuide"),
                    ),
                ),
            ),
        ),
    ),
)

OWN = {"width": 512, "height": 512}
OWN_SAMPLING = {"steps": 25, "cfg": 7, "scheduler": "normal"}

TRAIN_OWN = Template(
    "6_train_on_your_checkpoint",
    (
        Column(
            NARROW + 40,
            (
                Group(
                    "1. Your model",
                    (
                        own_checkpoint(),
                        Node("size", "EmptyLatentImage", 170, {**OWN, "batch_size": 1}, "Size to train at"),
                    ),
                ),
                readme(
                    """
## Make your own checkpoint forget a word

Choose a checkpoint of **SD 1.5** or **SDXL**; nothing else is needed. Name the *concept* to forget and what
to *generate instead*, and press *Run*.

The LoRA is trained once, in minutes on a GPU, saved into *output/loras*, and used at once by **UnGuide
Sampler**. Later, choose the file in **Load Erasure LoRA** instead of training again.

For SDXL, set both sizes to 1024 x 1024. For a style, change *prefix* to *a painting by* and empty *scenes*
(advanced inputs).
""",
                    420,
                ),
            ),
        ),
        Column(
            NARROW + 60,
            (
                Group(
                    "2. Train",
                    (trained(of_model("MODEL"), of_model("CLIP"), Output("size", "LATENT"), "kitty, feline, kitten"),),
                ),
            ),
        ),
        Column(
            NARROW + 40,
            (
                Group("3. What to generate", prompts(of_model("CLIP"), OWN)),
                Group(
                    "4. Keep the LoRA",
                    (
                        Node(
                            "file",
                            "UnGuideSaveErasureLora",
                            170,
                            {"erasure_lora": Output("lora", "erasure_lora"), "filename_prefix": "loras/forget_cat"},
                        ),
                    ),
                ),
            ),
        ),
        Column(NARROW + 40, (Group("5. Sample", (unguide_sampler(of_model("MODEL"), **OWN_SAMPLING),)),)),
        Column(
            WIDE,
            (
                Group(
                    "6. Image and report",
                    (
                        *decoded(Output("sampler", "latent"), of_model("VAE"), "forget")[:1],
                        Node(
                            "save",
                            "SaveImage",
                            560,
                            {"images": Output("decode", "IMAGE"), "filename_prefix": "unguide/forget"},
                            "Image",
                        ),
                        report(Output("sampler", "report"), 360),
                    ),
                ),
            ),
        ),
    ),
)

TEMPLATES = (ERASE, QUICK_START, PROBE, COMPARISON, CUSTOM, TRAIN, TRAIN_OWN)


def _both(*names: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """Inputs of one name that lead to both samplers."""
    return {name: (("plain", name), ("sampler", name)) for name in names}


COMPARE = Blueprint(
    "Compare with and without UnGuide",
    "One prompt and one seed, sampled without and with an erasure LoRA behind its gate.",
    (
        Column(
            NARROW,
            (
                Group(
                    "",
                    (
                        Node("plain", "KSampler", 350, title="Without UnGuide"),
                        Node("sampler", "UnGuideSampler", 800, title="With UnGuide"),
                    ),
                ),
            ),
        ),
        Column(
            NARROW,
            (
                Group(
                    "",
                    (
                        Node("decode1", "VAEDecode", 60, {"samples": Output("plain", "LATENT")}),
                        Node("decode2", "VAEDecode", 60, {"samples": Output("sampler", "latent")}),
                    ),
                ),
            ),
        ),
    ),
    {
        **_both("model", "positive", "negative", "latent_image"),
        "erasure_lora": (("sampler", "erasure_lora"),),
        "vae": (("decode1", "vae"), ("decode2", "vae")),
        **_both("seed", "steps", "cfg", "sampler_name", "scheduler"),
    },
    {
        "without": Output("decode1", "IMAGE"),
        "with UnGuide": Output("decode2", "IMAGE"),
        "report": Output("sampler", "report"),
    },
)

ERASE_ONE_WORD = Blueprint(
    "Erase one word",
    "A KSampler that erases a word: the erasure LoRA is made from the word alone, for SD 1.x, SD 2.x and SDXL.",
    (
        Column(
            NARROW,
            (Group("", (Node("lora", "UnGuideEraseConcept", 600, {"concept": "cat"}),)),),
        ),
        Column(
            NARROW,
            (
                Group(
                    "",
                    (
                        Node("sampler", "UnGuideSampler", 800, {"erasure_lora": Output("lora", "erasure_lora")}),
                        Node("decode", "VAEDecode", 60, {"samples": Output("sampler", "latent")}),
                    ),
                ),
            ),
        ),
    ),
    {
        "model": (("lora", "model"), ("sampler", "model")),
        "clip": (("lora", "clip"),),
        "vae": (("decode", "vae"),),
        **{name: (("sampler", name),) for name in ("positive", "negative", "latent_image")},
        **{name: (("lora", name),) for name in ("concept", "generate_instead", "strength")},
        **{name: (("sampler", name),) for name in ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise")},
    },
    {
        "image": Output("decode", "IMAGE"),
        "erasure_lora": Output("lora", "erasure_lora"),
        "report": Output("sampler", "report"),
    },
)

BLUEPRINTS = (COMPARE, ERASE_ONE_WORD)
