"""The pack's own wire types, and inputs that several nodes share."""

import dataclasses
from typing import Any

from comfy_api.latest import io, ui

from ..unguide_comfy.report.text import Line

CATEGORY = "UnGuide"

ErasureLoraWire = io.Custom("ERASURE_LORA")
SettingsWire = io.Custom("UNGUIDE_SETTINGS")
DecisionWire = io.Custom("UNGUIDE_DECISION")


def schema(**fields: Any) -> io.Schema:
    """A schema without the fields that this version of the host does not know (`search_aliases` before 0.4)."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(category=CATEGORY, **{name: value for name, value in fields.items() if name in known})


def advanced(kind: Any, name: str, **options: Any) -> Any:
    """An input in the node's advanced section, where this version of the host has one."""
    try:
        return kind.Input(name, advanced=True, **options)
    except TypeError:
        return kind.Input(name, **options)


def shown(node: Any, plot: Any, line: Line) -> dict[str, Any]:
    """What a node shows after a run: the plot as a preview, and the verdict for the page's badge."""
    return {**ui.PreviewImage(plot, cls=node).as_dict(), "unguide_verdict": [dataclasses.asdict(line)]}


def erasure_lora_input() -> Any:
    """The erasure LoRAs that a node works with."""
    return ErasureLoraWire.Input(
        "erasure_lora",
        tooltip="The erasure LoRA, or a stack of them. Do not apply its file with a LoRA loader as well.",
    )


def settings_input() -> Any:
    """How the gate decides; the defaults are right for most uses."""
    return SettingsWire.Input(
        "settings",
        optional=True,
        tooltip="How the gate decides, from UnGuide Settings. Not connected: the defaults, which suit most uses.",
    )
