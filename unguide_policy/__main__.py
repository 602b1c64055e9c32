"""`python -m unguide_policy init | check | log`, in the pack's folder, with the Python of a ComfyUI.

The package imports the bridge through the pack, under whose name the host loads it. Here the pack is loaded likewise,
and ComfyUI stands on the import path in place of the pack's folder, whose `nodes/` would hide ComfyUI's `nodes.py`.
"""

from __future__ import annotations

import importlib.util
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
NAME = "comfyui_unguide"


def main() -> None:
    """Run one command; what it cannot do ends in one sentence."""
    parser = ArgumentParser(
        prog="python -m unguide_policy", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    host = ArgumentParser(add_help=False)
    host.add_argument("policy", type=Path, help="the policy file, such as ComfyUI/user/__unguide/policy.yaml")
    host.add_argument("--comfyui", type=Path, default=PACK.parents[1], help="its folder (default: %(default)s)")
    init = commands.add_parser("init", parents=[host], help="write a policy for a checkpoint and erasure LoRAs")
    init.add_argument(
        "--checkpoint",
        type=Path,
        action="append",
        required=True,
        help="a full checkpoint, with its text encoder; several times for several models, each with all adapters",
    )
    init.add_argument(
        "--adapter",
        action="append",
        required=True,
        metavar="FILE[=PROMPT]",
        help="an erasure LoRA, copied beside the policy, and its concept's own prompt if its metadata does not name "
        "one; several times for several concepts",
    )
    commands.add_parser("check", parents=[host], help="validate a policy and say what it means for clients")
    log = commands.add_parser("log", help="summarise a policy's log by day and concept")
    log.add_argument("log", type=Path, help="the log, such as ComfyUI/user/__unguide/policy.jsonl")
    arguments = parser.parse_args()
    try:
        _load_pack()
        if arguments.command == "log":
            from comfyui_unguide.unguide_policy.log import read_log, summary

            said = summary(read_log(arguments.log))
        else:
            _host(arguments.comfyui)
            from comfyui_unguide.unguide_policy import command

            said = getattr(command, arguments.command)(arguments)
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"unguide_policy: {' '.join(str(error).split())}") from None
    sys.stdout.write(said + "\n")


def _host(comfyui: Path) -> None:
    if not (comfyui / "comfy" / "samplers.py").is_file():
        raise ValueError(f"{comfyui} is not the folder of a ComfyUI; name it with --comfyui")
    sys.path[0] = str(comfyui.resolve())
    from comfy.cli_args import args

    args.cpu = True  # hashes and prompts need no GPU


def _load_pack() -> None:
    """Load the pack by its place, as the host does, so that its modules can be imported under `NAME`."""
    spec = importlib.util.spec_from_file_location(NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])


if __name__ == "__main__":
    main()
