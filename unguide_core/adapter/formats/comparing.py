"""Compares two adapters layer by layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.linalg import vector_norm

from ..lowrank import Adapter, LowRank
from ..names import KOHYA, renamed


@dataclass(frozen=True)
class Difference:
    """One layer in two adapters.

    name: as a kohya stem, in diffusers' naming if it is known.
    first, second: the layer in each; None if there is none.
    distance: see `distance`; None if one adapter lacks the layer.
    """

    name: str
    first: LowRank | None
    second: LowRank | None
    distance: float | None

    def line(self) -> str:
        """The comparison as a line of text."""
        sides = " | ".join("-" if layer is None else _described(layer) for layer in (self.first, self.second))
        distance = "only in one" if self.distance is None else f"{self.distance:.3g}"
        return f"{distance:>12}  {self.name}: {sides}"


def differences(first: Adapter, second: Adapter) -> Iterator[Difference]:
    """Yield every layer of either adapter, matched across namings."""
    left, right = _by_stem(first), _by_stem(second)
    for name in sorted({*left, *right}):
        one, other = left.get(name), right.get(name)
        yield Difference(name, one, other, None if one is None or other is None else distance(one, other))


def distance(first: LowRank, second: LowRank) -> float:
    """Return ||A - B|| / ||A||, Frobenius norms, of the weight changes A and B; infinite if their shapes differ.

    0 only for equal values: the same factors and scale, or the same product.
    """
    if first.up.shape[0] != second.up.shape[0] or first.down[0].numel() != second.down[0].numel():
        return float("inf")
    if first.scale == second.scale and _same(first.down, second.down) and _same(first.up, second.up):
        return 0.0
    one, other = (layer.up.double().flatten(1) @ layer.down.double().flatten(1) for layer in (first, second))
    change = vector_norm(one * first.scale - other * second.scale).item()
    size = vector_norm(one * first.scale).item()
    return change / size if size else (float("inf") if change else 0.0)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape[0] == other.shape[0] and bool((one.double().flatten() == other.double().flatten()).all())


def _by_stem(adapter: Adapter) -> Mapping[str, LowRank]:
    stems = renamed(adapter.layers, KOHYA)
    return {stems[name]: layer for name, layer in adapter.layers.items()}


def _described(layer: LowRank) -> str:
    return f"rank {layer.rank}, scale {layer.scale:g}, {list(layer.weight_shape)}"
