"""Tensors and metadata in and out of files: safetensors and torch zips, read without running anything in them.

Knows no adapter: what the tensors mean is formats.py's business. Files come from strangers, so every read is checked
before it is believed, and nothing but tensors is ever unpickled.
"""

import os
import pickle
import secrets
import struct
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_ZIP_MAGIC, _PICKLE_MAGIC = b"PK\x03\x04", b"\x80"


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors and its metadata (empty for a torch zip), whatever its name ends in.

    Tensors may be views into the file while it lies open: copy what is kept.

    Raises: ValueError telling what is wrong with the file; OSError if it cannot be read.
    """
    if not path.is_file():
        raise ValueError("no such file; put adapters into ComfyUI's folder models/loras")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
    if size == 0:
        raise ValueError("the file is empty; download or save it again")
    if start.startswith(_ZIP_MAGIC):
        tensors, metadata = _read_torch_zip(path, size), dict[str, str]()
    elif start.startswith(_PICKLE_MAGIC) and start[8:] != b"{":
        raise ValueError(
            "it is a bare pickle, which may run code when opened, and is not read; expected safetensors or a torch "
            "zip: save it again with a current torch, or as safetensors"
        )
    else:
        _check_safetensors_header(start, size)
        tensors, metadata = _read_safetensors(path)
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > size:
        raise ValueError(
            f"its tensors claim {claimed} bytes and the file has {size}; it is damaged or forged, do not use it"
        )
    return tensors, metadata


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in one step: the new one is complete on the disk before an existing one goes.

    Raises: OSError if it cannot be written; an existing file is then untouched and nothing else stays behind.
    """
    # copies, for safetensors refuses tensors that share memory
    copies = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    content = save(copies, {"format": "pt", **metadata})
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _check_safetensors_header(start: bytes, size: int) -> None:
    """safetensors begins with the header's length, 8 bytes little-endian, and the header, a JSON object."""
    if start[8:] != b"{":
        raise ValueError("it is neither safetensors nor a torch zip; expected an adapter saved by a LoRA trainer")
    (header,) = struct.unpack("<Q", start[:8])
    if header > size - 8:
        raise ValueError(f"it is truncated: its header has {header} bytes and the file only {size}; download it again")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            metadata.pop("format", None)  # the container's own: which library wrote it
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"its safetensors content is damaged or truncated ({error}); download or save it again"
        ) from error


def _read_torch_zip(path: Path, size: int) -> dict[str, Tensor]:
    """A torch zip's dict of tensors, without unpickling anything but tensors."""
    _check_zip(path, size)
    try:
        with path.open("rb") as file:  # by its path, torch.load would go by the name's ending
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "it holds more than tensors, perhaps code, and is refused; "
            "expected a plain dict of tensors, as the official trainer's lora.pth is"
        ) from error
    except Exception as error:  # torch raises nearly anything on damaged content
        raise ValueError(f"its torch content is damaged ({error}); download or save it again") from error
    values = list(content.values()) if isinstance(content, dict) else [content]
    strange = next((value for value in values if not _is_plain(value)), None if isinstance(content, dict) else content)
    if strange is not None:
        raise ValueError(
            f"it holds a {type(strange).__name__} where a dict of plain tensors is expected; "
            "use the lora.pth that the official trainer wrote"
        )
    return {str(key): value for key, value in content.items()}


def _check_zip(path: Path, size: int) -> None:
    """A torch zip holds a pickle, and nothing in it is compressed: what unpacks to more than the file is a bomb."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"its torch zip is damaged or truncated ({error}); download or save it again") from error
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise ValueError("it is a compressed zip, and torch writes none; expected a file saved by torch")
    if not any(member.filename.endswith("data.pkl") for member in members):
        raise ValueError(
            "it is a zip without a torch pickle; expected a file saved by torch: unpack it and use what is in it"
        )


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
