"""What the core's tests share: the official code's numbers, and a record of how far ours lie from them."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = REPOSITORY / "tests" / "fixtures" / "golden"

# Last, so that a host's own modules (its `nodes` above all) come before the pack's folders of the same name.
if str(REPOSITORY) not in sys.path:
    sys.path.append(str(REPOSITORY))


@dataclass(frozen=True)
class Golden:
    """One section of the official code's numbers: its manifest, and its files by their short name."""

    section: str

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        return json.loads((GOLDEN / f"{self.section}_manifest.json").read_text())

    def path(self, name: str) -> Path:
        return GOLDEN / self.manifest["files"][name]["file"]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path(name))


@pytest.fixture(scope="session")
def golden_a() -> Golden:
    return Golden("a")


@pytest.fixture(scope="session")
def golden_b() -> Golden:
    return Golden("b")


@pytest.fixture(scope="session")
def golden_c() -> Golden:
    return Golden("c")


@pytest.fixture
def agree() -> Iterator[Callable[..., None]]:
    """agree(what, ours, official, limit): within the limit; the largest deviation is printed at the end (`-s`)."""
    largest: dict[tuple[str, float], float] = {}

    def check(what: str, ours: Tensor, official: Tensor, limit: float, *, relative: bool = False) -> None:
        assert ours.shape == official.shape, what
        deviation = (ours.double() - official.double()).abs().max().item()
        if relative:
            deviation /= official.double().abs().max().item() or 1.0
        largest[what, limit] = max(deviation, largest.get((what, limit), 0.0))
        assert deviation <= limit, f"{what}: deviation {deviation:.3g}, limit {limit:.3g}"

    yield check
    for (what, limit), deviation in largest.items():
        print(f"\ngolden {what}: max abs diff {deviation:.2g} (limit {limit:.0e})", end="")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2508)
