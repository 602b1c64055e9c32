"""An unfinished training on disk: a safetensors file next to the result, written in one step and never unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unguide_core.adapter.containers import read_tensors, safetensors_bytes, write

KEY = "unguide_train"


def path_of(result: Path) -> Path:
    """Returns the path of the checkpoint of a result."""
    return result.with_name(f".{result.stem}.checkpoint.safetensors")


def save(state: dict[str, Any], path: Path) -> None:
    """Writes a `Training.state_dict`, with the hash of the base model as "base"."""
    tensors: dict[str, Tensor] = {"generator": state["generator"]}
    for name, (down, up) in state["layers"].items():
        tensors[f"layer/{name}/down"], tensors[f"layer/{name}/up"] = down, up
    for number, values in state["optimizer"]["state"].items():
        for name, value in values.items():
            tensors[f"optimizer/{number}/{name}"] = torch.as_tensor(value)
    plain = {
        "task": state["task"],
        "base": state["base"],
        "state": state["state"],
        "layers": list(state["layers"]),
        "groups": state["optimizer"]["param_groups"],
        "process": os.getpid(),
    }
    write(path, safetensors_bytes(tensors, {KEY: json.dumps(plain)}))


def load(path: Path) -> dict[str, Any]:
    """Returns what `Training.load_state_dict` takes. Raises: ValueError if the file is damaged or not a checkpoint."""
    tensors, plain = _read(path)
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, number, key = name.split("/")
            optimizer.setdefault(int(number), {})[key] = tensor.clone()
    return {
        "task": plain.get("task", {}),
        "base": plain.get("base", ""),
        "state": plain["state"],
        "layers": {n: [tensors[f"layer/{n}/down"].clone(), tensors[f"layer/{n}/up"].clone()] for n in plain["layers"]},
        "optimizer": {"state": optimizer, "param_groups": plain["groups"]},
        "generator": tensors["generator"].clone(),
    }


def writer(path: Path) -> int:
    """Returns the id of the process that wrote a checkpoint."""
    return int(_read(path)[1]["process"])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = read_tensors(path)
    if KEY not in metadata:
        raise ValueError(f"{path.name!r} is not a checkpoint of unguide_train; remove it to start again")
    return tensors, json.loads(metadata[KEY])
