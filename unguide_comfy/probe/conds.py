"""A sampling run of the host and its conditionings: which prompts act on the image, and another prompt in their place.

This module knows what the host keeps in a processed conditioning. It knows neither adapters nor statistics.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch

from ..blend.state import Run
from ..lora.load import Conditioning

Entry = dict[str, Any]
"""One processed conditioning of the host: text states, where and when they act, ControlNet and the like."""

_WHERE = ("area", "mask", "mask_strength", "strength", "set_area_to_bounds", "default")
_WHEN = ("timestep_start", "timestep_end", "start_percent", "end_percent", "clip_start_percent", "clip_end_percent")
_REGION = frozenset((*_WHERE, *_WHEN))
_TEXT = frozenset(("cross_attn", "pooled_output", "model_conds", "uuid"))
_NEGATIVE = ("negative", "empty_negative_prompt")
"""Where guiders keep what they guide away from; the second is PerpNeg's."""


@dataclass(frozen=True)
class Context:
    """A sampling run of the host, in the middle of which predictions are made.

    Args:
        guider: the host's guider, its conditionings processed and its model loaded.
        run: the state that the blend reads.
        model_options: the sampling function's, with `run` in their transformer options.
        model_key: of the model with its patches, see `model.key`.
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
        """Where the model computes."""
        return self.guider.model_patcher.load_device

    @property
    def model(self) -> Any:
        """The host's `BaseModel`."""
        return self.guider.inner_model

    @property
    def cfg(self) -> float | None:
        """The guidance scale, None where the guider has none."""
        scale = getattr(self.guider, "cfg", None)
        return None if scale is None else float(scale)

    @property
    def prompt(self) -> list[Entry]:
        """The entries of all prompts that the guider pulls the image towards.

        Those are all but the negative ones. Guidance with a scale below 1 pulls towards the negative prompts, too, and
        with a scale of 0 towards those alone.

        Raises: ValueError if there are none.
        """
        conds = self.guider.conds
        keys = [key for key in conds if key not in _NEGATIVE]
        if pulled := [key for key in _NEGATIVE if conds.get(key) and self._pulls_to(key)]:
            keys = [*pulled, *(key for key in keys if self.cfg != 0.0 or key != "positive")]
        entries = [entry for key in keys for entry in conds[key]]
        if not entries:
            raise ValueError(
                f"the guider {type(self.guider).__name__} has no positive conditioning to probe; use a guider with one "
                "(CFGGuider, BasicGuider, DualCFGGuider, ...), or let UnGuide Settings always erase"
            )
        return entries

    def _pulls_to(self, negative: str) -> bool:
        """Whether a negative prompt's share of the guided prediction may be above 0."""
        scale = getattr(self.guider, "cfg2", self.cfg)  # DualCFGGuider's, and everybody else's
        away = float(getattr(self.guider, "neg_scale", 0.0))  # PerpNegGuider's, from "negative" alone
        return (scale is not None and scale < 1.0) or (negative == "negative" and away < 0.0)

    @property
    def negative(self) -> list[Entry]:
        """The entries of the negative prompt."""
        return self.guider.conds.get("negative") or []

    def retargeted(self, entry: Entry, conditioning: Conditioning, latent: torch.Tensor, seed: int) -> list[Entry]:
        """Return a processed entry with another prompt: the same ControlNet and the like, everywhere and always."""
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


def everywhere(entry: Entry) -> Entry:
    """Return a processed entry without its area, mask, strength and time range: what its prompt does everywhere."""
    return {name: value for name, value in entry.items() if name not in _REGION}


def is_everywhere(entries: Sequence[Entry] | None) -> bool:
    """Return whether entries are a single one that acts everywhere, at all times, at its full strength."""
    return entries is not None and len(entries) == 1 and not any(name in entries[0] for name in _REGION)


def besides_text(entry: Entry) -> tuple[int, ...]:
    """Return what identifies an entry apart from its text, place and time: ControlNet and the like."""
    return tuple(id(value) for name, value in sorted(entry.items()) if name not in _REGION | _TEXT)


def same_text(entry: Entry, conditioning: Conditioning) -> bool:
    """Return whether an entry has the text of a conditioning."""
    text = entry.get("cross_attn")
    if len(conditioning) != 1 or text is None or conditioning[0][0] is None:
        return False
    other, options = conditioning[0]
    pooled, other_pooled = entry.get("pooled_output"), options.get("pooled_output")
    same_pooled = pooled is other_pooled or (
        pooled is not None and other_pooled is not None and torch.equal(pooled.cpu(), other_pooled.cpu())
    )
    return same_pooled and text.shape == other.shape and torch.equal(text.cpu(), other.cpu())


def digest(value: Any) -> str | None:
    """Return a sha256 of everything that entries hold, or None where they hold an object (ControlNet, hooks, ...)."""
    found = hashlib.sha256()
    for part in _parts(value):
        if part is None:
            return None
        found.update(part)
    return found.hexdigest()


def _parts(value: Any) -> Iterator[bytes | None]:
    """The bytes of plain values, tensors and containers of them; None for anything else."""
    value = getattr(value, "cond", value)  # the host wraps what the network reads
    if isinstance(value, torch.Tensor):
        yield f"{tuple(value.shape)}".encode()
        yield value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    elif isinstance(value, Mapping):
        for name, item in sorted(value.items(), key=lambda pair: str(pair[0])):
            if name != "uuid":
                yield f"{name}=".encode()
                yield from _parts(item)
    elif isinstance(value, list | tuple):
        yield f"{len(value)}:".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode() if value is None or isinstance(value, bool | int | float | str) else None
