"""What layers are called, here and elsewhere, and how one naming becomes another. Knows names only, no tensors.

diffusion_model.<path>    ComfyUI's own module path; of a UNet, the original one (`input_blocks.1.1...`)
unet.<path>               diffusers' path in a UNet (`down_blocks.0.attentions.0...`)
transformer.<path>        diffusers' path in a transformer (`transformer_blocks.0.attn.to_q`)
lora_unet_<stem>          kohya: either UNet path, or ComfyUI's, with underscores for dots
lora_transformer_<stem>   likewise of a transformer (OneTrainer)
lycoris_<stem>            likewise of any (SimpleTuner)
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

HOST, UNET, TRANSFORMER, KOHYA = "diffusion_model.", "unet.", "transformer.", "lora_unet_"
KOHYA_TRANSFORMER, LYCORIS = "lora_transformer_", "lycoris_"
STEMS = (KOHYA, KOHYA_TRANSFORMER, LYCORIS)
PREFIXES = (HOST, UNET, TRANSFORMER, *STEMS)

# what a path of each naming begins with
_FIRST_PARTS = {
    UNET: "down_blocks mid_block up_blocks conv_in conv_out conv_norm_out time_embedding add_embedding",
    TRANSFORMER: "transformer_blocks single_transformer_blocks context_embedder x_embedder time_text_embed norm_out "
    "proj_out pos_embed",
    HOST: "input_blocks middle_block output_blocks time_embed label_emb out joint_blocks double_blocks single_blocks "
    "img_in txt_in time_in vector_in guidance_in final_layer t_embedder y_embedder",
}
_PREFIX_OF = {part: prefix for prefix, parts in _FIRST_PARTS.items() for part in parts.split()}

# names with an underscore in them, which a kohya stem does not tell from a dot
_COMPOUNDS = (
    "down_blocks up_blocks mid_block conv_in conv_out conv_norm_out conv_shortcut time_embedding time_emb_proj "
    "add_embedding linear_1 linear_2 transformer_blocks single_transformer_blocks proj_in proj_out to_q to_k to_v "
    "to_out input_blocks middle_block output_blocks in_layers emb_layers out_layers skip_connection time_embed "
    "label_emb joint_blocks context_block x_block adaLN_modulation final_layer context_embedder x_embedder t_embedder "
    "y_embedder double_blocks single_blocks img_attn txt_attn img_mlp txt_mlp img_mod txt_mod img_in txt_in time_in "
    "vector_in guidance_in in_layer out_layer time_text_embed timestep_embedder text_embedder guidance_embedder "
    "norm_out norm1_context to_add_out add_q_proj add_k_proj add_v_proj ff_context proj_mlp pos_embed"
)
_WORD = re.compile(rf"(?:{'|'.join(sorted(_COMPOUNDS.split(), key=len, reverse=True))})(?=_|$)|[^_]+")

# within a residual block: (ComfyUI's, diffusers')
_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_TOP = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)


@dataclass(frozen=True)
class Layout:
    """Where a UNet has what: that tells which of ComfyUI's numbered blocks is which of diffusers'.

    blocks: residual blocks per level on the way down; one more on the way up.
    levels: of resolution.
    attention: the levels that have attention, counted from the finest.
    """

    blocks: int
    levels: int
    attention: tuple[int, ...]

    @cached_property
    def _pairs(self) -> dict[str, str]:
        return {**_down_pairs(self), **_up_pairs(self), **_middle_pairs(), **dict(_TOP)}

    def renamed(self, path: str, to: str) -> str | None:
        """The path in the other naming, or None where this UNet has no such layer.

        Args:
            path: without its prefix, in the naming that `to` is not.
            to: `HOST` or `UNET`.
        """
        pairs = self._pairs if to == UNET else {theirs: ours for ours, theirs in self._pairs.items()}
        parts = path.split(".")
        for length in range(len(parts), 0, -1):
            head = ".".join(parts[:length])
            if head in pairs:
                return ".".join([pairs[head], *parts[length:]])
        return None


def _down_pairs(layout: Layout) -> dict[str, str]:
    """The blocks on the way down, ComfyUI's names and diffusers'; a downsampler follows each level but the last."""
    pairs = {}
    for level in range(layout.levels):
        first = 1 + level * (layout.blocks + 1)
        for i in range(layout.blocks):
            for ours, theirs in _RESNET:
                pairs[f"input_blocks.{first + i}.0.{ours}"] = f"down_blocks.{level}.resnets.{i}.{theirs}"
            if level in layout.attention:
                pairs[f"input_blocks.{first + i}.1"] = f"down_blocks.{level}.attentions.{i}"
        if level < layout.levels - 1:
            pairs[f"input_blocks.{first + layout.blocks}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    return pairs


def _up_pairs(layout: Layout) -> dict[str, str]:
    """The blocks on the way up, from the coarsest level on; an upsampler ends each level but the last."""
    pairs = {}
    for level in range(layout.levels):
        attention = layout.levels - 1 - level in layout.attention
        for i in range(layout.blocks + 1):
            n = level * (layout.blocks + 1) + i
            for ours, theirs in _RESNET:
                pairs[f"output_blocks.{n}.0.{ours}"] = f"up_blocks.{level}.resnets.{i}.{theirs}"
            if attention:
                pairs[f"output_blocks.{n}.1"] = f"up_blocks.{level}.attentions.{i}"
            if i == layout.blocks and level < layout.levels - 1:
                pairs[f"output_blocks.{n}.{1 + attention}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return pairs


def _middle_pairs() -> dict[str, str]:
    resnets = {
        f"middle_block.{ours}.{a}": f"mid_block.resnets.{theirs}.{b}"
        for ours, theirs in ((0, 0), (2, 1))
        for a, b in _RESNET
    }
    return {**resnets, "middle_block.1": "mid_block.attentions.0"}


LAYOUTS: Mapping[str, Layout] = {
    "sd": Layout(2, 4, (0, 1, 2)),
    "sdxl": Layout(2, 3, (1, 2)),
    "koala": Layout(1, 3, (1, 2)),
    "demo": Layout(1, 2, (0, 1)),
}
"""By name: SD 1.x and 2.x; SDXL with SSD-1B and Vega; KOALA; the demo model of this repository."""


def of_path(path: str) -> str | None:
    """The prefix that a bare dotted path belongs to, by its first part; None if it is no known model's."""
    return _PREFIX_OF.get(path.split(".", 1)[0])


def dotted(name: str) -> str:
    """A layer's name with dots: a kohya stem taken apart, any other name as it is."""
    stem = next((stem for stem in STEMS if name.startswith(stem)), None)
    if stem is None:
        return name
    path = ".".join(_WORD.findall(name.removeprefix(stem)))
    known = of_path(path)
    if stem == KOHYA_TRANSFORMER:
        return TRANSFORMER + path
    return (known or HOST) + path


def underscored(name: str) -> str:
    """A layer's name as a kohya stem."""
    if name.startswith(STEMS):
        return name
    if name.startswith(TRANSFORMER):
        return KOHYA_TRANSFORMER + name.removeprefix(TRANSFORMER).replace(".", "_")
    return KOHYA + name.removeprefix(HOST).removeprefix(UNET).replace(".", "_")


def renamed(names: Iterable[str], to: str, layout: str | None = None) -> dict[str, str]:
    """The names in another naming, by the old ones.

    Args:
        names: of one adapter's layers, all of them: they tell which UNet it is for.
        to: `HOST` (ComfyUI's), `UNET` (diffusers' own, of a UNet or a transformer) or `KOHYA`.
        layout: one of `LAYOUTS`; None takes the one that the names fit.
    Raises: ValueError where a name has no counterpart, where layouts that the names fit disagree, or where two names
        are one in the other naming.
    """
    names = list(names)
    found = _renamed(names, to, layout)
    by_new: dict[str, str] = {}
    for name, new in found.items():
        if by_new.setdefault(new, name) != name:
            raise ValueError(f"'{by_new[new]}' and '{name}' are one layer, '{new}'; keep one adapter in the file")
    return found


def _renamed(names: list[str], to: str, layout: str | None) -> dict[str, str]:
    if to == KOHYA:
        try:
            return {n: n if n.startswith(STEMS) else underscored(m) for n, m in _renamed(names, UNET, layout).items()}
        except ValueError:
            return {name: underscored(name) for name in names}
    plain = {name: dotted(name) for name in names}
    other = UNET if to == HOST else HOST
    foreign = [name for name in plain.values() if name.startswith(other) and of_path(name.removeprefix(other))]
    if not foreign:
        return plain
    found = _translations(foreign, to, other, layout)
    return {name: found.get(path, path) for name, path in plain.items()}


def _translations(paths: list[str], to: str, other: str, layout: str | None) -> dict[str, str]:
    layouts = LAYOUTS if layout is None else {layout: LAYOUTS[layout]}
    fitting: dict[str, dict[str, str]] = {}
    for name, one in layouts.items():
        made = {path: one.renamed(path.removeprefix(other), to) for path in paths}
        if None not in made.values():
            fitting[name] = {path: to + str(found) for path, found in made.items()}
    if not fitting:
        raise ValueError(
            f"its {len(paths)} layers such as '{paths[0]}' have no names in the other naming "
            f"for a UNet laid out as {' or '.join(layouts)}; choose a format that keeps the names (kohya or generic)"
        )
    first = next(iter(fitting.values()))
    if any(found != first for found in fitting.values()):
        raise ValueError(
            f"its layers, such as '{paths[0]}', fit UNets laid out as {' and as '.join(fitting)}, which differ in the "
            "other naming; name the layout"
        )
    return first
