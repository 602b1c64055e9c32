"""The pack's nodes: schemas and `execute` methods, no mathematics."""

from comfy_api.latest import ComfyExtension, io

from . import guide, loader, probe, sampler, train


class UnGuideExtension(ComfyExtension):
    """All nodes of the pack, in the order of the menu."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*loader.NODES, *probe.NODES, *guide.NODES, *sampler.NODES, *train.NODES]
