"""The demo model at its narrow width as files, eight times faster than the shipped checkpoint, for a real server.

ComfyUI detects SD 1.5 by its width, among others. `narrow_is_recognised` drops that condition; the measuring server's
own nodes (`custom_nodes`) do the same.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from demo.seed import narrow_unet_state_dict
from dev.host import Host
from dev.models import CHECKPOINT as WIDE
from dev.pack import pack_module, start_host
from dev.workspace import PACK
from experiments.narrow import narrow_lora
from experiments.policy.graphs import CHECKPOINT, LORA

UNET = "model.diffusion_model."


@contextmanager
def narrow_is_recognised() -> Iterator[None]:
    """Within the block the host of this process takes a narrow checkpoint for SD 1.5."""
    from comfy.supported_models import SD15

    before = SD15.unet_config
    SD15.unet_config = {key: value for key, value in before.items() if key != "model_channels"}
    try:
        yield
    finally:
        SD15.unet_config = before


def write_demo(host: Host, folder: Path) -> None:
    """Write the narrow checkpoint and an erasure LoRA for it into `checkpoints` and `loras` of a folder."""
    start_host()
    import comfy.sd

    checkpoint, lora = folder / "checkpoints" / CHECKPOINT, folder / "loras" / LORA
    for file in (checkpoint, lora):
        file.parent.mkdir(parents=True)
    wide = load_file(str(host.base_directory / "models" / "checkpoints" / WIDE))
    kept = {name: value for name, value in wide.items() if not name.startswith(UNET)}
    narrow = {f"{UNET}{name}": value.contiguous() for name, value in narrow_unet_state_dict().items()}
    save_file({**kept, **narrow}, str(checkpoint))
    with narrow_is_recognised():
        patcher = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False, output_clip=False)[0]
    formats = pack_module("unguide_core.formats")
    adapter = formats.load_adapter(PACK / "demo" / "loras" / "selective" / LORA)
    loaded = pack_module("unguide_comfy.lora.load").ErasureLora(LORA, adapter)
    formats.save_adapter(narrow_lora(loaded, patcher).adapter, lora)


def write_policy(demo: Path, file: Path, **changed: str) -> str:
    """Write a policy for the narrow demo with the pack's own command, and return what that says.

    Args:
        demo: where `write_demo` has put it.
        changed: values by key, in place of the first that stands behind that key.
    """
    arguments = Namespace(
        policy=file, checkpoint=[demo / "checkpoints" / CHECKPOINT], adapter=[str(demo / "loras" / LORA)]
    )
    with narrow_is_recognised():
        said: Any = pack_module("unguide_policy.command").init(arguments)
    content = file.read_text(encoding="utf-8")
    for key, value in changed.items():
        before, _, rest = content.partition(f"{key}: ")
        content = f"{before}{key}: {value}\n{rest.partition(chr(10))[2]}"
    file.write_text(content, encoding="utf-8")
    return str(said)
