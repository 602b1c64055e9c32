"""`python -m demo.unpack DESTINATION` unpacks the demo model to an SD 1.5 checkpoint (torch and safetensors only)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .networks import widening_error
from .seed import unpack_checkpoint


def main() -> None:
    """Unpacks, or with --verify compares the narrow with the wide UNet."""
    parser = argparse.ArgumentParser(prog="python -m demo.unpack", description=__doc__)
    parser.add_argument("destination", type=Path, nargs="?", default=Path("unguide_demo.safetensors"))
    parser.add_argument("--verify", action="store_true", help="print the largest narrow-wide difference instead")
    options = parser.parse_args()
    if options.verify:
        sys.stdout.write(f"largest difference between the narrow and the wide UNet: {widening_error():.2e}\n")
    else:
        sys.stdout.write(f"{unpack_checkpoint(options.destination)}\n")


if __name__ == "__main__":
    main()
