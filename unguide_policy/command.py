"""`init` and `check`: a policy written for a checkpoint and erasure LoRAs, and a policy in plain words."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.sd

from ..unguide_comfy.lora.load import encode_prompts
from ..unguide_comfy.lora.match import match
from ..unguide_comfy.model.key import base_hash
from ..unguide_core.formats import load_adapter
from .policy import BLANK, DECIDE, ERASE, PASS, REFUSE, Policy, load, sha256
from .prompts import CONCEPT, NEUTRAL, Key, prompts_file, save_prompts

TEMPLATE = """\
# The policy of this server, see docs/policy.md. Texts stand in quotes; an unknown key ends the start of the server.
version: 1

# Erasure LoRAs, as files beside this one. on_detection: erase | refuse | blank
adapters:
{adapters}
# Models that clients may use, by the hash of their diffusion weights, and what guards them.
# patched (LoRAs, merges, hooks, patches): refuse | decide | erase | pass; only refuse cannot be circumvented
models:
{models}
other_models: refuse   # refuse | pass
undecidable: refuse    # refuse | erase: a run that the gate cannot decide
training: refuse       # refuse | pass
outside: refuse        # refuse | pass: predictions outside a sampling run
tell_clients: false    # whether texts, errors and /unguide/policy say what the policy does
log: policy.jsonl
"""

MODEL = """\
  {name}:
    weights: "{weights}"
    checkpoint: {checkpoint}
    adapters: {adapters}
    patched: refuse
"""

ADAPTER = """\
  {name}:
    file: {file}
    sha256: "{sha256}"
    concept: {concept}
    on_detection: erase
    strength: 1.5
    false_positive_rate: 0.01
    resist_adversarial: false
"""


def init(arguments: Namespace) -> str:
    """Write a policy, its adapters and its prompts.

    Raises: FileExistsError if there is a policy; ValueError if an adapter names no concept; AdapterError if it is none.
    """
    file: Path = arguments.policy.resolve()
    if file.exists():
        raise FileExistsError(f"{file} exists; remove it, or name another file")
    sources = dict(_adapter_argument(text) for text in arguments.adapter)
    if len({source.stem for source in sources}) < len(sources):
        raise ValueError("two adapters have the same file name; rename one")
    adapters = {source: load_adapter(source) for source in sources}
    concepts = {source: prompt or adapters[source].card.concept_prompt for source, prompt in sources.items()}
    if nameless := [source for source, concept in concepts.items() if not concept]:
        raise ValueError(
            f"{nameless[0].name} names no concept; give its prompt: --adapter '{nameless[0]}=a photo of ...'"
        )
    prompts: dict[Key, Any] = {}
    models = ""
    for checkpoint in arguments.checkpoint:
        patcher, clip = _checkpoint(checkpoint)
        weights = base_hash(patcher)
        for source, adapter in adapters.items():
            match(adapter, patcher.model, source.name)
            encoded = encode_prompts(clip, [concepts[source], adapter.card.neutral])
            prompts[weights, source.stem, CONCEPT] = encoded[concepts[source]]
            prompts[weights, source.stem, NEUTRAL] = encoded[adapter.card.neutral]
        entry = {
            "name": checkpoint.stem,
            "checkpoint": str(checkpoint.resolve()),
            "adapters": [s.stem for s in sources],
        }
        models += MODEL.format(**{key: json.dumps(value) for key, value in entry.items()}, weights=weights)
    file.parent.mkdir(parents=True, exist_ok=True)
    entries = ""
    for source, concept in concepts.items():
        entry = {"name": source.stem, "file": source.name, "concept": concept}
        entries += ADAPTER.format(**{key: json.dumps(value) for key, value in entry.items()}, sha256=sha256(source))
        if source.resolve() != file.parent / source.name:
            shutil.copyfile(source, file.parent / source.name)
    save_prompts(prompts, prompts_file(file))
    file.write_text(TEMPLATE.format(adapters=entries, models=models), encoding="utf-8")
    return f"wrote {file}\n\n" + "\n".join(_meaning(load(file)))


def check(arguments: Namespace) -> str:
    """Return what a policy means for clients, its checkpoints verified.

    Raises: as `policy.load`; ValueError for a checkpoint of other weights; AdapterError if an adapter does not fit.
    """
    policy = load(arguments.policy)
    return "\n".join([f"{policy.file} is valid.", "", *_meaning(policy), "", *_checkpoints(policy)])


def _checkpoints(policy: Policy) -> Iterator[str]:
    for name, model in policy.models.items():
        if not Path(model.checkpoint).is_file():
            yield f"Not verified: the checkpoint of {name}, {model.checkpoint or 'no path'}, is not here."
            continue
        patcher, _ = _checkpoint(Path(model.checkpoint))
        found = base_hash(patcher)
        if found != model.weights:
            raise ValueError(f"{model.checkpoint} has the weights {found}, and the policy names {model.weights}")
        for adapter in model.adapters:
            match(policy.loras[name, adapter].adapter, patcher.model, adapter)
        yield f"Verified: {model.checkpoint} has the weights of {name}, and its adapters fit."


def _meaning(policy: Policy) -> Iterator[str]:
    """The policy in sentences."""
    for name, model in policy.models.items():
        yield f"Clients can generate images with {name}, by any graph of samplers, guiders and prompts."
        for one in model.adapters:
            adapter = policy.adapters[one]
            yield f"- {adapter.concept!r} ({one}): {MEANING['on_detection', adapter.on_detection]}"
        yield f"- {name} with LoRAs, merges, hooks or patches: {MEANING['patched', model.patched]}"
    for key in ("other_models", "undecidable", "training", "outside"):
        yield f"{WHAT[key]}: {MEANING[key, getattr(policy, key)]}"
    yield "Clients are told what the policy does." if policy.tell_clients else "Clients are not told of the policy."
    yield f"Every sampling run adds a line to {policy.log_file}."


WHAT = {
    "other_models": "Other models",
    "undecidable": "Runs that cannot be decided",
    "training": "Training in the graph",
    "outside": "Predictions outside a sampling run",
}
MEANING = {
    ("on_detection", ERASE): "erased where it is detected; every other image is unchanged",
    ("on_detection", REFUSE): "the image is refused where it is detected",
    ("on_detection", BLANK): "the image is blank where it is detected",
    ("patched", REFUSE): "refused",
    ("patched", DECIDE): "guarded, but a client's LoRA can bring the concept back",
    ("patched", ERASE): "erased in every image, but a client's LoRA can bring the concept back",
    ("patched", PASS): "NOT guarded",
    **{(key, REFUSE): "refused" for key in WHAT},
    **{(key, PASS): "NOT guarded" for key in WHAT},
    ("undecidable", ERASE): "erased in every image",
}


def _adapter_argument(text: str) -> tuple[Path, str]:
    """A file and a prompt from FILE[=PROMPT]."""
    file, _, prompt = text.partition("=")
    return Path(file), prompt.strip()


def _checkpoint(file: Path) -> tuple[Any, Any]:
    """A checkpoint's `ModelPatcher` and text encoder. Raises: OSError if it cannot be read, ValueError without both."""
    with file.open("rb"):
        pass
    patcher, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(file), output_vae=False, output_clip=True)
    if patcher is None or clip is None:
        raise ValueError(f"{file} has no diffusion model or no text encoder; name a full checkpoint")
    return patcher, clip
