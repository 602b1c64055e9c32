"""One sampling run under the policy: the pack's own gate, silent, logged, and never without a decision.

It does not know which models and graphs are guarded; `guard` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ..unguide_comfy.gate.attach import GatedSampling
from ..unguide_comfy.gate.gate import Branch
from ..unguide_comfy.model.key import OURS
from ..unguide_comfy.probe.conds import Context, Entry
from ..unguide_comfy.probe.settings import ALWAYS
from ..unguide_comfy.report.records import Cost, Verdict
from .log import Log
from .policy import BLANK, ERASE, REFUSE, Policy, PolicyAdapter
from .refusal import Refused, is_ours, named

NONE = "none"

PLAIN = {
    ("CFGGuider", "samplers.py"),
    ("Guider_Basic", "nodes_custom_sampler.py"),
    ("Guider_DualCFG", "nodes_custom_sampler.py"),
    ("Guider_DualModel", "nodes_custom_sampler.py"),
    ("Guider_PerpNeg", "nodes_perpneg.py"),
}
"""The host's guiders that lead away from a negative prompt at scales of 1 and more: their classes' names and files."""


class PolicyContext(Context):
    """A run in which the negative prompt is probed, too, where it is not certain that guidance leads away from it."""

    @property
    def prompt(self) -> list[Entry]:
        """The entries of all prompts that may act on the image."""
        prompt = super().prompt
        if named(self.guider) in PLAIN and not any(_guidance_patches(self.model_options)):
            return prompt
        known = {id(entry) for entry in prompt}
        every = (entry for entries in self.guider.conds.values() for entry in entries or ())
        return [*prompt, *(entry for entry in every if id(entry) not in known)]


def _guidance_patches(options: dict[str, Any]) -> list[Any]:
    """What nodes have put into guidance: functions, and wrappers that may change its scale."""
    functions = [options.get(name) for name in ("sampler_cfg_function", "sampler_calc_cond_batch_function")]
    lists = [options.get(name, []) for name in ("sampler_pre_cfg_function", "sampler_post_cfg_function")]
    wrappers = options.get("transformer_options", {}).get("wrappers", {}).get(WrappersMP.PREDICT_NOISE, {})
    others = [found for key, found in wrappers.items() if key != OURS]
    return [each for each in (*functions, *lists, *others) if each]


class PolicySampling(GatedSampling):
    """A run with the policy's erasure LoRAs first, then the client's.

    Args:
        policy, log: what follows from a detection, and where it is written down.
        model: the listed model's name.
        adapters: of the policy, one per branch of `ours`.
        theirs: the client's own branches. Those with an adapter of the policy fall away, whatever their weights; their
            reports say what the policy's did.
        client: the client's `GatedSampling`, which observes the run; None without one.
        reason: why the model is not the plain one; None if it is.
    """

    context = PolicyContext

    def __init__(
        self,
        policy: Policy,
        log: Log,
        model: str,
        adapters: Sequence[PolicyAdapter],
        ours: Sequence[Branch],
        client: GatedSampling | None,
        reason: str | None,
    ):
        theirs = client.branches if client else ()
        signatures = [branch.lora.adapter.signature for branch in ours]
        others = [branch for branch in theirs if branch.lora.adapter.signature not in signatures]
        self.branches: tuple[Branch, ...]
        super().__init__((*ours, *others), self._observe)
        self.policy, self.log, self.model, self.adapters = policy, log, model, tuple(adapters)
        self.client, self.reason = client, reason
        self._places = [
            signatures.index(branch.lora.adapter.signature)
            if branch.lora.adapter.signature in signatures
            else len(ours) + others.index(branch)
            for branch in theirs
        ]
        self.verdicts: Sequence[Verdict] = ()
        self.cost: Cost | None = None

    def __call__(
        self,
        executor: Any,
        guider: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the sampled latent, erased or blank where a concept was detected. Raises: Refused."""
        images = len(noise)
        previews = callback and Previews(callback, self)
        try:
            latent = self._decided(executor, guider, sigmas, extra_args, previews, noise, *args, **kwargs)
        except Refused as refusal:
            self._write(images, REFUSE, str(refusal.reason))
            raise
        if previews:
            previews.flush()
        actions = [self._action(*pair) for pair in self._pairs()]
        strongest = next((action for action in (BLANK, ERASE) if action in actions), NONE)
        self._write(images, strongest, self.reason)
        if self.client is not None and self.client.observer is not None and self.cost is not None:
            self.client.observer(self._reported(self.verdicts), self.cost)
        return self.blanked(latent)

    def _decided(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The latent of a run that has decided; what cannot be decided is refused, or erased in every image."""
        try:
            latent = super().__call__(*args, **kwargs)
        except ValueError as error:
            if not is_ours(error):
                raise
            reason = f"a run that cannot be decided ({error})"
        else:
            if self.decided():
                return latent
            reason = "a run that ended undecided"
        if self.policy.undecidable == REFUSE:
            raise Refused(reason)
        self.reason = reason
        ours, theirs = self.branches[: len(self.adapters)], self.branches[len(self.adapters) :]
        pairs = zip(ours, self.adapters, strict=True)
        self.branches = (*(replace(one, settings=own.settings(gated=False)) for one, own in pairs), *theirs)
        return super().__call__(*args, **kwargs)

    def announce(self, verdicts: Sequence[Verdict], finished: bool = False) -> None:
        """Refuse as soon as a decision says so; tell the client about its own erasure LoRAs only."""
        self.verdicts = verdicts
        for adapter, verdict in self._pairs():
            if adapter.on_detection == REFUSE and _detected(verdict):
                raise Refused(f"an image with {adapter.concept!r}")
        told = list(verdicts) if self.policy.tell_clients else self._reported(verdicts)
        if told:
            super().announce(told, finished)

    def decided(self) -> bool:
        """Return whether every adapter of the policy has decided, or acts without a gate."""
        pairs = self._pairs()
        return bool(pairs) and all(_is_decided(verdict) for _, verdict in pairs)

    def blanked(self, latent: torch.Tensor) -> torch.Tensor:
        """Return a latent [B, C, ...] that is zero in the images to be blank."""
        shown = latent
        for adapter, verdict in self._pairs():
            if adapter.on_detection == BLANK and _detected(verdict):
                found = torch.tensor([decision.detected for decision in verdict.decisions], device=latent.device)
                mask = found.expand(len(latent)).view(-1, *[1] * (latent.ndim - 1))
                shown = torch.where(mask, torch.zeros_like(shown), shown)
        return shown

    # what is written down and reported

    def _observe(self, verdicts: Sequence[Verdict], cost: Cost) -> None:
        self.verdicts, self.cost = verdicts, cost

    def _pairs(self) -> list[tuple[PolicyAdapter, Verdict]]:
        """The policy's adapters with what was decided so far."""
        return list(zip(self.adapters, self.verdicts, strict=False))  # the client's come behind

    def _reported(self, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """The verdicts of the client's erasure LoRAs, by the names that the client knows."""
        theirs = self.client.branches if self.client else ()
        return [
            replace(verdicts[place], node=branch.node, lora=replace(verdicts[place].lora, name=branch.lora.name))
            for branch, place in zip(theirs, self._places, strict=True)
        ]

    def _action(self, adapter: PolicyAdapter, verdict: Verdict) -> str:
        if verdict.decide == ALWAYS:
            return ERASE
        return adapter.on_detection if _detected(verdict) else NONE

    def _write(self, images: int, action: str, reason: str | None) -> None:
        adapters = [self._said(lora.lora.name, *pair) for lora, pair in zip(self.branches, self._pairs(), strict=False)]
        said: dict[str, Any] = {"model": self.model, "images": images, "action": action, "reason": reason}
        if self.cost is not None:
            cost = self.cost
            said |= {"evaluations": cost.total, "plain": cost.plain, "seconds": round(cost.seconds, 3)}
        self.log.write(**said, adapters=adapters)

    def _said(self, name: str, adapter: PolicyAdapter, verdict: Verdict) -> dict[str, Any]:
        said: dict[str, Any] = {"adapter": name, "concept": adapter.concept, "mode": verdict.decide}
        decision = verdict.decision
        if decision is not None:
            said |= {"statistic": decision.statistic, "score": decision.score, "threshold": decision.threshold}
        detected = [one.detected for one in verdict.decisions]
        return said | {"detected": detected, "action": self._action(adapter, verdict)}


class Previews:
    """The sampler's callback, held back until the run has decided: before that, it shows the base model's image."""

    def __init__(self, callback: Any, sampling: PolicySampling):
        self.callback, self.sampling = callback, sampling
        self._last: tuple[Any, ...] | None = None

    def __call__(self, step: int, x0: torch.Tensor, x: torch.Tensor, total: int) -> None:
        """Take a step's prediction and latent."""
        self._last = step, x0, x, total
        if self.sampling.decided():
            self.flush()

    def flush(self) -> None:
        """Hand over the last step, if that has not happened yet."""
        if self._last is not None:
            step, x0, x, total = self._last
            self._last = None
            self.callback(step, self.sampling.blanked(x0), self.sampling.blanked(x), total)


def _is_decided(verdict: Verdict) -> bool:
    """Whether no sample is open: a batch in which one is has a weight for each, and fewer decisions."""
    return verdict.decide == ALWAYS or 0 < len(verdict.weights) <= len(verdict.decisions)


def _detected(verdict: Verdict) -> bool:
    return any(decision.detected for decision in verdict.decisions)
