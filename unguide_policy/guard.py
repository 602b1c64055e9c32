"""Which sampling runs the policy guards, lets pass or refuses. How a run is guarded is `sampling`'s."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP

from ..unguide_comfy.blend.state import RUN
from ..unguide_comfy.blend.wrapper import WRAPPERS, bare, blended_prediction
from ..unguide_comfy.gate.attach import GatedSampling, gate_wrappers
from ..unguide_comfy.gate.gate import Branch
from ..unguide_comfy.lora.match import match
from ..unguide_comfy.model.key import OURS, base_hash, has_forward_patches
from ..unguide_comfy.model.task import Task
from ..unguide_core.adapter import LowRank
from .log import Log
from .policy import ERASE, PASS, REFUSE, Policy
from .refusal import Refused, named
from .sampling import PolicySampling

PASSAGE = "unguide_policy"
"""Key of a run's passage in the transformer options."""

TRAINERS = {("TrainSampler", "nodes_train.py"), ("TrainGuider", "nodes_train.py")}
PATCHES = (
    *("patches", "object_patches", "injections", "hook_patches", "weight_wrapper_patches"),
    *("additional_models", "callbacks"),
)
SCALES = ("cfg", "cfg1", "cfg2", "neg_scale")


@dataclass(frozen=True)
class Passage:
    """What lets the predictions of a run pass.

    Args:
        prompts: the ids of the guider's conditionings; None where the run is not guarded and nothing is checked.
    """

    prompts: frozenset[Any] | None = None


class Guard:
    """A policy in force."""

    def __init__(self, policy: Policy):
        self.policy, self.log = policy, Log(policy.log_file)
        self._matched: WeakKeyDictionary[Any, dict[str, dict[str, LowRank]]] = WeakKeyDictionary()
        """The adapters' layers by name, as matched with a loaded model."""
        Refused.tell = policy.tell_clients

    @contextmanager
    def over(self, guider: Any, sampler: Any, images: int) -> Iterator[None]:
        """Within the block the guider samples under the policy. Raises: Refused."""
        before = guider.model_patcher, guider.model_options
        sampling = self._sampling(guider, sampler, images)
        options = comfy.model_patcher.create_model_options_clone(before[1])
        to = options.setdefault("transformer_options", {})
        if sampling is None:
            to[PASSAGE] = Passage()
        else:
            every = (entry for conds in guider.original_conds.values() for entry in conds)
            to[PASSAGE] = Passage(frozenset(entry.get("uuid") for entry in every))
            if any(guider.model_patcher.get_wrappers(kind, OURS) for kind in WRAPPERS):
                guider.model_patcher = bare(guider.model_patcher)  # a clone, which the host would load anew
            wrappers = to.get("wrappers", {})
            ours = {WrappersMP.APPLY_MODEL: blended_prediction, **gate_wrappers(sampling)}
            for kind, wrapper in ours.items():  # first, and so outermost
                others = {key: found for key, found in wrappers.get(kind, {}).items() if key != OURS}
                wrappers = {**wrappers, kind: {OURS: [wrapper], **others}}
            to["wrappers"] = wrappers
        guider.model_options = options
        try:
            yield
        finally:
            guider.model_patcher, guider.model_options = before

    def check(self, options: dict[str, Any], images: int) -> None:
        """Let a prediction pass. Raises: Refused outside a run, and for a prompt that the guider does not have."""
        passage = options.get(PASSAGE)
        if not isinstance(passage, Passage):
            if self.policy.outside == REFUSE:
                self._rule(REFUSE, "a prediction outside a sampling run", images)
            return
        run = options.get(RUN)
        if passage.prompts is None or (run is not None and run.predicting is not None):
            return
        if run is None or not passage.prompts.issuperset(options.get("uuids", [None])):
            self._rule(REFUSE, "a prompt that the guider does not show", images)

    def _sampling(self, guider: Any, sampler: Any, images: int) -> PolicySampling | None:
        """What guards a run; None where the policy lets it pass. Raises: Refused."""
        policy = self.policy
        if isinstance(sampler, Task) and not sampler.trains:
            return None  # a probe or a calibration: no image comes of it
        if isinstance(sampler, Task) or {named(sampler), named(guider)} & TRAINERS:
            self._rule(policy.training, "training", images)
            return None
        patchers = [one for one in vars(guider).values() if isinstance(one, comfy.model_patcher.ModelPatcher)]
        listed = {policy.listed(base_hash(patcher)) for patcher in patchers}
        name = listed.pop() if len(listed) == 1 else None
        if name is None:
            self._rule(policy.other_models, "a model that the policy does not list", images)
            return None
        carried = guider.model_patcher.get_wrappers(WrappersMP.SAMPLER_SAMPLE, OURS)
        client = carried[0] if carried else None
        reason = patched(guider, patchers) or self._foreign(name, client)
        how = policy.models[name].patched if reason else None
        if how in (REFUSE, PASS):
            self._rule(how, f"the model {name!r} with {reason}", images)
            return None
        if min(float(getattr(guider, scale, 0.0)) for scale in SCALES) < 0.0:
            reason, how = "guidance with a scale below 0", policy.undecidable
            if how == REFUSE:
                self._rule(how, reason, images)
                return None
        adapters = [policy.adapters[adapter] for adapter in policy.models[name].adapters]
        branches = self._branches(name, guider.model_patcher.model, gated=how != ERASE)
        return PolicySampling(policy, self.log, name, adapters, branches, client, reason)

    def _foreign(self, model: str, client: GatedSampling | None) -> str | None:
        """A client's erasure LoRA that is not the policy's changes the model as any LoRA does."""
        loras = (self.policy.loras[model, adapter] for adapter in self.policy.models[model].adapters)
        ours = {lora.adapter.signature for lora in loras}
        theirs = {branch.lora.adapter.signature for branch in (client.branches if client else ())}
        return "another erasure LoRA" if theirs - ours else None

    def _branches(self, model: str, network: Any, gated: bool) -> tuple[Branch, ...]:
        loras = {name: self.policy.loras[model, name] for name in self.policy.models[model].adapters}
        if network not in self._matched:
            self._matched[network] = {name: match(lora.adapter, network, name).layers for name, lora in loras.items()}
        layers = self._matched[network]
        return tuple(
            Branch(lora, layers[name], self.policy.adapters[name].settings(gated)) for name, lora in loras.items()
        )

    def _rule(self, action: str, what: str, images: int) -> None:
        """Write down what the policy lets pass or refuses. Raises: Refused, where it does."""
        self.log.write(model=None, images=images, action=action, reason=what, adapters=[])
        if action == REFUSE:
            raise Refused(what)


def patched(guider: Any, patchers: list[Any]) -> str | None:
    """Return what makes a run's model another than its weights say, in words; None for the model as it was loaded."""
    for patcher in patchers:
        for kind in PATCHES:
            found = getattr(patcher, kind, {})
            if any(found.values()):
                return kind.replace("_", " ")
        if has_forward_patches(patcher):
            return "patches in its forward"
    if guider.model_options is not guider.model_patcher.model_options:
        return "model options that are not its own"
    entries = [entry for conds in guider.original_conds.values() for entry in conds]
    extra = any("control" in entry and entry["control"].get_extra_hooks() for entry in entries)
    if extra or any(entry.get("hooks") for entry in entries):
        return "hooks on a conditioning"
    return "text boxes (GLIGEN)" if any("gligen" in entry for entry in entries) else None
