"""Entry point of `python3 dev <command>`."""

import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - run by whatever python3 is
    sys.exit(f"Python 3.10 or newer is needed, and this is {sys.version.split()[0]}; run dev with a newer one")

# `python3 dev` puts this folder on the path; the package is one level up
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dev.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
