"""The pack's own wire types, and inputs that several nodes share."""

import dataclasses
from typing import Any

from comfy_api.latest import io

from ..unguide_comfy.deciding import CHOICES, ProbeSettings
from ..unguide_comfy.displacing import DISPLACEMENTS
from ..unguide_comfy.gating import ON_DETECTION, Gate
from ..unguide_comfy.outcomes import MODES
from ..unguide_core.probe import POLICIES

CATEGORY = "UnGuide"

ErasureLoraWire = io.Custom("ERASURE_LORA")
DecisionWire = io.Custom("UNGUIDE_DECISION")

DEFAULTS = ProbeSettings()
GATE = Gate()


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
        default=GATE.mode,
        tooltip="trajectory: looks at the picture's own first steps and decides for each picture of a batch; nearly "
        "free. probe: decides per prompt, before the first step. official: as the paper's code does, its schedule and "
        "weights (-1, 2) included; slow. fixed: always uses weight_detected.",
    )


def gate_inputs() -> list[Any]:
    return [
        advanced(
            io.Combo,
            "on_detection",
            options=list(ON_DETECTION),
            default=GATE.on_detection,
            tooltip="In the gate mode 'trajectory', when the concept is found: continue erasing from that step on, "
            "or restart the picture from the first step.",
        ),
        advanced(
            io.Int,
            "look_again",
            default=GATE.look_again,
            min=0,
            max=1000,
            tooltip="In the gate mode 'trajectory', steps after which to look again where nothing was found, for "
            "concepts that show up late. One evaluation each; 0 looks once.",
        ),
        advanced(
            io.Boolean,
            "low_memory",
            default=GATE.low_memory,
            tooltip="Compute base and adapted predictions one after the other. They share a forward only where memory "
            "allows anyway; this forbids it.",
        ),
        advanced(
            io.Combo,
            "displacement",
            options=list(DISPLACEMENTS),
            default=GATE.displacement,
            tooltip="What erases. prompt: what the LoRA does to the prompt itself. concept: what it does to the "
            "concept's own prompt, against text that was optimised to get past the LoRA; two more evaluations a step "
            "where the concept is found. Best with the statistic 'either'.",
        ),
    ]


def gate_from(
    options: dict[str, Any], neutral: Any, weight_detected: float, weight_otherwise: float, gate_mode: str
) -> Gate:
    """The gate that a node's inputs describe; API clients may leave out the advanced ones."""
    own = ("on_detection", "look_again", "low_memory", "displacement")
    of_gate = {name: options.pop(name) for name in own if name in options}
    settings = ProbeSettings(weight_detected=weight_detected, weight_otherwise=weight_otherwise, **options)
    return Gate(gate_mode, settings, neutral, **of_gate)


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
            options=list(CHOICES),
            default=DEFAULTS.statistic,
            tooltip="What decides. influence: the LoRA's effect on the prompt relative to its effect on the concept. "
            "patch: the same where it is strongest. alignment: does the prompt pull the picture where the concept's "
            "own prompt pulls it. either: influence or alignment, against text that was optimised to hide the concept. "
            "paper: the effect against that on the neutral prompt. auto: influence where the LoRA's card is calibrated "
            "and says that it misses less, else alignment.",
        ),
        advanced(
            io.Float,
            "threshold",
            default=DEFAULTS.threshold,
            min=0.0,
            max=100.0,
            step=0.01,
            tooltip="Score from which on the concept counts as found. 0 takes that of the LoRA card's calibration, or "
            "the statistic's default.",
        ),
        advanced(
            io.Int,
            "repeats",
            default=DEFAULTS.repeats,
            min=1,
            max=64,
            tooltip="Noise seeds that the modes 'probe' and 'official' average over, computed as one batch. More is "
            "steadier and slower.",
        ),
        advanced(
            io.Int,
            "probe_steps",
            default=DEFAULTS.probe_steps,
            min=1,
            max=999,
            tooltip="Denoising steps before the look, of schedule_steps: at this noise level. About a tenth of the "
            "schedule is enough.",
        ),
        advanced(
            io.Int,
            "schedule_steps",
            default=DEFAULTS.schedule_steps,
            min=2,
            max=1000,
            tooltip="Steps of the schedule that probe_steps are the first of; your sampler may take any other number.",
        ),
        advanced(
            io.Combo,
            "policy",
            options=list(POLICIES),
            default=DEFAULTS.policy,
            tooltip="binary: one of the two weights. smooth: from weight_otherwise at the threshold to weight_detected "
            "where the detection is beyond doubt.",
        ),
        advanced(
            io.Float,
            "false_alarm_rate",
            default=DEFAULTS.false_alarm_rate,
            min=0.001,
            max=0.3,
            step=0.001,
            tooltip="Share of unrelated prompts that may be taken for the concept, where the LoRA's card is "
            "calibrated. Higher finds more.",
        ),
    ]
