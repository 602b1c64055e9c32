"""The pack's own wire types, and inputs that several nodes share."""

import dataclasses
from typing import Any

from comfy_api.latest import io

from ..unguide_comfy.gating import CONTINUE, MODES, ON_DETECTION, PROBE
from ..unguide_comfy.looking import AUTO, ProbeSettings
from ..unguide_core.probe import STATISTICS

CATEGORY = "UnGuide"

ErasureLoraWire = io.Custom("ERASURE_LORA")
DecisionWire = io.Custom("UNGUIDE_DECISION")

DEFAULTS = ProbeSettings()


def schema(**fields: Any) -> io.Schema:
    """A schema without the fields that this version of the host does not know (`search_aliases` before 0.4)."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(category=CATEGORY, **{name: value for name, value in fields.items() if name in known})


def advanced(kind: Any, name: str, **options: Any) -> Any:
    """An input behind the node's advanced section, where this version of the host has one."""
    try:
        return kind.Input(name, advanced=True, **options)
    except TypeError:
        return kind.Input(name, **options)


def erasure_lora_input() -> Any:
    return ErasureLoraWire.Input(
        "erasure_lora",
        tooltip="The erasure LoRA, or a stack of them, from Load Erasure LoRA. Do not apply it with a LoRA loader.",
    )


def neutral_input() -> Any:
    return io.Conditioning.Input(
        "neutral",
        optional=True,
        tooltip="The neutral prompt that the probe compares with: an encoded empty prompt (not ConditioningZeroOut). "
        "Not needed when Load Erasure LoRA has a CLIP.",
    )


def gate_mode_input() -> Any:
    return io.Combo.Input(
        "gate_mode",
        options=list(MODES),
        default=PROBE,
        tooltip="probe: decides per prompt, before the first step. trajectory: looks at the picture's own first steps "
        "and decides for each picture of a batch; nearly free. fixed: always uses weight_detected.",
    )


def on_detection_input() -> Any:
    return advanced(
        io.Combo,
        "on_detection",
        options=list(ON_DETECTION),
        default=CONTINUE,
        tooltip="In the gate mode 'trajectory', when the concept is found: continue erasing from the next step on, or "
        "restart the picture from the first step.",
    )


def weight_inputs() -> list[Any]:
    return [
        io.Float.Input(
            "weight_detected",
            default=DEFAULTS.weight_detected,
            min=-4.0,
            max=4.0,
            step=0.05,
            tooltip="The base model's weight when the concept is found, and always in the mode 'fixed'. 0: the erasure "
            "LoRA alone. Below 0: away from the base model, past the LoRA. 1: the base model.",
        ),
        io.Float.Input(
            "weight_otherwise",
            default=DEFAULTS.weight_otherwise,
            min=-4.0,
            max=4.0,
            step=0.05,
            tooltip="The base model's weight when the concept is not found. 1 gives the base model's own picture, bit "
            "for bit, at no extra cost. The paper uses 2, which changes unrelated pictures.",
        ),
    ]


def probe_inputs() -> list[Any]:
    return [
        advanced(
            io.Combo,
            "statistic",
            options=[AUTO, *STATISTICS],
            default=DEFAULTS.statistic,
            tooltip="What decides. alignment: does the prompt pull the picture where the concept's own prompt pulls "
            "it. influence: the LoRA's effect on the prompt relative to its effect on the concept. paper: its effect "
            "against that on the neutral prompt. auto: alignment or influence, whichever finds it, as far as inputs "
            "and card allow.",
        ),
        advanced(
            io.Float,
            "threshold",
            default=DEFAULTS.threshold,
            min=0.0,
            max=100.0,
            step=0.01,
            tooltip="Score from which on the concept counts as found. 0 takes the LoRA card's own, or the statistic's "
            "default, which was measured over ten concepts.",
        ),
        advanced(
            io.Int,
            "repeats",
            default=DEFAULTS.repeats,
            min=1,
            max=64,
            tooltip="Noise seeds that the probe averages over, computed as one batch. More is steadier and slower.",
        ),
        advanced(
            io.Int,
            "probe_steps",
            default=DEFAULTS.probe_steps,
            min=1,
            max=999,
            tooltip="Denoising steps before the probe looks. About a tenth of the schedule is enough.",
        ),
        advanced(
            io.Int,
            "schedule_steps",
            default=DEFAULTS.schedule_steps,
            min=2,
            max=1000,
            tooltip="Steps of the probe's own schedule, of which it takes the first probe_steps.",
        ),
    ]
