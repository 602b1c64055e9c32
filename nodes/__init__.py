"""The pack's nodes: schemas and short `execute` methods."""

from comfy_api.latest import ComfyExtension, io

from ..unguide_core.formats import AdapterError, NameTakenError
from ..unguide_core.training.trainer import TrainingError
from . import calibrate, demo, erase, guide, loader, probe, replacements, sampler, save, settings, train

for error in (AdapterError, NameTakenError, TrainingError):
    error.__module__ = "unguide"  # ComfyUI's dialog shows it, and it would be a path of the user's disk


class UnGuideExtension(ComfyExtension):
    """All nodes of the pack, in the order of the menu."""

    async def on_load(self) -> None:
        await replacements.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        every = (erase, loader, guide, sampler, settings, probe, calibrate, train, save, demo)
        return [node for module in every for node in module.NODES]
