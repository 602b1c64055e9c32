"""`python -m demo.licence` writes the licence of the demo's weights into the metadata of its erasure LoRAs.

Training writes it too (`erasure.card_of`). This is for files whose metadata says something else.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from unguide_core.formats import load_adapter, save_adapter

from .seed import LICENCE, SEED_PATH

LORAS = SEED_PATH.with_name("loras")


def relicense(path: Path) -> bool:
    """Rewrites a file whose metadata names another licence; its tensors stay. Returns whether it did."""
    adapter = load_adapter(path)
    if adapter.card.licence == LICENCE:
        return False
    extra = {key: text for key, text in adapter.card.extra.items() if key != "modelspec.license"}
    save_adapter(replace(adapter, card=replace(adapter.card, licence=LICENCE, extra=extra)), path)
    return True


def main() -> None:
    """Rewrites what has to be rewritten, and prints how many files that were."""
    paths = sorted(LORAS.rglob("*.safetensors"))
    sys.stdout.write(f"{sum(map(relicense, paths))} of {len(paths)} erasure LoRAs rewritten\n")


if __name__ == "__main__":
    main()
