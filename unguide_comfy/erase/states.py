"""Text states from the host's CLIP, and the moments of the prompts to keep, which any number of concepts share."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ...unguide_core.text_edit import Kept
from ..lora.load import Conditioning, encoder
from ..report.progress import say

_CACHED = 2
_PROBES = ("", "a photo of the cat, in the style of a painting")
_memory: OrderedDict[str, Known] = OrderedDict()


@dataclass(frozen=True)
class Known:
    """What one text encoder makes of prompts that all concepts share.

    Args:
        kept: the moments of the prompts to keep.
        others: other prompts, encoded, to measure false positives with.
    """

    kept: Kept
    others: Mapping[str, Conditioning]


class States:
    """A CLIP as `unguide_core.text_edit.Encode`, with progress on the node.

    Args:
        clip: the host's `CLIP`, with its patches.
    """

    def __init__(self, clip: Any):
        self.encode = encoder(clip)
        self.count = 0

    def __call__(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a prompt's states [tokens, width], and its pooled state, None where the encoder has none."""
        return states_of(self.conditioning(prompt))

    def conditioning(self, prompt: str) -> Conditioning:
        """Return an encoded prompt."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.count += 1
        return self.encode(prompt)


def states_of(conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the states in an encoded prompt. Raises: ValueError if it is a combination of several."""
    if len(conditioning) != 1:
        raise ValueError(
            f"the CLIP encodes a prompt into {len(conditioning)} parts; expected one: remove its scheduled hooks"
        )
    [(states, options)] = conditioning
    pooled = options.get("pooled_output")
    return states[0], None if pooled is None else pooled[0]


def known_states(states: States, kept: Sequence[str], others: Sequence[str]) -> Known:
    """Return what is known of prompts, from memory if the same text encoder has encoded them already."""
    digest = hashlib.sha256("\n".join((*kept, "", *others)).encode())
    for probe in _PROBES:
        digest.update(states(probe)[0].float().cpu().numpy().tobytes())
    key = digest.hexdigest()
    if key not in _memory:
        say(f"Encoding {len(kept) + len(others)} prompts, once for this text encoder")
        bar = comfy.utils.ProgressBar(len(kept) + len(others))

        def shown(prompt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
            bar.update(1)
            return states(prompt)

        encoded = {prompt: states.conditioning(prompt) for prompt in others}
        bar.update(len(others))
        _memory[key] = Known(Kept.of(kept, shown), encoded)
        while len(_memory) > _CACHED:
            _memory.popitem(last=False)
    _memory.move_to_end(key)
    return _memory[key]
