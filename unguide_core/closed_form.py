"""A closed-form eraser: the low-rank change of text states that erases a concept, and the adapter that applies it.

The layers that read a prompt are linear: keys and values of cross-attention are W c for every text state c. One map of
text states therefore edits them all, W (c + E c) = (W + W E) c, and with E = up @ down of low rank every layer's change
is a LoRA whose `down` is shared. No model evaluation and no training is needed:

    E = argmin  mean ||r - c - E c||^2 + lambda mean ||E k||^2 + reg s ||E||^2
      = B G^-1,  B = mean (r - c) c^T,  G = mean c c^T + lambda mean k k^T + reg s I,  s = tr(mean c c^T) / width

over pairs of states (c of a prompt to erase, r of the prompt that takes its place) and states k to keep. It is the
ridge solution of UCE (arXiv 2308.14761), as also in MACE (arXiv 2403.06135) and RECE (arXiv 2407.12383); SPEED (arXiv
2503.07392) keeps by projection instead. They solve for each layer; here it is one map for all, whose rank is cut as the
layers feel it (reduced-rank regression), and all positions of a prompt count, the padding too, for text encoders carry
the meaning there.

It does not know text encoders, models or words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter.lowrank import LowRank

WIDTH_LIMIT = 8192
"""The widest text states that are taken; those of the largest known text encoders have 4,096 numbers."""

DIRECTIONS = 64
"""At least so many of the change's main directions are kept before its rank is cut; narrower states keep all."""

RANK_LIMIT = 512
"""The highest rank of an eraser."""

LEAST_CHANGE = 1e-6
"""Below this root mean square of r - c, relative to c, there is nothing to erase."""

_ITERATIONS = 3
_ROWS = 2048  # so many states at a time: each product then costs more than the sum that it is added to


@dataclass(frozen=True)
class ClosedForm:
    """How an eraser is fitted.

    Args:
        rank: the most directions that the change has.
        explained: it has as few of them as explain this share of the whole change, as the layers feel it.
        kept_weight: lambda, the weight of the states to keep.
        regularization: reg, relative to the mean square of the states to erase.
        eta: how far past the reference: the target is c + (1 + eta) (r - c). The solution is linear in it.
    Raises: ValueError for values out of range.
    """

    rank: int = 4
    explained: float = 0.999
    kept_weight: float = 1.0
    regularization: float = 1e-3
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= RANK_LIMIT:
            raise ValueError(f"rank is {self.rank}; expected 1 to {RANK_LIMIT}")
        for name, low, high in (
            ("explained", 0.01, 1.0),
            ("kept_weight", 0.0, 1e6),
            ("regularization", 1e-8, 10.0),
            ("eta", -0.99, 20.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; expected a number from {low:g} to {high:g}")


class Moment:
    """The sum of c c^T over text states, float64, and their number. Moments of different prompts add and subtract."""

    def __init__(self, width: int):
        if not 1 <= width <= WIDTH_LIMIT:
            raise ValueError(f"the text states have width {width}; expected 1 to {WIDTH_LIMIT}")
        self.sum = torch.zeros(width, width, dtype=torch.float64)
        self.count = 0

    @property
    def width(self) -> int:
        """The number of features of a state."""
        return self.sum.shape[0]

    @property
    def mean(self) -> Tensor:
        """The mean of c c^T, [width, width]; zeros if there are no states."""
        return self.sum / max(self.count, 1)

    def add(self, states: Tensor) -> Moment:
        """Add the states of a prompt, [..., width]; return the moment itself. Raises: ValueError for wrong states."""
        c = _checked(states, self.width)
        self.sum.addmm_(c.T, c)
        self.count += len(c)
        return self

    def minus(self, other: Moment) -> Moment:
        """Return the moment of the states that another one, of some of them, does not have."""
        if other.width != self.width or other.count > self.count:
            raise ValueError(
                f"cannot take {other.count} states of width {other.width} from {self.count} of width {self.width}"
            )
        left = Moment(self.width)
        left.sum, left.count = self.sum - other.sum, self.count - other.count
        return left


@dataclass(frozen=True, eq=False)
class ClosedFormEraser:
    """A fitted change of text states, E = up @ down.

    down: [rank, width], rows of norm 1.
    up: [width, rank].
    explained: the share of the whole change that the rank keeps, as the layers feel it.
    """

    down: Tensor
    up: Tensor
    explained: float

    @property
    def rank(self) -> int:
        """The number of directions."""
        return self.down.shape[0]

    def __call__(self, states: Tensor) -> Tensor:
        """Return the erased states c + E c, [..., width]."""
        return states + states @ self.down.T @ self.up.T

    def layer(self, weight: Tensor) -> LowRank:
        """Return the change W E of a layer that reads the states, float32.

        Args:
            weight: W, [out, in]. Of a layer that reads more than the states, they are its first inputs.
        """
        width = self.up.shape[0]
        if weight.ndim != 2 or weight.shape[1] < width:
            raise ValueError(
                f"the layer's weight has shape {list(weight.shape)}; expected [out, {width} or more], for text states "
                f"of width {width}"
            )
        down = self.down.new_zeros(self.rank, weight.shape[1])
        down[:, :width] = self.down
        return LowRank(down, weight[:, :width].to("cpu", torch.float32) @ self.up)


class ClosedFormFitter:
    """Collects pairs of states to erase; `fit` solves for the eraser, as often as wanted.

    Args:
        width: of the text states.
    """

    def __init__(self, width: int):
        self._erased = Moment(width)
        self._cross = torch.zeros_like(self._erased.sum)  # the sum of (r - c) c^T
        self._moved = 0.0  # the sum of ||r - c||^2
        self._waiting: list[tuple[Tensor, Tensor]] = []  # states c and changes r - c that are still to be added

    def erase(self, target: Tensor, reference: Tensor) -> ClosedFormFitter:
        """Add a pair of prompts, position by position; return the fitter itself.

        Args:
            target: states of the prompt to erase, [..., tokens, width].
            reference: of the prompt that takes its place. A shorter one is repeated: encoders cut long prompts into
                parts, each with a beginning and an end of its own.
        """
        c, r = (_checked(states, self._erased.width) for states in (target, reference))
        self._waiting.append((c, r.repeat(-(-len(c) // len(r)), 1)[: len(c)] - c))
        if sum(len(waiting) for waiting, _ in self._waiting) >= _ROWS:
            self._add()
        return self

    def _add(self) -> None:
        if not self._waiting:
            return
        c, change = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        self._erased.add(c)
        self._cross.addmm_(change.T, c)
        self._moved += float(change.square().sum())

    def _require_something_to_erase(self) -> None:
        if self._erased.count == 0 or self._moved <= LEAST_CHANGE**2 * float(self._erased.sum.trace()):
            raise ValueError(
                "the prompts to erase and their references have the same text states, so there is nothing to erase; "
                "use another reference, or check that the text encoder knows the word"
            )

    def fit(self, weights: Iterable[Tensor], kept: Moment, settings: ClosedForm) -> ClosedFormEraser:
        """Return the eraser.

        The rank is cut by reduced-rank regression: with G = R R^T, the best E of rank r in the metric of the layers,
        M = sum of W^T W / ||W||^2, is the one whose M^1/2 E R has the first r singular vectors of M^1/2 B R^-T.

        Args:
            weights: of the layers that read the states, [out, width or more]; the change is weighed as they feel it.
            kept: of the states to keep; without any, nothing is kept.
        Raises: ValueError if there is nothing to erase, or no layer reads the states.
        """
        self._add()
        self._require_something_to_erase()
        mean, width = self._erased.mean, self._erased.width
        if kept.width != width:
            raise ValueError(f"the states to keep have width {kept.width} and those to erase {width}")
        gram = mean + settings.kept_weight * kept.mean
        gram.diagonal().add_(settings.regularization * float(mean.trace()) / width)
        cross = self._cross * ((1.0 + settings.eta) / self._erased.count)
        root = torch.linalg.cholesky(gram)
        basis = _column_basis(cross, max(DIRECTIONS, 2 * settings.rank))
        metric, inverse = _roots(_felt(weights, basis))
        # M^1/2 B R^-T within the basis: [directions, width]
        change = torch.linalg.solve_triangular(root, (metric @ basis.T @ cross).T, upper=False).T
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        shares = s.square().cumsum(0) / s.square().sum()
        enough = int((shares < settings.explained).sum()) + 1
        rank = min(settings.rank, enough, len(s))
        down = torch.linalg.solve_triangular(root.T, vh[:rank].T, upper=True).T
        size = down.norm(dim=1)
        up = basis @ inverse @ u[:, :rank] * (s[:rank] * size)
        return ClosedFormEraser((down / size[:, None]).float().contiguous(), up.float(), float(shares[rank - 1]))


def most_different(own: Tensor, others: dict[str, Tensor]) -> str:
    """Return the name of the prompt whose states are least similar to a concept's: a neutral reference.

    Args:
        own: states of the concept's prompt, [..., tokens, width].
        others: states of the candidates' prompts.
    """
    mean = _checked(own, own.shape[-1]).mean(0)

    def similarity(name: str) -> float:
        other = _checked(others[name], own.shape[-1]).mean(0)
        return float(torch.nn.functional.cosine_similarity(mean, other, dim=0))

    return min(others, key=similarity)


def _checked(states: Tensor, width: int) -> Tensor:
    """The states as rows, [tokens, width], float64, on the CPU. Raises: ValueError for a wrong width or values."""
    if states.ndim == 0 or states.shape[-1] != width or states.numel() == 0:
        raise ValueError(f"the text states have shape {list(states.shape)}; expected [..., {width}], not empty")
    rows = states.detach().reshape(-1, width).to("cpu", torch.float64)
    if not bool(rows.isfinite().all()):
        raise ValueError("the text states hold NaN or infinite values; expected finite ones: check the text encoder")
    return rows


def _column_basis(matrix: Tensor, size: int) -> Tensor:
    """An orthonormal basis of a matrix's main column directions, [width, at most size].

    Randomised subspace iteration (arXiv 0909.4061, Alg. 4.4) with fixed random numbers; exact for narrow states.
    """
    width = matrix.shape[0]
    if width <= size:
        return torch.eye(width, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(width, size, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(matrix @ start)[0]
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis)[0]
        basis = torch.linalg.qr(matrix @ basis)[0]
    return basis


def _felt(weights: Iterable[Tensor], basis: Tensor) -> Tensor:
    """The layers' metric within a basis, P^T (sum of W^T W / ||W||^2) P, float64."""
    width, size = basis.shape
    metric, directions = torch.zeros(size, size, dtype=torch.float64), basis.float()
    for weight in weights:
        read = weight[:, :width].detach().to("cpu", torch.float32)
        felt = read @ directions
        norm = float(read.norm())
        if not math.isfinite(norm):
            raise ValueError("a layer's weight holds NaN or infinite values; expected finite ones: check the model")
        if norm > 0.0:
            metric += (felt.T @ felt).double() / norm**2
    if not bool(metric.any()):
        raise ValueError("no layer reads the text states; expected the keys and values of cross-attention")
    return metric


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a metric, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(metric)
    used = values > 1e-7 * values[-1]  # the metric is summed in single precision
    root = torch.where(used, values.clamp_min(0.0), 0.0).sqrt()
    inverse = torch.where(used, 1.0 / root.clamp_min(1e-300), 0.0)
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T
