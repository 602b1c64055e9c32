"""A sampling run of the host, and its conditionings: which prompt acts where, and another prompt in its place.

Knows what the host keeps in a processed conditioning; neither adapters nor what is measured.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch

from .blending import RUN, Run
from .erasure import Conditioning

Entry = dict[str, Any]

# what says where and when a conditioning acts, and what it says; the rest (ControlNet, ...) is kept for comparison
_WHERE = ("area", "mask", "mask_strength", "strength", "set_area_to_bounds", "default")
_WHEN = ("timestep_start", "timestep_end", "start_percent", "end_percent", "clip_start_percent", "clip_end_percent")
_REGION = frozenset((*_WHERE, *_WHEN))
_TEXT = frozenset(("cross_attn", "pooled_output", "model_conds", "uuid"))


@dataclass(frozen=True)
class Context:
    """A sampling run of the host, in the middle of which to look.

    Args:
        guider: the host's guider (its conds processed, its model loaded).
        run: the state that the blending wrapper reads; evaluations are counted there.
        model_options: the sampling function's, `run` in their transformer options.
        model_key: of the model with its patches, see `identity.model_key`.
        latent_image, denoise_mask: the run's, for models that take them as conditioning.
    """

    guider: Any
    run: Run
    model_options: dict[str, Any]
    model_key: str
    latent_image: torch.Tensor | None = None
    denoise_mask: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.guider.model_patcher.load_device

    @property
    def model(self) -> Any:
        return self.guider.inner_model

    @property
    def cfg(self) -> float | None:
        """The guidance scale; None where the guider has no single one."""
        scale = getattr(self.guider, "cfg", None)
        return None if scale is None else float(scale)

    @property
    def prompt(self) -> list[Entry]:
        """All entries of the prompt; guiders with a second one (DualCFGGuider) keep it under another key.

        Raises: ValueError if the guider has none.
        """
        conds = getattr(self.guider, "conds", {})
        entries = [entry for key in conds if key != "negative" for entry in conds[key]]
        if not entries:
            raise ValueError(
                f"the guider {type(self.guider).__name__} has no positive conditioning to probe; use a guider with one "
                "(CFGGuider, BasicGuider, DualCFGGuider, ...), or the gate mode 'fixed'"
            )
        return entries

    @property
    def negative(self) -> list[Entry]:
        return self.guider.conds.get("negative") or []

    def retargeted(self, entry: Entry, conditioning: Conditioning, latent: torch.Tensor, seed: int) -> list[Entry]:
        """A processed entry with another prompt: the same ControlNet and the like, everywhere and at all times."""
        kept = {name: value for name, value in entry.items() if name not in _REGION | _TEXT}
        others = [
            {
                **kept,
                **options,
                **({} if text is None else {"cross_attn": text}),
                "model_conds": {},
                "uuid": uuid.uuid4(),
            }
            for text, options in conditioning
        ]
        return comfy.samplers.encode_model_conds(
            self.model.extra_conds,
            others,
            latent,
            self.device,
            "positive",
            latent_image=self.latent_image,
            denoise_mask=self.denoise_mask,
            seed=seed,
        )


def carrying(extra_args: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Copies of a sampling function's `extra_args` whose transformer options carry the run."""
    options = extra_args["model_options"]
    return {
        **extra_args,
        "model_options": {**options, "transformer_options": {**options.get("transformer_options", {}), RUN: run}},
    }


def everywhere(entry: Entry) -> Entry:
    """A processed entry without its area, mask, strength and time range: what its prompt does to the whole picture."""
    return {name: value for name, value in entry.items() if name not in _REGION}


def is_everywhere(entries: Sequence[Entry] | None) -> bool:
    """Whether entries are a single one that acts on the whole picture, at all times, with its full strength."""
    return entries is not None and len(entries) == 1 and not any(name in entries[0] for name in _REGION)


def besides_text(entry: Entry) -> tuple[int, ...]:
    """Identifies what an entry has besides its text, place and time: ControlNet and the like."""
    return tuple(id(value) for name, value in sorted(entry.items()) if name not in _REGION | _TEXT)


def same_text(entry: Entry, conditioning: Conditioning) -> bool:
    """Whether an entry says what a conditioning says."""
    text = entry.get("cross_attn")
    if len(conditioning) != 1 or text is None or conditioning[0][0] is None:
        return False
    other, options = conditioning[0]
    pooled, other_pooled = entry.get("pooled_output"), options.get("pooled_output")
    same_pooled = pooled is other_pooled or (
        pooled is not None and other_pooled is not None and torch.equal(pooled.cpu(), other_pooled.cpu())
    )
    return same_pooled and text.shape == other.shape and torch.equal(text.cpu(), other.cpu())
