"""The blend in the host: a wrapper around every call of the network (`WrappersMP.APPLY_MODEL`).

Classifier-free guidance is linear and the weights of a blend sum to 1, so blending every row before guidance equals
blending the two guided results, under any sampler and any guider. The wrapper does not know the gate: it reads the
weights from the `Run` in the transformer options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ...unguide_core.guidance import blend, blend_many
from ..lora.inject import NotBatchable
from ..model.key import OURS
from .forward import Call
from .state import RUN, Run

WRAPPERS = (
    WrappersMP.APPLY_MODEL,
    WrappersMP.CALC_COND_BATCH,
    WrappersMP.PREDICT_NOISE,
    WrappersMP.SAMPLER_SAMPLE,
)


def bare(patcher: Any) -> Any:
    """Return a clone of a `ModelPatcher` without this pack's wrappers."""
    clone = patcher.clone()
    for kind in WRAPPERS:
        clone.remove_wrappers_with_key(kind, OURS)
    return clone


def blending(patcher: Any) -> Any:
    """Return a clone of a `ModelPatcher` that blends, and has no other wrapper of this pack."""
    clone = bare(patcher)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, OURS, blended_prediction)
    return clone


def carrying(extra_args: Mapping[str, Any], **carried: Any) -> dict[str, Any]:
    """Return a copy of a sampling function's `extra_args` whose transformer options hold `carried` as well."""
    options = extra_args["model_options"]
    return {
        **extra_args,
        "model_options": {**options, "transformer_options": {**options.get("transformer_options", {}), **carried}},
    }


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
    """Return x0 of each row, `base + sum_i (1 - weight_i) (adapted_i - base)`, [rows, C, ...].

    With every weight 1 that is the base model's own output. The host's signature of an `APPLY_MODEL` wrapper.
    """
    options = dict(transformer_options or {})
    run: Run | None = options.get(RUN)
    if run is None:
        raise RuntimeError(
            "the model has UnGuide on it and was called outside a sampling run, so that no gate has decided; sample it "
            "with a node that uses ComfyUI's guiders (KSampler, SamplerCustom, SamplerCustomAdvanced, ...)"
        )
    call = Call(executor, (x, t, c_concat, c_crossattn), control, options, kwargs, run)
    if run.predicting is not None:
        return _unblended(call, run.predicting)
    run.evaluations.ask(len(x))
    active = run.active()
    if not active:
        if run.features is not None:
            return call.forward(call.whole(None))
        run.evaluations.count(len(x), adapted=0)  # nothing to change or to read: the host's own call, as it is
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    weights = [run.weights[i] for i in active]
    if any(isinstance(weight, torch.Tensor) for weight in weights):
        return _blended_by_sample(call, active)
    if weights == [0.0]:
        return call.forward(call.whole(active[0]))
    base, *adapted = _stacked(call, [None, *active])
    return blend_many(base, adapted, weights)


def _unblended(call: Call, adapters: Sequence[int | None]) -> torch.Tensor:
    """What a probe asks for: each conditioning of the call by the base model or by the adapter given for it."""
    numbers = call.options.get("cond_or_uncond", (0,))
    if not adapters:
        return call.forward(call.whole(None))
    # packs that tell cond from uncond by this list know no third conditioning
    call.options["cond_or_uncond"] = [0] * len(numbers)
    groups = [(place, adapters[number]) for place, number in enumerate(numbers)]
    return torch.cat(call.forward_each(groups))


def _stacked(call: Call, adapters: Sequence[int | None]) -> list[torch.Tensor]:
    """The whole call's x0 by each adapter, [rows, C, ...] each."""
    parts = call.forward_each([group for adapter in adapters for group in call.whole(adapter)])
    return [torch.cat(parts[i : i + call.conds]) for i in range(0, len(parts), call.conds)]


def _blended_by_sample(call: Call, active: Sequence[int]) -> torch.Tensor:
    """The blend where samples differ in weight: an adapter computes only the samples on which it acts.

    The base model's forward is that of a run without UnGuide, so samples of weight 1 are the base model's, bit for bit.
    """
    blended = call.forward(call.whole(None)).clone()
    base = blended.clone()
    for i in active:
        weights = torch.as_tensor(call.run.weights[i]).to(base).expand(call.samples)
        samples = (weights != 1.0).nonzero().flatten()
        rows = torch.cat([cond * call.samples + samples for cond in range(call.conds)])
        try:
            adapted = call.forward(call.whole(i), samples)
        except NotBatchable:  # a conditioning that cannot be cut into samples: compute them all
            adapted = call.forward(call.whole(i))[rows]
        row_weights = weights[samples].repeat(call.conds)
        blended[rows] += blend(base[rows], adapted, row_weights) - base[rows]
    return blended
