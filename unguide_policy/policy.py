"""The policy file: which erasure LoRAs guard which models, and what becomes of everything else.

Whatever it says wrongly is an error; nothing is guessed or left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..unguide_comfy.lora.load import ErasureLora
from ..unguide_comfy.probe.settings import ALWAYS, Settings
from ..unguide_core.formats import load_adapter
from .prompts import CONCEPT, NEUTRAL, load_prompts, prompts_file

ERASE, REFUSE, BLANK, DECIDE, PASS = "erase", "refuse", "blank", "decide", "pass"

VERSION = 1

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class PolicyAdapter:
    """An erasure LoRA of the policy, and what follows from a detection.

    Args:
        file: beside the policy file.
        sha256: of that file.
        concept: the concept's own prompt, as it was encoded.
        on_detection: "erase"; "refuse" or "blank" the image.
        strength: of the erasure LoRA where its concept is detected. In schedules of few steps 1 leaves traces.
        false_positive_rate, resist_adversarial: see `unguide_comfy.probe.settings`.
    """

    file: str
    sha256: str
    concept: str
    on_detection: str = ERASE
    strength: float = 1.5
    false_positive_rate: float = 0.01
    resist_adversarial: bool = False

    def __post_init__(self) -> None:
        _one_of("on_detection", self.on_detection, (ERASE, REFUSE, BLANK))
        _one_of("resist_adversarial", self.resist_adversarial, (True, False))
        if not 0.0 < self.strength <= 10.0:
            raise ValueError(f"strength is {self.strength}; expected a number above 0, and 10 at most")
        self.settings(gated=True)

    def settings(self, gated: bool) -> Settings:
        """Return how it decides; without a gate it acts on every image.

        No prompt is cleared by its text alone: a client chooses the conditioning, not only the words.
        """
        settings = Settings(
            false_positive_rate=self.false_positive_rate,
            resist_adversarial=self.resist_adversarial,
            text_clears=False,
        )
        return settings if gated else replace(settings, decide=ALWAYS)


@dataclass(frozen=True)
class PolicyModel:
    """A model that the policy lists.

    Args:
        weights: `unguide_comfy.model.key.base_hash` of its diffusion weights.
        adapters: the names of what guards it.
        checkpoint: where `python -m unguide_policy check` finds it.
        patched: what becomes of it under LoRAs, merges, hooks and patches: "refuse"; "decide" as for the plain model,
            by alignment, because no calibration holds; "erase" in every image; "pass" unguarded.
    """

    weights: str
    adapters: tuple[str, ...]
    checkpoint: str = ""
    patched: str = REFUSE

    def __post_init__(self) -> None:
        _one_of("patched", self.patched, (REFUSE, DECIDE, ERASE, PASS))
        if not isinstance(self.adapters, list | tuple) or not self.adapters:
            raise ValueError(f"adapters is {self.adapters!r}; expected a list of at least one adapter's name")


@dataclass(frozen=True)
class Policy:
    """A whole policy.

    Args:
        file: where it was read.
        adapters, models: by name.
        other_models: what becomes of models that it does not list.
        undecidable: of a run that no statistic can decide.
        training: of training in the graph.
        outside: of a prediction outside a sampling run of the host's guiders.
        tell_clients: whether progress texts, errors and the health route say what the policy does.
        log: file of JSON lines, beside the policy file unless absolute.
        loras: by model and adapter name, ready to be matched.
    """

    file: Path
    adapters: Mapping[str, PolicyAdapter]
    models: Mapping[str, PolicyModel]
    other_models: str = REFUSE
    undecidable: str = REFUSE
    training: str = REFUSE
    outside: str = REFUSE
    tell_clients: bool = False
    log: str = "policy.jsonl"
    loras: Mapping[tuple[str, str], ErasureLora] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("other_models", "training", "outside"):
            _one_of(name, getattr(self, name), (REFUSE, PASS))
        _one_of("undecidable", self.undecidable, (REFUSE, ERASE))
        _one_of("tell_clients", self.tell_clients, (True, False))
        used = [name for model in self.models.values() for name in model.adapters]
        if unknown := sorted(set(used) - set(self.adapters)):
            raise ValueError(f"models name the adapters {', '.join(unknown)}, which are not under 'adapters'")
        if idle := sorted(set(self.adapters) - set(used)):
            raise ValueError(f"the adapters {', '.join(idle)} guard no model; name them under a model, or remove them")
        if len({model.weights for model in self.models.values()}) < len(self.models):
            raise ValueError("two models have the same weights; keep one entry with all its adapters")

    @property
    def log_file(self) -> Path:
        """Where the log is written."""
        return self.file.parent / self.log

    def listed(self, weights: str) -> str | None:
        """Return the name of the model with these weights; None if it is not listed."""
        return next((name for name, model in self.models.items() if model.weights == weights), None)


def read(file: Path) -> Policy:
    """Return what a policy file says, without the files that it names.

    Raises: OSError or yaml.YAMLError if it cannot be read; ValueError for a wrong key or value.
    """
    content = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(f"it does not say 'version: {VERSION}'; write one with python -m unguide_policy init")
    content = {key: value for key, value in content.items() if key != "version"}
    for key, kind in (("adapters", PolicyAdapter), ("models", PolicyModel)):
        if not isinstance(content.get(key), dict) or not content[key]:
            raise ValueError(f"'{key}' is {content.get(key)!r}; expected at least one entry by name")
        content[key] = {str(name): _entry(kind, f"{key}.{name}", entry) for name, entry in content[key].items()}
    return _entry(Policy, "the policy", content, file=file.resolve(), loras={})


def load(file: Path) -> Policy:
    """Return a policy with its adapters and prompts.

    Raises: as `read`; ValueError for a wrong hash or missing prompts; AdapterError for a file that is not an adapter.
    """
    policy = read(file)
    prompts = load_prompts(prompts_file(policy.file))
    loras = {}
    for model_name, model in policy.models.items():
        for name in model.adapters:
            adapter = policy.adapters[name]
            missing = [kind for kind in (CONCEPT, NEUTRAL) if (model.weights, name, kind) not in prompts]
            if missing:
                raise ValueError(
                    f"the {' and the '.join(missing)} prompt of adapter {name!r} is not encoded for model "
                    f"{model_name!r}; write the policy again with python -m unguide_policy init"
                )
            concept, neutral = (prompts[model.weights, name, kind] for kind in (CONCEPT, NEUTRAL))
            loaded = load_adapter(_verified(policy.file.parent / adapter.file, adapter.sha256))
            loras[model_name, name] = ErasureLora(name, loaded, adapter.strength, adapter.concept, concept, neutral)
    return replace(policy, loras=loras)


def sha256(file: Path) -> str:
    """Return a file's sha256."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _verified(file: Path, expected: str) -> Path:
    found = sha256(file)
    if found != expected:
        raise ValueError(f"{file.name} has the sha256 {found}, and the policy names {expected}; restore the file")
    return file


def _entry(kind: type[Entry], where: str, content: Any, **more: Any) -> Entry:
    """A dataclass from a mapping of the file, each key checked, and from what the file cannot say."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} is {content!r}; expected keys and values")
    known = [one for one in fields(kind) if one.name not in more]  # type: ignore[arg-type]
    if unknown := sorted(str(key) for key in set(content) - {one.name for one in known}):
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; expected {', '.join(o.name for o in known)}")
    needed = [one.name for one in known if one.default is MISSING and one.default_factory is MISSING]
    if missing := [name for name in needed if name not in content]:
        raise ValueError(f"{where} lacks the key {missing[0]!r}")
    for one in known:
        value = content.get(one.name, "")
        if one.type in ("str", str) and not isinstance(value, str):
            raise ValueError(f"{where}.{one.name} is {value!r}; expected a text, in quotes")
    try:
        return kind(**content, **more)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}")


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that occurs twice is an error, instead of the first one being lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"the key {twice[0]!r} occurs twice")
        return super().construct_mapping(node, deep)
