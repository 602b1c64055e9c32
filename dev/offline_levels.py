"""comfy-test's levels that need neither an environment nor a server, on a folder. Run with the host's python.

`syntax` and `javascript` fail; `warnings` and `hazards` report what a person should look at. The level `coverage` knows
only nodes of the older kind (NODE_CLASS_MAPPINGS), so it is left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from comfy_test.cli import lint
from comfy_test.orchestration.levels import hazards, warnings


def main() -> int:
    """The exit status of `comfy-test lint --strict`; the reports are printed before it."""
    folder = Path(sys.argv[1]).resolve()
    config, _ = lint._load_config(folder)
    with tempfile.TemporaryDirectory() as scratch:
        for level in (warnings, hazards):
            level.run(lint._make_ctx(folder, config, Path(scratch), print))
    return lint.cmd_lint(argparse.Namespace(path=str(folder), check="all", json=False, strict=True))


if __name__ == "__main__":
    sys.exit(main())
