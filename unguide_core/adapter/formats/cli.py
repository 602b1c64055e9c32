"""The command line: `python -m unguide_core.formats inspect | convert | diff`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from ..containers import read_tensors
from ..lowrank import Adapter
from ..names import HOST, LAYOUTS, UNET, renamed
from . import ENERGY, FORMATS, AdapterError, BaseWeights, load_adapter, save_adapter
from .comparing import differences


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0, 1 if two adapters differ, 2 after an error message."""
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
        return status
    except (AdapterError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def inspect(arguments: argparse.Namespace) -> int:
    """Shows the adapter's metadata and how the file was read; with --layers also every layer."""
    adapter = _loaded(arguments, arguments.file)
    _print(*_card(adapter), *adapter.notes, f"{len(adapter.layers)} layers, fingerprint {adapter.fingerprint}")
    if arguments.layers:
        _print(*(f"  {n}: rank {x.rank}, scale {x.scale:g}, {list(x.weight_shape)}" for n, x in adapter.layers.items()))
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Writes an adapter in another format; an existing file is never replaced."""
    adapter = _loaded(arguments, arguments.source)
    save_adapter(adapter, arguments.target, arguments.format, layout=arguments.layout, replace=False)
    _print(*adapter.notes, f"{arguments.target}: {len(adapter.layers)} layers in the format {arguments.format}")
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Compares two adapters layer by layer: ||first - second|| / ||first||."""
    first, second = (_loaded(arguments, path) for path in (arguments.first, arguments.second))
    found = list(differences(first, second))
    unequal = [one for one in found if one.distance != 0.0]
    _print(*(one.line() for one in (found if arguments.all else unequal)))
    _print(f"{len(found) - len(unequal)} layers are equal, {len(unequal)} differ")
    for line in sorted({*_card(first)} ^ {*_card(second)}):
        _print(f"{'first' if line in _card(first) else 'second'} card: {line}")
    return 1 if unequal else 0


def base_weights(path: Path) -> BaseWeights:
    """The parameters of a checkpoint or a diffusers UNet in a file, by their names in any naming."""
    tensors, _ = read_tensors(path)

    def parameter(name: str) -> Tensor | None:
        layer, _, kind = name.rpartition(".")
        for candidate in _aliases(layer):
            found = tensors.get(f"{candidate}.{kind}")
            if found is not None:
                return found
        return None

    return parameter


def _aliases(layer: str) -> list[str]:
    """The possible names of a layer in a checkpoint: ComfyUI's or diffusers' path, with or without a prefix."""
    names = [layer]
    for to in (HOST, UNET):
        for layout in LAYOUTS:
            try:
                names.append(renamed([layer], to, layout)[layer])
            except ValueError:
                continue
    bare = [name.removeprefix(HOST).removeprefix(UNET) for name in names]
    return list(dict.fromkeys([*names, *bare, *(f"model.diffusion_model.{path}" for path in bare)]))


def _loaded(arguments: argparse.Namespace, path: Path) -> Adapter:
    base = None if arguments.base is None else base_weights(arguments.base)
    return load_adapter(path, alpha=arguments.alpha, base=base, energy=arguments.energy, partial=arguments.partial)


def _card(adapter: Adapter) -> list[str]:
    card = adapter.card
    known = [f"{f.name}: {getattr(card, f.name)}" for f in fields(card) if f.name != "extra" and getattr(card, f.name)]
    return [*known, *(f"{key}: {text}" for key, text in sorted(card.extra.items()))]


def _print(*lines: str) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m unguide_core.formats", description="Erasure adapters in files.")
    commands = parser.add_subparsers(required=True, metavar="command")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--alpha", type=float, help="overrides the file's alpha (scale = alpha / rank)")
    shared.add_argument("--base", type=Path, help="the base model's file, for full weights (ESD, UCE, ...)")
    shared.add_argument(
        "--energy", type=float, default=ENERGY, help="for full weights: fraction of each layer's change to keep"
    )
    shared.add_argument("--partial", action="store_true", help="leave out what a low-rank adapter cannot hold")

    one = commands.add_parser("inspect", parents=[shared], help=inspect.__doc__)
    one.add_argument("file", type=Path)
    one.add_argument("--layers", action="store_true", help="list every layer")
    one.set_defaults(run=inspect)

    two = commands.add_parser("convert", parents=[shared], help=convert.__doc__)
    two.add_argument("source", type=Path)
    two.add_argument("target", type=Path, help="ends in .safetensors, .pth (official) or nothing (peft, a folder)")
    two.add_argument("--format", choices=FORMATS, required=True)
    two.add_argument(
        "--layout", choices=LAYOUTS, help="of the UNet, for formats with other layer names (default: detected)"
    )
    two.set_defaults(run=convert)

    three = commands.add_parser("diff", parents=[shared], help=diff.__doc__)
    three.add_argument("first", type=Path)
    three.add_argument("second", type=Path)
    three.add_argument("--all", action="store_true", help="list equal layers too")
    three.set_defaults(run=diff)
    return parser


if __name__ == "__main__":
    sys.exit(main())
