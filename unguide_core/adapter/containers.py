"""Reads and writes tensors with metadata: safetensors files and torch zips.

Does not know adapters; formats/ does. Files come from strangers: everything is checked before it is used, and nothing
but tensors is unpickled. Files are written in one step, or not at all.
"""

import io
import json
import os
import pickle
import secrets
import shutil
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .card import HEADER_LIMIT

_ZIP_MAGIC, _PICKLE_MAGIC = b"PK\x03\x04", b"\x80"
_METADATA = "unguide.json"
"""The member of a torch zip that holds our metadata; torch has no place for it, and ignores unknown members."""

_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128),
}
_JSON_LIMIT = 4 << 20
_PICKLE_LIMIT = 16 << 20
_TENSOR_LIMIT = 20_000
"""Several times as many as the largest known adapters have."""
_DEPTH = 3


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors and metadata, whatever its name is.

    Nested dicts become keys with dots. Tensors may be views of the file: copy what you keep.

    Raises: ValueError that says what is wrong with the file; OSError if it cannot be read.
    """
    if not path.is_file():
        raise ValueError("no such file; put adapters into ComfyUI's folder models/loras")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
    if size == 0:
        raise ValueError("the file is empty; download or save it again")
    if start.startswith(_ZIP_MAGIC):
        tensors, metadata = _read_torch_zip(path, size)
    elif start.startswith(_PICKLE_MAGIC) and start[8:] != b"{":
        raise ValueError(
            "it is a bare pickle, which could run code when it is opened, and is not read; expected safetensors or a "
            "torch zip: save it again with a current torch, or as safetensors"
        )
    else:
        _check_safetensors_header(start, size)
        tensors, metadata = _read_safetensors(path)
    strange = next((key for key, tensor in tensors.items() if tensor.dtype not in _DTYPES), None)
    if strange is not None:
        raise ValueError(f"'{strange}' has dtype {tensors[strange].dtype}; expected plain numbers: save it as float16")
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > size:
        raise ValueError(
            f"its tensors claim {claimed} bytes and the file has {size}; it is damaged or forged, do not use it"
        )
    return tensors, metadata


def is_torch_zip(path: Path) -> bool:
    """Return whether a file is a zip, as torch writes them."""
    with path.open("rb") as file:
        return file.read(4) == _ZIP_MAGIC


def read_json(path: Path) -> dict[str, object]:
    """Return the JSON object in a small file. Raises: ValueError if it is not one; OSError if it cannot be read."""
    if path.stat().st_size > _JSON_LIMIT:
        raise ValueError(f"'{path.name}' has {path.stat().st_size} bytes; expected {_JSON_LIMIT} at most")
    return json_object(path.read_bytes(), path.name)


def json_object(text: bytes | str, what: str) -> dict[str, object]:
    """Return the JSON object in a text. Raises: ValueError if it is not one."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{what}' is not JSON ({error}); download or save it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{what}' holds a {type(content).__name__}; expected a JSON object")
    return content


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a safetensors file."""
    # copies because safetensors refuses tensors that share memory
    copies = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    return save(copies, {"format": "pt", **metadata})


def torch_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a torch zip: a dict of tensors for `torch.load`, and our member with the metadata."""
    content = io.BytesIO()
    torch.save({key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}, content)
    with zipfile.ZipFile(content, "a") as archive:
        folder = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{folder}/{_METADATA}", json.dumps(dict(metadata)))
    return content.getvalue()


def write(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write a file in one step: it is complete on the disk before it replaces an existing one.

    Raises: FileExistsError if there is one and `replace` is False; OSError if it cannot be written. An existing file is
        then unchanged and nothing else is left behind.
    """
    with _temporary(path) as temporary:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            _move_to_free_name(temporary, path)


def write_folder(path: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder of files in one step. Raises: FileExistsError if the name is taken; OSError as `write`."""
    with _temporary(path) as temporary:
        temporary.mkdir()
        for name, content in contents.items():
            write(temporary / name, content)
        if path.exists():
            raise FileExistsError(17, "it exists already", str(path))
        os.rename(temporary, path)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A free name beside `path`; what is still there at the end is removed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink()


def _move_to_free_name(temporary: Path, path: Path) -> None:
    """A hard link fails atomically if the name is taken; some file systems have no hard links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        if path.exists():
            raise FileExistsError(17, "it exists already", str(path)) from None
        os.rename(temporary, path)


def _check_safetensors_header(start: bytes, size: int) -> None:
    """A safetensors file begins with the header's length (8 bytes, little-endian) and the header, a JSON object."""
    if start[8:] != b"{":
        raise ValueError("it is neither safetensors nor a torch zip; expected an adapter saved by a LoRA trainer")
    (header,) = struct.unpack("<Q", start[:8])
    if header > size - 8:
        raise ValueError(f"it is truncated: its header has {header} bytes and the file only {size}; download it again")
    if header > HEADER_LIMIT:
        raise ValueError(f"its header has {header} bytes; expected {HEADER_LIMIT} at most: it is damaged or forged")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            metadata.pop("format", None)  # the library that wrote the file
            _require_few(len(file.keys()))
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"its safetensors content is damaged or truncated ({error}); download or save it again"
        ) from error


def _require_few(tensors: int) -> None:
    if tensors > _TENSOR_LIMIT:
        raise ValueError(f"it holds {tensors} tensors; expected {_TENSOR_LIMIT} at most: it is not a LoRA")


def _read_torch_zip(path: Path, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A torch zip's dict of tensors and its metadata; nothing but tensors is unpickled."""
    metadata = _check_zip(path, size)
    try:
        with path.open("rb") as file:  # given a path, torch.load would go by its suffix
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "it holds more than tensors, possibly code, and is refused; "
            "expected a plain dict of tensors, such as the official trainer's lora.pth"
        ) from error
    except Exception as error:  # torch raises errors of many types for damaged content
        raise ValueError(f"its torch content is damaged ({error}); download or save it again") from error
    tensors = dict(_flattened(content))
    _require_few(len(tensors))
    if not tensors and content != {}:
        raise _strange(content)
    return tensors, metadata


def _flattened(content: object, prefix: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts (`delta.bin` is {"unet": {...}}), with dots in their keys."""
    if not isinstance(content, dict) or depth == 0:
        raise _strange(content)
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.", depth - 1)
        elif isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu":
            yield f"{prefix}{key}", value.detach()
        else:
            raise _strange(value)


def _strange(content: object) -> ValueError:
    return ValueError(
        f"it holds a {type(content).__name__} where a dict of plain tensors is expected; "
        "use the lora.pth that the official trainer wrote"
    )


def _check_zip(path: Path, size: int) -> dict[str, str]:
    """The metadata in a torch zip. torch compresses nothing: a zip that unpacks to more than its size is a bomb."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
                raise ValueError("it is a compressed zip, which torch does not write; expected a file saved by torch")
            pickles = [member for member in members if member.filename.endswith("data.pkl")]
            if not pickles:
                raise ValueError(
                    "it is a zip without a torch pickle; expected a file saved by torch: unpack it and use its content"
                )
            if any(member.file_size > _PICKLE_LIMIT for member in pickles):
                raise ValueError(f"its pickle has more than {_PICKLE_LIMIT} bytes; it is damaged or forged")
            ours = next((m for m in members if m.filename.endswith(f"/{_METADATA}")), None)
            if ours is None:
                return {}
            if ours.file_size > _JSON_LIMIT:
                raise ValueError(f"its metadata have {ours.file_size} bytes; expected {_JSON_LIMIT} at most")
            metadata = json_object(archive.read(ours), _METADATA)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OverflowError, struct.error, RuntimeError) as error:
        raise ValueError(f"its torch zip is damaged or truncated ({error}); download or save it again") from error
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"'{_METADATA}' in it holds values that are not texts; it is damaged, save it again")
    return {key: str(value) for key, value in metadata.items()}
