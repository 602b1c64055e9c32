"""How programs name layers, and how to rename them. Names only, no tensors.

diffusion_model.<path>    ComfyUI's own module path; of a UNet, the original one (`input_blocks.1.1...`)
unet.<path>               diffusers' path in a UNet (`down_blocks.0.attentions.0...`)
transformer.<path>        diffusers' path in a transformer (`transformer_blocks.0.attn.to_q`)
lora_unet_<stem>          kohya: either of the UNet paths with underscores for dots
lora_transformer_<stem>   the same for a transformer (OneTrainer)
lycoris_<stem>            the same for any model (SimpleTuner)
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

HOST, UNET, TRANSFORMER, KOHYA = "diffusion_model.", "unet.", "transformer.", "lora_unet_"
KOHYA_TRANSFORMER, LYCORIS = "lora_transformer_", "lycoris_"
STEMS = (KOHYA, KOHYA_TRANSFORMER, LYCORIS)
PREFIXES = (HOST, UNET, TRANSFORMER, *STEMS)

# the first parts of the paths in each naming
_FIRST_PARTS = {
    UNET: "down_blocks mid_block up_blocks conv_in conv_out conv_norm_out time_embedding add_embedding",
    TRANSFORMER: "transformer_blocks single_transformer_blocks context_embedder x_embedder time_text_embed norm_out "
    "proj_out pos_embed",
    HOST: "input_blocks middle_block output_blocks time_embed label_emb out joint_blocks double_blocks single_blocks "
    "img_in txt_in time_in vector_in guidance_in final_layer t_embedder y_embedder",
}
_PREFIX_OF = {part: prefix for prefix, parts in _FIRST_PARTS.items() for part in parts.split()}

# names with underscores, which look like dots in a kohya stem
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
    """The layout of a UNet, from which the names of its layers in ComfyUI and diffusers follow.

    blocks: residual blocks per level on the way down; there is one more on the way up.
    levels: number of resolutions.
    attention: the levels with attention, counted from the finest.
    """

    blocks: int
    levels: int
    attention: tuple[int, ...]

    @cached_property
    def _pairs(self) -> dict[str, str]:
        return {**_down_pairs(self), **_up_pairs(self), **_middle_pairs(), **dict(_TOP)}

    def renamed(self, path: str, to: str) -> str | None:
        """Return the path in the other naming, or None if the UNet has no such layer.

        Args:
            path: without its prefix.
            to: the other naming, `HOST` or `UNET`.
        """
        pairs = self._pairs if to == UNET else {theirs: ours for ours, theirs in self._pairs.items()}
        parts = path.split(".")
        for length in range(len(parts), 0, -1):
            head = ".".join(parts[:length])
            if head in pairs:
                return ".".join([pairs[head], *parts[length:]])
        return None


def _down_pairs(layout: Layout) -> dict[str, str]:
    """The blocks on the way down; a downsampler follows each level but the last."""
    pairs: dict[str, str] = {}
    for level in range(layout.levels):
        first = 1 + level * (layout.blocks + 1)
        for i in range(layout.blocks):
            pairs |= _block_pairs(f"input_blocks.{first + i}", f"down_blocks.{level}", i, level in layout.attention)
        if level < layout.levels - 1:
            pairs[f"input_blocks.{first + layout.blocks}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    return pairs


def _up_pairs(layout: Layout) -> dict[str, str]:
    """The blocks on the way up, from the coarsest level; an upsampler ends each level but the last."""
    pairs: dict[str, str] = {}
    for level in range(layout.levels):
        attention = layout.levels - 1 - level in layout.attention
        for i in range(layout.blocks + 1):
            n = level * (layout.blocks + 1) + i
            pairs |= _block_pairs(f"output_blocks.{n}", f"up_blocks.{level}", i, attention)
            if i == layout.blocks and level < layout.levels - 1:
                pairs[f"output_blocks.{n}.{1 + attention}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return pairs


def _block_pairs(block: str, level: str, i: int, attention: bool) -> dict[str, str]:
    pairs = {f"{block}.0.{ours}": f"{level}.resnets.{i}.{theirs}" for ours, theirs in _RESNET}
    return {**pairs, f"{block}.1": f"{level}.attentions.{i}"} if attention else pairs


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
"""SD 1.x and 2.x; SDXL, SSD-1B and Vega; KOALA; the demo model of this repository."""


def of_path(path: str) -> str | None:
    """Return the prefix of a bare dotted path, by its first part; None if no known model has such a path."""
    return _PREFIX_OF.get(path.split(".", 1)[0])


def dotted(name: str) -> str:
    """Return a layer's name with dots; only kohya stems change."""
    stem = next((stem for stem in STEMS if name.startswith(stem)), None)
    if stem is None:
        return name
    path = ".".join(_WORD.findall(name.removeprefix(stem)))
    known = of_path(path)
    if stem == KOHYA_TRANSFORMER:
        return TRANSFORMER + path
    return (known or HOST) + path


def underscored(name: str) -> str:
    """Return a layer's name as a kohya stem."""
    if name.startswith(STEMS):
        return name
    if name.startswith(TRANSFORMER):
        return KOHYA_TRANSFORMER + name.removeprefix(TRANSFORMER).replace(".", "_")
    return KOHYA + name.removeprefix(HOST).removeprefix(UNET).replace(".", "_")


def renamed(names: Iterable[str], to: str, layout: str | None = None) -> dict[str, str]:
    """Return the new name of each name in another naming.

    Args:
        names: of all layers of an adapter; the UNet's layout is detected from them.
        to: `HOST` (ComfyUI's), `UNET` (diffusers', for a UNet or a transformer) or `KOHYA`.
        layout: one of `LAYOUTS`; None detects it.
    Raises: ValueError if a name has no counterpart, the layouts that match the names disagree, or two names become one.
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
            f"its {len(paths)} layers, such as '{paths[0]}', have no name in the other naming for a UNet with the "
            f"layout {' or '.join(layouts)}; choose a format that keeps the names (kohya or generic)"
        )
    first = next(iter(fitting.values()))
    if any(found != first for found in fitting.values()):
        raise ValueError(
            f"its layers, such as '{paths[0]}', match UNets with the layouts {' and '.join(fitting)}, which differ in "
            "the other naming; give the layout"
        )
    return first
