"""UnGuide Demo Model, and the erasure LoRAs that ship with it."""

from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import torch
from comfy_api.latest import io

from ..demo import seed
from .wires import schema

LORAS = seed.SEED_PATH.parent / "loras" / "selective"


def demo_loras() -> dict[str, Path]:
    """The demo model's erasure LoRAs by the name under which Load Erasure LoRA offers them, such as `demo/cat`.

    A user's own file always has a suffix in its name, so none can have the same name.
    """
    return {f"demo/{path.stem}": path for path in sorted(LORAS.glob("*.safetensors"))}


def skip_idle_layers(clip: Any) -> None:
    """Skip the layers of the demo's text encoder that add zeros and take most of its time; their weights stay."""
    for layer in clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[seed.TEXT_LAYERS :]:
        layer.forward = _unchanged


def _unchanged(states: torch.Tensor, *_: Any) -> torch.Tensor:
    return states


class DemoModel(io.ComfyNode):
    """Builds the embedded demo model in memory; the host caches it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnGuideDemoModel",
            display_name="UnGuide Demo Model",
            description="A tiny SD 1.5 that ships with this pack, to try UnGuide without a download. It generates "
            "64 x 64 images of an airplane, automobile, bird, cat, deer, dog, frog, horse, ship or truck ('a photo of "
            "the cat'), and of plain scenes such as 'a photo of the forest'. Load Erasure LoRA lists its erasure "
            "LoRAs under demo/.",
            search_aliases=["unguide demo", "demo checkpoint", "example model", "test model", "tiny sd 1.5"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The demo's diffusion model, of the SD 1.5 type."),
                io.Clip.Output(
                    display_name="clip", tooltip="The demo's text encoder, for the prompts and for Load Erasure LoRA."
                ),
                io.Vae.Output(display_name="vae", tooltip="The demo's autoencoder, for VAE Decode and VAE Encode."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        embeddings = folder_paths.get_folder_paths("embeddings")
        state = seed.checkpoint_state_dict()
        model, clip, vae, _ = comfy.sd.load_state_dict_guess_config(state, embedding_directory=embeddings)
        skip_idle_layers(clip)
        return io.NodeOutput(model, clip, vae)


NODES = [DemoModel]
