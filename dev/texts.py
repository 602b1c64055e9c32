"""Writes the English texts of all nodes, as the page wants them, from their schemas. Run by `python3 dev texts`."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from dev.pack import load_pack, start_host
from dev.workspace import PACK

TEXTS = PACK / "locales" / "en" / "nodeDefs.json"


def described(schema: Any) -> dict[str, Any]:
    """One node's texts."""
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {part.id: {"name": _name(part), "tooltip": part.tooltip} for part in schema.inputs},
        "outputs": {
            str(slot): {"name": part.display_name, "tooltip": part.tooltip} for slot, part in enumerate(schema.outputs)
        },
    }


def _name(part: Any) -> str:
    """An input's name on the node."""
    return str(getattr(part, "display_name", None) or part.id)


async def texts() -> dict[str, Any]:
    """Every node's texts by its id."""
    extension = await load_pack().comfy_entrypoint()
    schemas = [node.GET_SCHEMA() for node in await extension.get_node_list()]
    return {schema.node_id: described(schema) for schema in schemas}


def main() -> None:
    start_host()
    TEXTS.write_text(json.dumps(asyncio.run(texts()), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(f"written: {TEXTS}\n")


if __name__ == "__main__":
    main()
