"""File formats of erasure adapters. See docs/formats.md.

    official   the research code's `lora.pth`: a torch zip of `<module path>.lora.A`, `.lora.B`
    kohya      `lora_unet_<stem>.lora_down.weight`, `.lora_up.weight`, `.alpha` (LECO, SPM, sliders)
    generic    the same with ComfyUI's own names, `diffusion_model.<module path>`
    peft       a folder: `base_model.model.<path>.lora_A.weight`, with the scale in a JSON file
    diffusers  `unet.<path>.lora_A.weight`, with the scale in the metadata; three older namings
    LyCORIS    LoHa, LoKr, OFT, BOFT, GLoRA and DoRA in kohya's, ComfyUI's or PEFT's naming, see composed.py
    full       replacement weights (ESD, UCE, concept ablation), read as the difference to the base model

The format is detected from the content, never from the file's name; other formats are refused by name (refused.py).
Does not know how files are opened (see containers.py), or whether an adapter fits a model: that is up to whoever
applies it. On the command line: `python -m unguide_core.formats inspect | convert | diff`.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..card import Card
from ..containers import is_torch_zip, json_object, read_json, read_tensors, write, write_folder
from ..lowrank import Adapter
from . import peft
from .elsewhere import with_prompts, without_ours
from .full import ENERGY, are_weights, read_full
from .named import BaseWeights, Named, Reading, Scales, factor, is_elsewhere, read_named
from .official import is_official, read_official
from .refused import REMEDY, refuse
from .writing import AS_IT_IS, FORMATS, alpha_of

__all__ = [
    "ENERGY",
    "FORMATS",
    "AdapterError",
    "BaseWeights",
    "NameTakenError",
    "load_adapter",
    "save_adapter",
]


class AdapterError(ValueError):
    """A file is not a usable erasure adapter, or cannot be written. The message names the file and the remedy."""


class NameTakenError(AdapterError):
    """There is a file of that name already."""


def load_adapter(
    path: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    base: BaseWeights | None = None,
    energy: float = ENERGY,
    partial: bool = False,
) -> Adapter:
    """Return the adapter in a file.

    Args:
        path: a file of any format above, or a PEFT folder.
        alpha: overrides the alpha of every layer (scale = alpha / rank). None takes the file's: layers without one have
            scale 1, as in the stock LoRA loader, and official files, which never store one, scale 8.
        base: the base model's parameters, for full replacement weights and for DoRA, OFT, BOFT and GLoRA.
        energy: for full replacement weights, the fraction of each layer's change to keep.
        partial: leave out what the model lacks or a low-rank adapter cannot hold, with a note, instead of raising.
    Returns: tensors on the CPU in the file's precision; `notes` says where the scale comes from and what was left out.
    Raises: AdapterError with the file, what is wrong with it and what to do.
    """
    path = Path(path)
    try:
        file, config = _parts(path)
        tensors, metadata = read_tensors(file)
        card = Card.from_metadata({key: text for key, text in metadata.items() if key != peft.DIFFUSERS_KEY})
        scales, rule = _scales(config, metadata, tensors)
        found = _layers(tensors, Reading(alpha, scales, rule, base, partial), energy)
        card, source_format = with_prompts(card, found.source_format)
        if source_format == "kohya" and is_torch_zip(file):
            source_format = "sliders"
        if not card.base_model and config is not None:
            card = replace(card, base_model=str(config.get("base_model_name_or_path") or ""))
        adapter = Adapter(found.layers, _completed(card, source_format, found), tuple(found.notes), partial)
        return without_ours(adapter)
    except ValueError as error:
        raise AdapterError(f"adapter '{path.name}': {error}") from error
    except OSError as error:
        raise AdapterError(f"adapter '{path.name}' cannot be read: {error}; check the file's permissions") from error


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    layout: str | None = None,
    replace: bool = True,
) -> None:
    """Write the adapter in one of `FORMATS`, with its card in the metadata.

    Tensors keep their bits, and so does the scale if alpha = scale * rank is a float32 number (otherwise to one ulp of
    float64); the official format, whose scale is always 8, takes scales that are 8 times a power of two. An existing
    file is replaced in one step, once the new one is complete; an existing folder is never replaced.

    Args:
        format: None keeps the layers' names, in a file that ComfyUI's stock LoRA loader also takes.
        layout: of the UNet, one of `names.LAYOUTS`, for formats that name layers otherwise; None detects it.
        replace: whether an existing file may be replaced.
    Raises: AdapterError if the name does not match the format, the format cannot hold the adapter, or the file cannot
        be written; an existing file is unchanged then.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise AdapterError(f"unknown format '{format}'; expected one of {', '.join(FORMATS)}")
    chosen = AS_IT_IS if format is None else FORMATS[format]
    if path.suffix != chosen.suffix and chosen.suffix:
        raise AdapterError(
            f"cannot save to '{path.name}': expected a name ending in {chosen.suffix}, as loaders expect it"
        )
    try:
        files = chosen.files(adapter, layout)
    except ValueError as error:
        raise AdapterError(f"cannot save '{path.name}' in the format '{format}': {error}") from error
    try:
        if chosen.suffix:
            write(path, files[""], replace=replace)
        else:
            write_folder(path, files)
    except FileExistsError as error:
        raise NameTakenError(f"cannot save '{path}': it exists already; choose another name") from error
    except OSError as error:
        raise AdapterError(
            f"cannot save '{path}': {error.strerror or error}; "
            "check that the folder exists and is writable, and that the disk is not full"
        ) from error


def _parts(path: Path) -> tuple[Path, dict[str, object] | None]:
    """The file with the tensors, and the PEFT configuration next to it, if there is one."""
    if path.is_dir():
        if not (path / peft.WEIGHTS).is_file():
            raise ValueError(f"no such file; a folder is an adapter only if PEFT saved it, with '{peft.WEIGHTS}' in it")
        path = path / peft.WEIGHTS
    config = path.with_name(peft.CONFIG)
    return path, read_json(config) if path.name == peft.WEIGHTS and config.is_file() else None


def _scales(
    config: Mapping[str, object] | None, metadata: Mapping[str, str], keys: Iterable[str]
) -> tuple[Scales | None, str]:
    """The scales that are stored outside the tensors, and where."""
    if config is not None:
        return peft.scales(config, keys), f"{peft.CONFIG}'s lora_alpha"
    if peft.DIFFUSERS_KEY in metadata:
        packed = json_object(metadata[peft.DIFFUSERS_KEY], peft.DIFFUSERS_KEY)
        return peft.scales(peft.unpacked(packed), keys), "lora_alpha in diffusers' metadata"
    return None, ""


def _layers(tensors: Mapping[str, Tensor], reading: Reading, energy: float) -> Named:
    """The layers, read in the format that is detected. Raises: ValueError."""
    if not tensors:
        raise ValueError("it holds no tensors; expected low-rank layers")
    if reading.alpha is not None and not math.isfinite(reading.alpha):
        raise ValueError(f"the overriding alpha is {reading.alpha}; expected a finite number")
    if is_official(tensors):
        return read_official(tensors, reading.alpha)
    refuse(key for key in tensors if not is_elsewhere(key))
    factors = [factor(key) for key in tensors]
    if any(found and found[2] != "alpha" for found in factors):
        return read_named(tensors, reading)
    if are_weights(tensors):
        return read_full(tensors, reading.base, energy, reading.partial, reading.alpha)
    raise ValueError(f"it holds no low-rank layers, but '{next(iter(tensors))}' for instance; {REMEDY}")


def _completed(card: Card, source_format: str, found: Named) -> Card:
    """The card with rank and alpha taken from the layers, whatever was written in it."""
    ranks, alphas = ({value(layer) for layer in found.layers.values()} for value in (lambda x: x.rank, alpha_of))
    return replace(
        card,
        source_format=card.source_format or source_format,
        rank=int(ranks.pop()) if len(ranks) == 1 else None,
        alpha=alphas.pop() if len(alphas) == 1 else None,
    )
