"""Base and adapted predictions of one denoising step, blended row by row (`WrappersMP.APPLY_MODEL`).

Classifier-free guidance is linear and the weights of a blend sum to 1, so blending every row before guidance equals
blending the two guided results, under any sampler and any guider. Knows no gate: it reads the weights off the `Run`
that the sampling wrapper put into the transformer options.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management
import torch

from ..unguide_core.adapter import LowRank
from ..unguide_core.guidance import blend, blend_many
from .injection import NotBatchable, adapted_rows

RUN = "unguide_run"

Weight = float | torch.Tensor


@dataclass
class Run:
    """One sampling run: the layers of each adapter, the weights in force, the evaluations spent.

    Args:
        layers: for each adapter {module path: LowRank}, as matched with the model.
        weights: for each adapter the base model's weight in the blend, one number or one per sample, [B].
        evaluated: rows that the network has computed, by kind ("base", "adapted").
        asked_for: rows that the sampler asked for: what plain sampling would have computed.
        batchable: whether base and adapted rows may share a forward; found out on the way, or forbidden.
        elsewhere: adapters that are no part of the blend: their displacement is added after it (`displacing`).
        watch: what looks at the run while it goes on (`watching.Watch`), None where nothing does.
        displace: what adds those displacements to guided predictions (`displacing.Displacing`), None for nothing.
        looking: within a look, which adapter computes each conditioning of the call, None for the base model.
    """

    layers: tuple[Mapping[str, LowRank], ...]
    weights: list[Weight] = field(default_factory=list)
    evaluated: dict[str, int] = field(default_factory=lambda: {"base": 0, "adapted": 0})
    asked_for: int = 0
    batchable: bool = True
    elsewhere: frozenset[int] = frozenset()
    watch: Any = None
    displace: Any = None
    looking: tuple[int | None, ...] | None = None
    _modules: dict[int, dict[str, torch.nn.Module]] = field(default_factory=dict, repr=False)
    _cast: dict[tuple[int, torch.device, torch.dtype], Mapping[str, LowRank]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.weights = self.weights or [1.0] * len(self.layers)

    def active(self) -> list[int]:
        """The adapters that take part in the blend: those whose weight is not 1 in every sample."""
        return [i for i, weight in enumerate(self.weights) if i not in self.elsewhere and not is_all(weight, 1.0)]

    @contextmanager
    def predicting(self, adapters: Sequence[int | None]) -> Iterator[None]:
        """Within the block nothing blends: each conditioning of a call is computed by the adapter given for it.

        Args:
            adapters: one per conditioning, None for the base model, bit for bit.
        """
        before, self.looking = self.looking, tuple(adapters)
        try:
            yield
        finally:
            self.looking = before

    def base_only(self) -> AbstractContextManager[None]:
        """Within the block the model is the base model, for guided predictions of two conditionings as well."""
        return self.predicting(())

    def modules(self, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """The model's modules by path; a model on a second device has its own."""
        if id(model) not in self._modules:
            paths = {path for layers in self.layers for path in layers}
            self._modules[id(model)] = {path: model.get_submodule(path) for path in paths}
        return self._modules[id(model)]

    def cast(self, index: int, like: torch.Tensor, dtype: torch.dtype) -> Mapping[str, LowRank]:
        """Adapter `index` on the device of `like`, in the dtype that the network computes in."""
        key = (index, like.device, dtype)
        if key not in self._cast:
            self._cast[key] = {path: layer.to(like.device, dtype) for path, layer in self.layers[index].items()}
        return self._cast[key]


def blended_prediction(
    executor: Callable[..., torch.Tensor],
    x: torch.Tensor,
    t: torch.Tensor,
    c_concat: torch.Tensor | None = None,
    c_crossattn: torch.Tensor | None = None,
    control: Mapping[str, Any] | None = None,
    transformer_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """x0 of each row of the batch, `base + sum_i (1 - weight_i) (adapted_i - base)`, [rows, C, ...].

    The host's signature of an `APPLY_MODEL` wrapper. With every weight 1 the base model's own output is returned.
    """
    call = Call(executor, (x, t), (c_concat, c_crossattn), control, dict(transformer_options or {}), kwargs)
    run: Run | None = call.options.get(RUN)
    if run is None:
        raise RuntimeError(
            "the model carries UnGuide, and was called outside a sampling run, so no gate has decided; "
            "sample it with a node that uses ComfyUI's guiders (KSampler, SamplerCustom, SamplerCustomAdvanced, ...)"
        )
    if run.looking is not None:
        return _predicted(call, run, run.looking)
    run.asked_for += call.rows
    active = run.active()
    if not active:
        run.evaluated["base"] += call.rows
        return call.plain()
    if any(isinstance(run.weights[i], torch.Tensor) for i in active):
        return _blended_by_sample(call, run, active)
    if len(active) == 1 and run.weights[active[0]] == 0.0:
        run.evaluated["adapted"] += call.rows
        return call.adapted(run, active[0])
    run.evaluated["base"] += call.rows
    run.evaluated["adapted"] += call.rows * len(active)
    base, *adapted = _predictions(call, run, active)
    return blend_many(base, adapted, [run.weights[i] for i in active])


def _predicted(call: Call, run: Run, adapters: Sequence[int | None]) -> torch.Tensor:
    """What a look asks for: each conditioning of the call by the base model or by the adapter meant for it."""
    numbers = call.options.get("cond_or_uncond", (0,))
    chosen = [adapters[number] if adapters else None for number in numbers]
    # packs that tell cond from uncond by this list know no third conditioning
    call = replace(call, options={**call.options, "cond_or_uncond": [0 if adapters else n for n in numbers]})
    adapted = sum(adapter is not None for adapter in chosen) * call.samples
    run.evaluated["adapted"] += adapted
    run.evaluated["base"] += call.rows - adapted
    if not adapted:
        return call.plain()
    if chosen[0] is not None and len(set(chosen)) == 1:
        return call.adapted(run, chosen[0])
    try:
        return call.mixed(run, chosen)
    except NotBatchable:
        parts = [(call.one_of(number), adapter) for number, adapter in enumerate(chosen)]
        return torch.cat([part.plain() if i is None else part.adapted(run, i) for part, i in parts])


def _predictions(call: Call, run: Run, active: Sequence[int]) -> Sequence[torch.Tensor]:
    """The base model's and each active adapter's x0, in one batched forward where memory and layers allow."""
    if run.batchable and call.fits(1 + len(active)):
        try:
            return call.batched(run, active)
        except NotBatchable:
            run.batchable = False
    return [call.plain(), *(call.adapted(run, i) for i in active)]


def _blended_by_sample(call: Call, run: Run, active: Sequence[int]) -> torch.Tensor:
    """The blend where samples differ in weight: an adapter computes only the samples that it acts on.

    The base model's forward is the one of a run without UnGuide, so that samples of weight 1 are its own, bit for bit.
    """
    run.evaluated["base"] += call.rows
    blended = call.plain().clone()
    base = blended.clone()
    for i in active:
        weights = torch.as_tensor(run.weights[i]).to(base).expand(call.samples)
        rows = (weights != 1.0).repeat(call.rows // call.samples).nonzero().flatten()
        run.evaluated["adapted"] += len(rows)
        part = call.only(rows)
        row_weights = weights.repeat(call.rows // call.samples)[rows]
        blended[rows] += blend(base[rows], part.adapted(run, i), row_weights) - base[rows]
    return blended


@dataclass(frozen=True)
class Call:
    """One call of the network, as the host makes it, to be repeated with other rows or other layers."""

    executor: Callable[..., torch.Tensor]
    latent: tuple[torch.Tensor, torch.Tensor]
    conditioning: tuple[torch.Tensor | None, torch.Tensor | None]
    control: Mapping[str, Any] | None
    options: dict[str, Any]
    extra: dict[str, Any]

    @property
    def rows(self) -> int:
        return self.latent[0].shape[0]

    @property
    def samples(self) -> int:
        """Size of the latent batch: the host stacks one batch per conditioning."""
        return self.rows // len(self.options.get("cond_or_uncond", (0,)))

    @property
    def model(self) -> Any:
        return self.executor.class_obj  # type: ignore[attr-defined]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_dtype_inference()

    def plain(self) -> torch.Tensor:
        """The network as it is. The control lists are copied, for the network pops from them."""
        return self.executor(*self.latent, *self.conditioning, _copied(self.control), self.options, **self.extra)

    def adapted(self, run: Run, index: int) -> torch.Tensor:
        """The network with adapter `index`, all rows."""
        options = dict(self.options)
        if options.get("uuids") is not None:
            options["uuids"] = [_derived(u, index) for u in options["uuids"]]
        layers = run.cast(index, self.latent[0], self.dtype)
        with adapted_rows(run.modules(self.model), [(slice(None), layers)], self.rows):
            return self.executor(*self.latent, *self.conditioning, _copied(self.control), options, **self.extra)

    def mixed(self, run: Run, adapters: Sequence[int | None]) -> torch.Tensor:
        """One forward, each conditioning's rows with the adapter given for it."""
        groups = [
            (slice(n * self.samples, (n + 1) * self.samples), run.cast(i, self.latent[0], self.dtype))
            for n, i in enumerate(adapters)
            if i is not None
        ]
        uuids = self.options.get("uuids")
        options = dict(self.options)
        if uuids is not None:
            options["uuids"] = [u if i is None else _derived(u, i) for u, i in zip(uuids, adapters, strict=True)]
        with adapted_rows(run.modules(self.model), groups, self.rows):
            return self.executor(*self.latent, *self.conditioning, _copied(self.control), options, **self.extra)

    def batched(self, run: Run, active: Sequence[int]) -> Sequence[torch.Tensor]:
        """One forward of the rows repeated: as they are, then once for each active adapter."""
        copies = 1 + len(active)
        index = torch.arange(self.rows, device=self.latent[0].device).repeat(copies)

        def again(value: Any) -> Any:
            return _rows_of(value, self.rows, index)

        uuids = self.options.get("uuids")
        options = dict(self.options)
        if uuids is not None:
            options["uuids"] = [*uuids, *(_derived(u, i) for i in active for u in uuids)]
        if "cond_or_uncond" in options:
            options["cond_or_uncond"] = list(options["cond_or_uncond"]) * copies
        groups = [
            (slice(n * self.rows, (n + 1) * self.rows), run.cast(i, self.latent[0], self.dtype))
            for n, i in enumerate(active, start=1)
        ]
        with adapted_rows(run.modules(self.model), groups, self.rows * copies):
            out = self.executor(
                *again(self.latent), *again(self.conditioning), again(self.control), options, **again(self.extra)
            )
        return out.chunk(copies)

    def only(self, rows: torch.Tensor) -> Call:
        """The call for some of its rows: the same samples of every conditioning."""

        def chosen(value: Any) -> Any:
            return _rows_of(value, self.rows, rows)

        return Call(
            self.executor,
            chosen(self.latent),
            chosen(self.conditioning),
            chosen(self.control),
            self.options,
            chosen(self.extra),
        )

    def one_of(self, number: int) -> Call:
        """The call for one of its conditionings."""
        rows = torch.arange(number * self.samples, (number + 1) * self.samples)
        lists = {k: [self.options[k][number]] for k in ("cond_or_uncond", "uuids") if self.options.get(k)}
        return replace(self.only(rows), options={**self.options, **lists})

    def fits(self, copies: int) -> bool:
        """Whether a forward of `copies` times the rows fits, by the host's own estimate and margin."""
        shape = [self.rows * copies, *self.latent[0].shape[1:]]
        free = comfy.model_management.get_free_memory(self.latent[0].device)
        return self.model.memory_required(shape) * 1.5 < free


def is_all(weight: Weight, value: float) -> bool:
    """Whether a weight is a value in every sample."""
    return bool((weight == value).all()) if isinstance(weight, torch.Tensor) else weight == value


def _derived(own: uuid.UUID, index: int) -> uuid.UUID:
    """Another uuid for an adapter's rows, so that caches that other packs key by uuid do not mix."""
    return uuid.uuid5(own, f"unguide {index}")


def _copied(value: Any) -> Any:
    """Containers copied all the way down, tensors shared."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _rows_of(value: Any, rows: int, index: torch.Tensor) -> Any:
    """Every tensor of `rows` rows in a structure indexed by row, other values as they are; containers are copied."""
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or (value.shape[0] == 1 and rows != 1):
            return value
        if value.shape[0] != rows:
            raise NotBatchable(f"a conditioning has {value.shape[0]} rows, and the batch has {rows}")
        return value[index.to(value.device)]
    if isinstance(value, dict):
        return {key: _rows_of(item, rows, index) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rows_of(item, rows, index) for item in value)
    return value
