"""The stability probe inside a sampling run of the host: the base model's first steps on a prompt, and what the base
model and the adapters predict there. The statistics themselves are `unguide_core.probe`'s.

The probe denoises a schedule of its own from pure noise: the user's may be partial (img2img, start_at_step). It draws
its noise from a generator of its own, so that a run that detects nothing is bit-identical to one without a probe.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import comfy.model_management
import comfy.samplers
import torch

from ..unguide_core.probe import (
    STATISTICS,
    Decision,
    Statistic,
    alignment,
    alignment_statistic,
    decide_by,
    influence,
    influence_statistic,
    paper_statistic,
)
from ..unguide_core.trajectory import partial_denoise
from .blending import RUN, Run
from .erasure import Conditioning, ErasureLora

log = logging.getLogger(__name__)

AUTO = "auto"
# measured over ten concepts: see docs/gate.md
DEFAULT_THRESHOLDS = {"alignment": 0.5, "influence": 0.68, "paper": 1.0}
SCHEDULER = "normal"

Entry = dict[str, Any]

# what says where and when a conditioning acts, and what it says; the rest (ControlNet, ...) is kept for comparison
_WHERE = ("area", "mask", "mask_strength", "strength", "set_area_to_bounds", "default")
_WHEN = ("timestep_start", "timestep_end", "start_percent", "end_percent", "clip_start_percent", "clip_end_percent")
_REGION = frozenset((*_WHERE, *_WHEN))
_TEXT = frozenset(("cross_attn", "pooled_output", "model_conds", "uuid"))


@dataclass(frozen=True)
class ProbeSettings:
    """How the probe looks and decides.

    Args:
        statistic: "alignment", "influence", "paper", or "auto": the first of them that the inputs allow.
        threshold: score at or above which the concept counts as detected; 0 takes the statistic's default.
        repeats: noise seeds, evaluated as one latent batch.
        probe_steps: denoising steps before the statistics are taken.
        schedule_steps: steps of the whole schedule that these are the first of.
        seed: of the probe's noise.
        weight_detected, weight_otherwise: the base model's weight in the blend, by the decision.
    """

    statistic: str = AUTO
    threshold: float = 0.0
    repeats: int = 2
    probe_steps: int = 2
    schedule_steps: int = 20
    seed: int = 0
    weight_detected: float = -1.0
    weight_otherwise: float = 1.0

    def __post_init__(self) -> None:
        if self.statistic not in (AUTO, *STATISTICS):
            raise ValueError(f"unknown statistic {self.statistic!r}; expected auto, {', '.join(STATISTICS)}")
        if self.repeats < 1:
            raise ValueError(f"the probe's repeats are {self.repeats}; expected at least 1")
        if not 1 <= self.probe_steps < self.schedule_steps:
            raise ValueError(
                f"probe_steps is {self.probe_steps} of {self.schedule_steps} schedule_steps; expected at least 1 and "
                "fewer than the schedule has"
            )

    def threshold_of(self, statistic: str) -> float:
        return self.threshold or DEFAULT_THRESHOLDS[statistic]


class Probe:
    """One probe of one prompt with the base model, shared by all adapters.

    Args:
        guider: the host's guider in the middle of a sampling run (its conds processed, its model loaded).
        run: the state that the blending wrapper reads; evaluations are counted there.
        extra_args: the sampling function's (`model_options`, `seed`), `run` already in the transformer options.
        shape: of the run's latent batch, [B, C, ...]; the probe uses `settings.repeats` of one sample's shape.
        neutral: the neutral conditioning, None for the erasure LoRA's own.
        latent_image, denoise_mask: the run's, for models that take them as conditioning.
    """

    def __init__(
        self,
        guider: Any,
        run: Run,
        extra_args: Mapping[str, Any],
        shape: Sequence[int],
        settings: ProbeSettings,
        neutral: Conditioning | None = None,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
    ):
        if not getattr(guider, "conds", {}).get("positive"):
            raise ValueError(
                f"the guider {type(guider).__name__} has no positive conditioning to probe; use a guider with one "
                "(CFGGuider, BasicGuider, DualCFGGuider, ...), or the gate mode 'fixed'"
            )
        self.guider = guider
        self.run = run
        self.model_options = extra_args["model_options"]
        self.settings = settings
        self.neutral_override = neutral
        self.latent_image, self.denoise_mask = latent_image, denoise_mask
        self.device = guider.model_patcher.load_device
        self.shape = (settings.repeats, *shape[1:])
        # guiders with a second prompt (DualCFGGuider) keep it under another key
        self.positive: list[Entry] = [entry for key in guider.conds if key != "negative" for entry in guider.conds[key]]
        self._references: dict[tuple[int, ...], torch.Tensor] = {}

    @cached_property
    def sigmas(self) -> torch.Tensor:
        """Noise levels of the probe's steps and of its end, [probe_steps + 1]."""
        sampling = self.guider.inner_model.model_sampling
        sigmas = comfy.samplers.calculate_sigmas(sampling, SCHEDULER, self.settings.schedule_steps)
        return sigmas[: self.settings.probe_steps + 1].to(self.device)

    @property
    def sigma(self) -> float:
        """The noise level at which the statistics are taken."""
        return float(self.sigmas[-1])

    @cached_property
    def noise(self) -> torch.Tensor:
        """The latent that every trajectory of this probe starts from, at `sigmas[0]`."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        noise = torch.randn(self.shape, generator=generator).to(self.device)
        sampling = self.guider.inner_model.model_sampling
        at_maximum = float(self.sigmas[0]) >= float(sampling.sigma_max) * (1.0 - 1e-5)
        return sampling.noise_scaling(self.sigmas[0], noise, torch.zeros_like(noise), at_maximum)

    def trajectory(self, positive: list[Entry] | None = None) -> torch.Tensor:
        """The latent after the probe's steps with the base model and the guider's own guidance.

        Args:
            positive: processed conditioning in place of the guider's positive one.
        """
        with self.run.base_only(), self._conditioned(positive):
            return partial_denoise(self._denoise, self.noise, self.sigmas, callback=_check_interrupt)

    def predict(self, entries: list[Entry], latent: torch.Tensor, adapter: int | None = None) -> torch.Tensor:
        """The conditional x0 prediction of the base model, or of the model that `adapter` makes of it."""
        sigma = torch.full((latent.shape[0],), self.sigma, device=latent.device)
        weights = self.run.base_only() if adapter is None else self.run.adapted_only(adapter)
        with weights:
            model = self.guider.inner_model
            return comfy.samplers.calc_cond_batch(model, [entries], latent, sigma, self.model_options)[0]

    def decide(self, index: int, lora: ErasureLora, *, everything: bool = False) -> Decision:
        """Whether the prompt carries the concept of erasure LoRA `index` of the run.

        Args:
            everything: take all statistics that the inputs allow, not the deciding one alone.
        Raises: ValueError if the statistic asked for lacks an input, or a prediction is NaN or infinite.
        """
        deciding, reason = self._deciding(lora)
        available = [name for name in STATISTICS if self._missing(name, lora) is None]
        names = [deciding, *(name for name in available if everything and name != deciding)]
        statistics = [getattr(self, f"_{name}")(index, lora) for name in names]
        return decide_by(
            statistics,
            self.settings.weight_detected,
            self.settings.weight_otherwise,
            reason=reason,
            adapter_key=lora.key,
        )

    def concept_influence(self, index: int, lora: ErasureLora) -> torch.Tensor:
        """Influence of the adapter on its own concept's prompt, on that prompt's trajectory, [repeats], eps units."""
        assert lora.concept is not None
        return self._influence_on(index, self._retargeted(self.positive[0], lora.concept))

    # statistics

    def _alignment(self, index: int, lora: ErasureLora) -> Statistic:
        neutral = self._neutral(lora)
        assert lora.concept is not None
        assert neutral is not None
        scores = [
            alignment(
                self.predict([_everywhere(entry)], self.latent),
                self._reference(entry, neutral),
                self._reference(entry, lora.concept),
            )
            for entry in self.positive
        ]
        return _highest([alignment_statistic(score, self.settings.threshold_of("alignment")) for score in scores])

    def _influence(self, index: int, lora: ErasureLora) -> Statistic:
        concept = self._calibrated(lora) or self.concept_influence(index, lora)
        threshold = self.settings.threshold_of("influence")
        return _highest([influence_statistic(value, concept, threshold) for value in self._influences(index)])

    def _paper(self, index: int, lora: ErasureLora) -> Statistic:
        conditioning = self._neutral(lora)
        if conditioning is None:
            neutral = self._influence_on(index, self.guider.conds["negative"])
        else:
            neutral = self._influence_on(index, self._retargeted(self.positive[0], conditioning))
        return _highest([paper_statistic(value, neutral) for value in self._influences(index)])

    # what they are made of

    @cached_property
    def latent(self) -> torch.Tensor:
        """The prompt's own trajectory's end, [repeats, C, ...]."""
        return self.trajectory()

    def _influences(self, index: int) -> list[torch.Tensor]:
        """The adapter's influence on each entry of the prompt, on the prompt's trajectory, eps units."""
        return [self._displacement(index, [_everywhere(entry)], self.latent) for entry in self.positive]

    def _influence_on(self, index: int, entries: list[Entry]) -> torch.Tensor:
        """The adapter's influence on another conditioning, on that conditioning's own trajectory, eps units."""
        return self._displacement(index, entries, self.trajectory(entries))

    def _displacement(self, index: int, entries: list[Entry], latent: torch.Tensor) -> torch.Tensor:
        base, adapted = self.predict(entries, latent), self.predict(entries, latent, adapter=index)
        return influence(base, adapted) / self.sigma

    def _reference(self, entry: Entry, conditioning: Conditioning) -> torch.Tensor:
        """The base model's prediction for another prompt in place of an entry's, once for entries alike but in text."""
        retargeted = self._retargeted(entry, conditioning)
        kept = tuple(id(value) for name, value in sorted(entry.items()) if name not in _REGION | _TEXT)
        key = (id(conditioning), *kept)
        if key not in self._references:
            self._references[key] = self.predict(retargeted, self.latent)
        return self._references[key]

    def _retargeted(self, entry: Entry, conditioning: Conditioning) -> list[Entry]:
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
            self.guider.inner_model.extra_conds,
            others,
            self.noise,
            self.device,
            "positive",
            latent_image=self.latent_image,
            denoise_mask=self.denoise_mask,
            seed=self.settings.seed,
        )

    def _neutral(self, lora: ErasureLora) -> Conditioning | None:
        return self.neutral_override if self.neutral_override is not None else lora.neutral

    def _calibrated(self, lora: ErasureLora) -> tuple[float, ...] | None:
        """The card's influence of the concept's own prompt, where it holds for this latent and noise level."""
        card = lora.adapter.card.calibration
        same = (
            lora.strength == 1.0
            and list(card.get("latent", ())) == list(self.shape[1:])
            and abs(float(card.get("sigma", 0.0)) / self.sigma - 1.0) < 0.01
        )
        return (float(card["mean"]),) if same and "mean" in card else None

    # which statistic

    def _missing(self, statistic: str, lora: ErasureLora) -> str | None:
        """What a statistic lacks, as words for a person; None if it can be taken."""
        if statistic == "alignment":
            if lora.concept is None:
                return (
                    "the concept's own prompt, encoded: connect a CLIP to Load Erasure LoRA and name the concept there"
                )
            if self._neutral(lora) is None:
                return (
                    "the neutral (empty) prompt: connect a CLIP to Load Erasure LoRA, or an encoded empty prompt here"
                )
        if statistic == "influence" and lora.concept is None and self._calibrated(lora) is None:
            return (
                f"the adapter's influence on its own concept, at latent {list(self.shape[1:])} and sigma "
                f"{self.sigma:.3f}: the card has none that fits; connect a CLIP to Load Erasure LoRA"
            )
        if statistic == "paper" and self._neutral(lora) is None and not self.guider.conds.get("negative"):
            return "a neutral prompt: connect an encoded empty prompt as 'neutral', or a CLIP to Load Erasure LoRA"
        return None

    def _deciding(self, lora: ErasureLora) -> tuple[str, str]:
        """The deciding statistic's name, and why it is that one."""
        asked = self.settings.statistic
        if asked != AUTO:
            missing = self._missing(asked, lora)
            if missing:
                raise ValueError(f"the statistic {asked!r} of erasure LoRA {lora.name!r} needs {missing}")
            return asked, self._reason(asked, lora, "as chosen")
        for name in STATISTICS:
            if self._missing(name, lora) is None:
                return name, self._reason(name, lora, "the best that the inputs allow")
        raise ValueError(f"no gate for erasure LoRA {lora.name!r}: it needs {self._missing('paper', lora)}")

    def _reason(self, statistic: str, lora: ErasureLora, why: str) -> str:
        reason = f"{statistic}, {why}"
        if statistic == "paper" and self._neutral(lora) is None:
            reason += "; the negative prompt stood in for the neutral one"
            log.warning("UnGuide: %s has no neutral prompt; the negative prompt stands in for it", lora.name)
        return reason

    # the host's guider

    def _denoise(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.guider(x, sigma, model_options=self.model_options, seed=self.settings.seed)

    @contextmanager
    def _conditioned(self, positive: list[Entry] | None) -> Iterator[None]:
        before = self.guider.conds
        try:
            if positive is not None:
                self.guider.conds = {**before, "positive": positive}
            yield
        finally:
            self.guider.conds = before


class ProbeSampler(comfy.samplers.Sampler):
    """A probe run as if it were a sampler: `CFGGuider.sample` loads the model and processes the conditioning for it.

    After sampling, `decisions` holds one decision per erasure LoRA.
    """

    def __init__(
        self, run: Run, loras: Sequence[ErasureLora], settings: ProbeSettings, neutral: Conditioning | None = None
    ):
        self.run, self.loras, self.settings, self.neutral = run, loras, settings, neutral
        self.decisions: list[Decision] = []
        self.sigma = 0.0

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """The latent that came in: the probe's result is `decisions`."""
        extra_args = carrying(extra_args, self.run)
        probe = Probe(
            model_wrap, self.run, extra_args, noise.shape, self.settings, self.neutral, latent_image, denoise_mask
        )
        self.decisions = [probe.decide(i, lora, everything=True) for i, lora in enumerate(self.loras)]
        self.sigma = probe.sigma
        return noise


def carrying(extra_args: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Copies of a sampling function's `extra_args` whose transformer options carry the run."""
    options = extra_args["model_options"]
    return {
        **extra_args,
        "model_options": {**options, "transformer_options": {**options.get("transformer_options", {}), RUN: run}},
    }


def _everywhere(entry: Entry) -> Entry:
    """A processed entry without its area, mask, strength and time range: what its prompt does to the whole picture."""
    return {name: value for name, value in entry.items() if name not in _REGION}


def _highest(statistics: Sequence[Statistic]) -> Statistic:
    """Several conditionings make one prompt: the one that carries the concept most decides."""
    return max(statistics, key=lambda statistic: statistic.score)


def _check_interrupt(state: object) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()
