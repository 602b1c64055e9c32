"""A custom node pack of the measuring server: node expansion, and a node that puts the host's function back.

It also lets the host take the demo model at its narrow width for SD 1.5, see `experiments.policy.narrow`.
"""

import comfy.samplers
from comfy.supported_models import SD15
from comfy_execution.graph_utils import GraphBuilder

SD15.unet_config = {key: value for key, value in SD15.unet_config.items() if key != "model_channels"}


class ExpandToSampler:
    """Expands to the host's KSampler, which the submitted graph does not hold."""

    CATEGORY, FUNCTION, RETURN_TYPES = "policy test", "run", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        names = {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"}
        return {"required": {name: (kind,) for name, kind in names.items()}}

    def run(self, **inputs):
        graph = GraphBuilder()
        chosen = {"seed": 7, "steps": 12, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        sampler = graph.node("KSampler", **inputs, **chosen)
        return {"result": (sampler.out(0),), "expand": graph.finalize()}


class PutBack:
    """Puts the host's own `CFGGuider.sample` back, as a careless pack may."""

    CATEGORY, FUNCTION, RETURN_TYPES = "policy test", "run", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def run(self, model):
        sample = comfy.samplers.CFGGuider.sample
        comfy.samplers.CFGGuider.sample = getattr(sample, "__wrapped__", sample)
        return (model,)


NODE_CLASS_MAPPINGS = {"PolicyTestExpand": ExpandToSampler, "PolicyTestPutBack": PutBack}
