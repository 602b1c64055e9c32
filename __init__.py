"""UnGuide for ComfyUI: erase a concept, leave every other image untouched (arXiv 2508.05755).

ComfyUI loads this file by its location, and test runners import it before any test: nothing of the host is imported
until the host asks for the nodes.
"""

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint():
    """The pack's extension object, imported when the host asks for it; a server's policy, if any, comes first."""
    from .unguide_policy import install

    install()
    from .nodes import UnGuideExtension

    return UnGuideExtension()
