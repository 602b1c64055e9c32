"""UnGuide Settings."""

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..unguide_comfy.probe.settings import CHECK_IMAGE, CHOICES, DECIDE, ON_DETECTION, Settings
from .wires import SettingsWire, advanced, schema

DEFAULTS = Settings()


class UnGuideSettings(io.ComfyNode):
    """Everything about how a gate decides, on one wire."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnGuideSettings",
            display_name="UnGuide Settings",
            description="How the gate decides whether a prompt asks for the erased concept, and what follows. You do "
            "not need this node to start with: without it, UnGuide uses these defaults.",
            search_aliases=["unguide options", "threshold", "false positive rate", "gate settings"],
            inputs=[
                io.Combo.Input(
                    "decide",
                    options=list(DECIDE),
                    default=DEFAULTS.decide,
                    tooltip="A calibrated LoRA's text stage decides most prompts first, at no cost. What it leaves "
                    "open is decided, during sampling: at an early step of the image itself, separately for each "
                    "image of a batch, at one model evaluation; before sampling: once per prompt, at about a dozen "
                    "evaluations. as the paper: the research code's schedule, probe and weights (-1, 2); slow. "
                    "always erase: no gate.",
                ),
                io.Boolean.Input(
                    "resist_adversarial",
                    default=DEFAULTS.resist_adversarial,
                    tooltip="Detects by two statistics and erases with the LoRA's change on the concept's own prompt, "
                    "against text that was optimised to get past the LoRA. Costs one more model evaluation, and two "
                    "more per step where the concept is detected.",
                ),
                io.Combo.Input(
                    "on_detection",
                    options=list(ON_DETECTION),
                    default=DEFAULTS.on_detection,
                    tooltip="When the concept is detected during sampling. continue: erase from that step on. restart: "
                    "generate the image again from its first step. automatic: restart only where continuing would "
                    "leave the concept's silhouette, as with few steps.",
                ),
                io.Combo.Input(
                    "check_image",
                    options=list(CHECK_IMAGE),
                    default=DEFAULTS.check_image,
                    tooltip="Whether the gate also reads the image itself, where the LoRA is calibrated: a start "
                    "image or chosen noise can bring a concept that no prompt names. automatic: reads a start image "
                    "at one model evaluation, and the image late in the run where that is free. always: reads the "
                    "image at one more evaluation where it is not free. never: reads it with resist_adversarial alone.",
                ),
                io.Float.Input(
                    "false_positive_rate",
                    default=DEFAULTS.false_positive_rate,
                    min=0.001,
                    max=0.3,
                    step=0.001,
                    tooltip="Share of unrelated images that may be taken for a concept, for all calibrated LoRAs on "
                    "the model together. Raise it to detect more.",
                ),
                advanced(
                    io.Combo,
                    "statistic",
                    options=list(CHOICES),
                    default=DEFAULTS.statistic,
                    tooltip="What decides. influence: the LoRA's effect on the prompt, relative to its effect on the "
                    "concept. alignment: how far the prompt pulls the image in the direction of the concept's own. "
                    "paper: the effect, compared with that on the empty prompt. automatic: the best that inputs and "
                    "calibration allow.",
                ),
                advanced(
                    io.String,
                    "threshold",
                    default="",
                    tooltip="Score from which on the concept counts as detected, such as 0.5. Empty: automatic, from "
                    "the LoRA's calibration or the statistic's default.",
                ),
                advanced(
                    io.Int,
                    "recheck_every",
                    default=DEFAULTS.recheck_every,
                    min=0,
                    max=1000,
                    tooltip="Steps after which to probe again where nothing was detected, for concepts that appear "
                    "late. One model evaluation each; 0 probes once.",
                ),
                advanced(
                    io.Float,
                    "weight_detected",
                    default=DEFAULTS.weight_detected,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="The base model's weight in the blend where the concept is detected. 0: the erasure LoRA "
                    "alone. Below 0: past the LoRA, at twice the evaluations; strength 2 in Load Erasure LoRA does "
                    "nearly the same in one pass.",
                ),
                advanced(
                    io.Float,
                    "weight_otherwise",
                    default=DEFAULTS.weight_otherwise,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="The base model's weight where the concept is not detected. 1: the base model's own image, "
                    "bit for bit, at no extra cost. The paper uses 2, which changes unrelated images.",
                ),
                advanced(
                    io.Int,
                    "probe_steps",
                    default=DEFAULTS.probe_steps,
                    min=1,
                    max=999,
                    tooltip="Where the gate probes: at the noise level after so many of probe_schedule_steps. About a "
                    "tenth of the schedule is enough.",
                ),
                advanced(
                    io.Int,
                    "probe_schedule_steps",
                    default=DEFAULTS.probe_schedule_steps,
                    min=2,
                    max=1000,
                    tooltip="Steps of the schedule that probe_steps counts in. It is not the sampler's number of "
                    "steps, which may be any other.",
                ),
                advanced(
                    io.Int,
                    "repeats",
                    default=DEFAULTS.repeats,
                    min=1,
                    max=64,
                    tooltip="Noise seeds that a probe before sampling averages over, in one batch. More is steadier "
                    "and slower.",
                ),
                advanced(
                    io.Boolean,
                    "low_memory",
                    default=DEFAULTS.low_memory,
                    tooltip="Computes base and adapted predictions one after the other, and never in one batch. "
                    "Without it they share a batch where memory allows.",
                ),
                io.Conditioning.Input(
                    "neutral",
                    optional=True,
                    tooltip="The neutral prompt that the probe compares with: an encoded empty prompt (not "
                    "ConditioningZeroOut). Not needed when Load Erasure LoRA has a CLIP.",
                ),
            ],
            outputs=[
                SettingsWire.Output(
                    display_name="settings", tooltip="For UnGuide, UnGuide Sampler and Stability Probe."
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        decide: str = DEFAULTS.decide,
        resist_adversarial: bool = DEFAULTS.resist_adversarial,
        statistic: str = DEFAULTS.statistic,
        threshold: str = "",
        probe_steps: int = DEFAULTS.probe_steps,
        probe_schedule_steps: int = DEFAULTS.probe_schedule_steps,
    ) -> bool | str:
        """Refuse before anything runs what `Settings` refuses; an input that is linked comes as None."""
        given: dict[str, Any] = {
            "decide": decide,
            "resist_adversarial": resist_adversarial,
            "statistic": statistic,
            "threshold": threshold,
            "probe_steps": probe_steps,
            "probe_schedule_steps": probe_schedule_steps,
        }
        try:
            cls.execute(**{name: value for name, value in given.items() if value is not None})
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, threshold: str = "", **options: Any) -> io.NodeOutput:
        return io.NodeOutput(replace(Settings(**options), threshold=_number(threshold)))


def _number(threshold: str) -> float | None:
    """The threshold as a number, None for an empty text."""
    if not threshold.strip():
        return None
    try:
        return float(threshold)
    except ValueError:
        raise ValueError(f"threshold is {threshold!r}; expected a number such as 0.5, or nothing") from None


NODES = [UnGuideSettings]
