"""What became of nodes that were renamed, so that workflows saved before open and run.

A node's id never changes after its first release unless an entry here says what takes its place. There is none yet. An
entry's fields are those of `comfy_api.latest.io.NodeReplace`:

    {
        "old_node_id": "UnGuideOldName",
        "new_node_id": "UnGuideNewName",
        "old_widget_ids": ["strength"],
        "input_mapping": [{"new_id": "model", "old_id": "model"}, {"new_id": "amount", "old_id": "strength"}],
        "output_mapping": [{"new_idx": 0, "old_idx": 0}],
    }
"""

from collections.abc import Iterable, Mapping
from typing import Any

from comfy_api.latest import ComfyAPI, io

REPLACEMENTS: tuple[Mapping[str, Any], ...] = ()


async def register(replacements: Iterable[Mapping[str, Any]] = REPLACEMENTS) -> None:
    """Tell the host, where its version knows replacements."""
    service = getattr(ComfyAPI(), "node_replacement", None)
    for fields in replacements:
        if service is not None:
            await service.register(io.NodeReplace(**fields))
