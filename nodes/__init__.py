"""The pack's nodes: schemas and `execute` methods, no mathematics."""

from comfy_api.latest import ComfyExtension, io

from . import calibrate, guide, loader, probe, sampler, save, train


class UnGuideExtension(ComfyExtension):
    """All nodes of the pack, in the order of the menu."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        every = (loader, calibrate, probe, guide, sampler, train, save)
        return [node for module in every for node in module.NODES]
