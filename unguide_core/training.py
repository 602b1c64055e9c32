"""Training an erasure adapter: the recipes, the latents they train at, the loop.

The objective itself is objective.py's, noise schedules are trajectory.py's. Knows no model and no host program: a
`Predictor` predicts noise, and its prompts are whatever names it understands. Two loops:

    official    the research code's (arXiv 2508.05755): each iteration denoises one latent from noise with the adapted
                model and trains there; about 54 network evaluations an iteration
    selective   the same target at many latents, which are met on whole trajectories and used several times, with
                predictions of the base model computed once; besides, prompts to keep are held to the base model

One evaluation is one latent under one prompt, as everywhere in this project.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .adapter import LowRank, initial_low_rank
from .guidance import classifier_free
from .objective import erasure_loss, erasure_target, preservation_loss
from .trajectory import (
    OfficialRun,
    from_sigma_space,
    official_ddim_timesteps,
    official_run,
    partial_denoise,
    sd_alphas_cumprod,
    sigma_from_alpha_cumprod,
    to_sigma_space,
)

OFFICIAL, SELECTIVE = "official", "selective"
LOOPS = (OFFICIAL, SELECTIVE)
HELD_OUT = 8
"""Latents that the held-out loss is taken at."""
LEAST_TO_LEARN = 1e-7
"""An erasure loss of an untrained adapter: below it, the text encoder does not tell target and reference apart."""

FP16_LOSS_SCALE = 2.0**12
"""For models that compute in half precision: the factor on the loss while gradients are computed, to begin with."""

log = logging.getLogger(__name__)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out; some accelerators have a general error that says so."""
    known = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    general = getattr(torch, "AcceleratorError", ())
    return isinstance(error, known) or (isinstance(error, general) and "out of memory" in str(error).lower())


class Predictor(Protocol):
    """A frozen model with an adapter that can be switched on."""

    def __call__(self, z: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the noise that is predicted for each row, float32.

        Args:
            z: variance-preserving latents, [B, C, ...].
            timesteps: of each row, 0 to 999, [B].
            prompts: of each row.
        """

    def adapted(self) -> AbstractContextManager[None]:
        """Within the block predictions are the adapted model's, and gradients flow into the adapter."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


@dataclass(frozen=True)
class Recipe:
    """How an erasure adapter is trained; kept in its card.

    Args:
        loop: "official" or "selective".
        iterations: steps of the optimiser, at most.
        rate_down, rate_up: Adam's learning rates.
        rank, alpha: of every layer; scale = alpha / rank.
        negative_guidance: eta of `erasure_target`.
        guidance_scale: classifier-free, of the denoising that latents come from.
        schedule_steps: of the denoising; the official loop takes a random number of them, the selective one all.
        batch: latents of prompts to erase in an iteration.
        preserved, preservation_weight: latents of prompts to keep in an iteration, and the weight of their loss.
        trajectories: that are denoised together, for the selective loop.
        refresh: iterations after which the selective loop denoises anew, with the adapter as it is then.
        kept_trajectories: trajectories of the base model on prompts to keep, denoised once; every prompt gets one, so
            there are more where there are more prompts. 0 keeps none.
        check: iterations between looks at the held-out loss; 0 never looks and never stops early.
        patience: looks in a row without improvement after which training stops.
        seed: of all random numbers.
    Raises: ValueError for values that mean nothing.
    """

    loop: str = SELECTIVE
    iterations: int = 100
    rate_down: float = 5e-3
    rate_up: float = 5e-4
    rank: int = 1
    alpha: float = 8.0
    negative_guidance: float = 2.0
    guidance_scale: float = 4.0
    schedule_steps: int = 10
    batch: int = 4
    preserved: int = 8
    preservation_weight: float = 10.0
    trajectories: int = 12
    refresh: int = 34
    kept_trajectories: int = 24
    check: int = 20
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loop not in LOOPS:
            raise ValueError(f"the training loop is {self.loop!r}; expected one of {', '.join(LOOPS)}")
        for name in ("iterations", "rank", "schedule_steps", "batch", "trajectories", "refresh", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("preserved", "kept_trajectories", "check"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("rate_down", "rate_up", "alpha"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number above 0")
        for name in ("negative_guidance", "guidance_scale", "preservation_weight"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number from 0 on")
        if self.loop == OFFICIAL:
            official_ddim_timesteps(self.schedule_steps)

    def with_rates(self, up: float | None, down: float | None = None) -> "Recipe":
        """Return the recipe with other learning rates, where given; of `up` alone, in the same ratio as before."""
        if down is None:
            down = self.rate_down if up is None else up * self.rate_down / self.rate_up
        return replace(self, rate_up=self.rate_up if up is None else up, rate_down=down)

    def to_settings(self) -> dict[str, Any]:
        """Return what the card's `settings` hold: everything but rank and alpha, which have fields of their own."""
        return {name: value for name, value in asdict(self).items() if name not in ("rank", "alpha")}


PRESETS: dict[str, Recipe] = {
    "paper": Recipe(
        OFFICIAL,
        iterations=200,
        rate_down=3e-5,
        rate_up=3e-5,
        guidance_scale=9.0,
        schedule_steps=50,
        batch=1,
        preserved=0,
        preservation_weight=0.0,
        kept_trajectories=0,
        check=0,
    ),
    "selective": Recipe(),
}


@dataclass(frozen=True)
class Pair:
    """A prompt to erase, and the prompt whose prediction takes its place."""

    target: str
    reference: str


@dataclass(frozen=True)
class Prompts:
    """What is trained: names that the predictor understands.

    Args:
        erased: the first is the concept's own; the official loop trains no other.
        kept: prompts to hold to the base model; the selective loop only.
        neutral: the empty prompt, for guidance.
    Raises: ValueError if nothing is to be erased, or a prompt shall be replaced by itself.
    """

    erased: tuple[Pair, ...]
    kept: tuple[str, ...] = ()
    neutral: str = ""

    def __post_init__(self) -> None:
        if not self.erased:
            raise ValueError("there is no prompt to erase; give the concept's own prompt and a reference")
        for pair in self.erased:
            if pair.target.casefold().split() == pair.reference.casefold().split():
                raise ValueError(
                    f"the prompt to erase and its reference are both {pair.target!r}, so there is nothing to learn; "
                    "use as reference what shall be drawn in place of the concept"
                )
        both = sorted({pair.target for pair in self.erased} & set(self.kept))
        if both:
            raise ValueError(f"{both[0]!r} shall be erased and kept; remove it from one of the two lists")

    def looked_at(self, recipe: Recipe) -> "Prompts":
        """Return those that the recipe's loop looks at: the official one knows the concept's own prompt alone."""
        return self if recipe.loop != OFFICIAL else Prompts(self.erased[:1], (), self.neutral)

    @property
    def names(self) -> tuple[str, ...]:
        """All prompts, each once."""
        pairs = (name for pair in self.erased for name in (pair.target, pair.reference))
        return tuple(dict.fromkeys((*pairs, *self.kept, self.neutral)))


def fresh_layers(features: Mapping[str, tuple[int, int]], recipe: Recipe) -> dict[str, LowRank]:
    """Return untrained layers; each is drawn from the seed and its own name, so that their order does not matter.

    Args:
        features: (in, out) of every layer by name.
    """
    made = {}
    for name, (n_in, n_out) in features.items():
        digest = hashlib.sha256(f"{recipe.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        made[name] = initial_low_rank(n_in, n_out, recipe.rank, recipe.alpha / recipe.rank, generator)
    return made


# ---------------------------------------------------------------- latents


@dataclass(frozen=True)
class Draw:
    """The random numbers of one official iteration.

    Args:
        till_t: the official code's `t_enc`, which step of the schedule to stop at.
        timestep: at which the models are evaluated, drawn from the run's `probe_timesteps`.
        noise: unit noise to start from, [1, C, ...].
    """

    till_t: int
    timestep: int
    noise: Tensor

    @classmethod
    def random(cls, recipe: Recipe, shape: Sequence[int], generator: torch.Generator) -> "Draw":
        """Return the next one."""
        till_t = int(torch.randint(recipe.schedule_steps, (), generator=generator))
        times = official_run(recipe.schedule_steps, till_t).probe_timesteps
        timestep = int(torch.randint(*times, (), generator=generator))
        return cls(till_t, timestep, torch.randn((1, *shape), generator=generator))


def sampled_timesteps(steps: int) -> list[int]:
    """Return the timesteps of a whole denoising of `steps` steps, falling: evenly spaced from 999, without 0."""
    return [round(999 * (1 - i / steps)) for i in range(steps)]


@dataclass(frozen=True)
class Latents:
    """Latents met while denoising, each with its prompt and what was predicted there for that prompt.

    Args:
        z: variance-preserving, [N, C, ...].
        timesteps: [N].
        prompts: N of them.
        eps: predicted noise, [N, C, ...].
    """

    z: Tensor
    timesteps: Tensor
    prompts: tuple[str, ...]
    eps: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Tensor) -> "Latents":
        rows = rows.to(self.z.device)
        prompts = tuple(self.prompts[i] for i in rows.tolist())
        return Latents(self.z[rows], self.timesteps[rows], prompts, self.eps[rows])


class Sampler:
    """Predictions and denoising in portions, with the number of evaluations spent.

    Args:
        predict: the predictor.
        neutral: the empty prompt.
        rows: of a forward, at most.
        sigmas: the noise level of each timestep, rising, [1000]; None takes Stable Diffusion's.
    """

    def __init__(self, predict: Predictor, neutral: str, rows: int = 32, sigmas: Tensor | None = None):
        self.predict, self.neutral, self.rows = predict, neutral, rows
        self.evaluations, self.note = 0, ""
        self.sigmas = sigma_from_alpha_cumprod(sd_alphas_cumprod()) if sigmas is None else sigmas.double()

    def eps(self, z: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the predicted noise of any number of rows.

        Where memory runs out while no gradients are computed, portions are halved and it is tried again.
        """
        while True:
            parts = [slice(i, i + self.rows) for i in range(0, len(prompts), self.rows)]
            try:
                predicted = torch.cat([self.predict(z[p], timesteps[p], prompts[p]) for p in parts])
            except RuntimeError as error:
                if not is_out_of_memory(error) or torch.is_grad_enabled() or self.rows == 1:
                    raise
                self.halve(len(prompts))
            else:
                self.evaluations += len(prompts)
                return predicted

    def halve(self, rows: int) -> None:
        """Computes half as many rows at once from now on, after so many ran out of memory."""
        self.rows = max(1, min(self.rows, rows) // 2)
        self.note = f"Memory ran out: latents are now computed {self.rows} at once, slower."
        log.warning("UnGuide: %s", self.note)

    def trajectory(
        self,
        noise: Tensor,
        timesteps: Sequence[int],
        end_sigma: float,
        prompts: Sequence[str],
        guidance_scale: float,
        noted: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Return the variance-preserving latents at the end of a deterministic denoising with guidance.

        Args:
            noise: unit noise, [B, C, ...].
            timesteps: that are evaluated, falling.
            end_sigma: the noise level of the result.
            prompts: one a row.
            noted: called before each step with the latents, their timesteps and the predictions for `prompts`.
        """
        count, neutral = len(prompts), [self.neutral] * len(prompts)
        levels = [*self.sigmas[list(timesteps)].tolist(), end_sigma]
        now = iter(timesteps)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            level, times = float(sigma[0]), torch.full((count,), next(now), device=x.device)
            z = from_sigma_space(x, level)
            if guidance_scale == 1.0:
                cond = guided = self.eps(z, times, prompts)
            else:
                both = self.eps(torch.cat([z, z]), torch.cat([times, times]), [*prompts, *neutral])
                cond, uncond = both.chunk(2)
                guided = classifier_free(cond, uncond, guidance_scale)
            if noted is not None:
                noted(z, times, cond)
            return x - level * guided

        x = to_sigma_space(noise, levels[0])
        x = partial_denoise(denoise, x, torch.tensor(levels, dtype=torch.float64))
        return from_sigma_space(x, levels[-1])

    def met(self, noise: Tensor, steps: int, prompts: Sequence[str], guidance_scale: float) -> Latents:
        """Return the latents of all steps of whole trajectories, one a prompt, with the predictions made there."""
        z, times, eps = [], [], []

        def noted(latent: Tensor, timesteps: Tensor, prediction: Tensor) -> None:
            z.append(latent)
            times.append(timesteps)
            eps.append(prediction)

        self.trajectory(noise, sampled_timesteps(steps), 0.0, prompts, guidance_scale, noted)
        return Latents(torch.cat(z), torch.cat(times), tuple(prompts) * steps, torch.cat(eps))

    def official_latent(self, draw: Draw, recipe: Recipe, prompt: str) -> Tensor:
        """Return the latent of an official iteration, [1, C, ...], variance-preserving."""
        run: OfficialRun = official_run(recipe.schedule_steps, draw.till_t)
        end = float(self.sigmas[run.end_timestep])
        return self.trajectory(draw.noise, run.timesteps, end, [prompt], recipe.guidance_scale)


# ---------------------------------------------------------------- the loop


@dataclass(frozen=True)
class Progress:
    """Where training stands after an iteration.

    Args:
        iteration: how many are done, of `iterations`.
        loss: of this iteration; `erasure` and `preservation` are its parts.
        held_out: the last look at the held-out loss, relative to that of the untrained adapter; None before the first.
        evaluations: of the network so far.
    """

    iteration: int
    iterations: int
    loss: float
    erasure: float
    preservation: float
    held_out: float | None
    evaluations: int


@dataclass
class Batch:
    """What an iteration trains at: erased rows with their targets, then kept rows with the base's predictions."""

    z: Tensor
    timesteps: Tensor
    prompts: tuple[str, ...]
    goals: Tensor
    erased: int

    def parts(self, rows: int) -> Iterator["Batch"]:
        """Yield it in portions of at most `rows`, none with erased and kept rows both unless it is the whole."""
        if len(self.prompts) <= rows:
            yield self
            return
        for begin, end in ((0, self.erased), (self.erased, len(self.prompts))):
            for i in range(begin, end, rows):
                p = slice(i, min(i + rows, end))
                count = p.stop - p.start if end == self.erased else 0
                yield Batch(self.z[p], self.timesteps[p], self.prompts[p], self.goals[p], count)


@dataclass
class _State:
    """What a checkpoint holds beside layers and optimiser."""

    iteration: int = 0
    evaluations: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)


class Training:
    """One adapter in training. Iterate over `run()`; the layers hold what was learnt so far at any time.

    Args:
        predict: the model, in which `layers` act within `predict.adapted()`.
        layers: trainable, changed in place.
        prompts: what to erase and to keep.
        shape: of one latent, [C, ...].
        device: of the latents.
        rows: of a forward, at most; more are computed in portions, which changes nothing but time and memory.
        relieve: called when a step ran out of memory; true if it has made room and the step shall be tried again.
            Without it, or where it cannot, portions are halved.
        loss_scale: factor on the loss while gradients are computed, for models that compute in half precision.
        sigmas: as for `Sampler`.
        draws: the official iterations' random numbers, in place of those of the recipe's seed.
    """

    def __init__(
        self,
        predict: Predictor,
        layers: Mapping[str, LowRank],
        prompts: Prompts,
        recipe: Recipe,
        shape: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        rows: int = 32,
        relieve: Callable[[], bool] | None = None,
        loss_scale: float = 1.0,
        sigmas: Tensor | None = None,
        draws: Iterator[Draw] | None = None,
    ):
        self.predict, self.layers, self.prompts, self.recipe = predict, dict(layers), prompts, recipe
        self.shape, self.device, self.relieve, self.loss_scale = tuple(shape), device, relieve, loss_scale
        self.sampler = Sampler(predict, prompts.neutral, rows, sigmas)
        self.optimizer = optimizer_of(layers, recipe)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.draws = draws
        self._state = _State()
        self._held_out: tuple[Batch, float] | None = None

    @property
    def losses(self) -> list[float]:
        """The loss of every iteration so far."""
        return self._state.losses

    @property
    def held_out(self) -> list[float]:
        """Every look at the held-out loss so far, relative to the untrained adapter's."""
        return self._state.held_out

    @property
    def iteration(self) -> int:
        """How many iterations are done."""
        return self._state.iteration

    @property
    def settings(self) -> dict[str, Any]:
        """What the card's `settings` say of it: the recipe, the iterations done of those asked for, evaluations."""
        done = {"iterations": self.iteration, "asked_iterations": self.recipe.iterations}
        return {**self.recipe.to_settings(), **done, "evaluations": self.sampler.evaluations}

    def run(self) -> Iterator[Progress]:
        """Yield after every iteration; leave the loop to stop.

        Raises: TrainingError if the loss is not finite or grows without bound.
        """
        batches = self._official_batches() if self.recipe.loop == OFFICIAL else self._selective_batches()
        self.sampler.evaluations = self._state.evaluations
        for batch in batches:
            erasure, preservation = self._learn(batch)
            self._state.losses.append(erasure + preservation)
            self._state.iteration += 1
            self._require_convergence()
            self._look()
            self._state.evaluations = self.sampler.evaluations
            yield Progress(
                self._state.iteration,
                self.recipe.iterations,
                erasure + preservation,
                erasure,
                preservation,
                self._state.held_out[-1] if self._state.held_out else None,
                self._state.evaluations,
            )
            if _plateau(self._state.held_out, self.recipe.patience):
                return

    @property
    def resumable(self) -> bool:
        """Whether a checkpoint made now continues exactly: no latents are waiting to be used."""
        return self.recipe.loop == OFFICIAL or self._state.iteration % self.recipe.refresh == 0

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` continues from, tensors and plain values; see `resumable`."""
        return {
            "layers": {name: [layer.down.detach(), layer.up.detach()] for name, layer in self.layers.items()},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "state": asdict(self._state),
            "task": self._task(),
        }

    def _task(self) -> dict[str, Any]:
        """What a checkpoint must agree in, as plain values."""
        pairs = [[pair.target, pair.reference] for pair in self.prompts.erased]
        prompts = {"erased": pairs, "kept": list(self.prompts.kept), "neutral": self.prompts.neutral}
        return {"recipe": asdict(self.recipe), "prompts": prompts, "latent": list(self.shape)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises: ValueError if it is of another recipe, other prompts, layers or latents; the message says of which.
        """
        own = self._task() | {"layers": sorted(self.layers)}
        there = saved["task"] | {"layers": sorted(saved["layers"])}
        if other := [name for name, value in own.items() if there.get(name) != value]:
            raise ValueError(
                f"the checkpoint is of another training: it has other values of {', '.join(other)}; remove it to begin "
                "anew, or train with its settings"
            )
        with torch.no_grad():
            for name, (down, up) in saved["layers"].items():
                self.layers[name].down.copy_(down)
                self.layers[name].up.copy_(up)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["generator"])
        self._state = _State(**saved["state"])

    # -------------------------------------------------------- batches

    def _official_batches(self) -> Iterator[Batch]:
        pair = self.prompts.erased[0]
        while self._state.iteration < self.recipe.iterations:
            draw = next(self.draws) if self.draws else Draw.random(self.recipe, self.shape, self.generator)
            draw = Draw(draw.till_t, draw.timestep, draw.noise.to(self.device))
            with torch.no_grad(), self.predict.adapted():
                z = self.sampler.official_latent(draw, self.recipe, pair.target)
            times = torch.full((1,), draw.timestep, device=z.device)
            yield self._erased(z, times, (pair,))

    def _erased(self, z: Tensor, times: Tensor, pairs: Sequence[Pair], eps_target: Tensor | None = None) -> Batch:
        """The rows with their targets, from the base model's predictions; that for the target may be known."""
        targets, references = tuple(p.target for p in pairs), tuple(p.reference for p in pairs)
        with torch.no_grad():
            if eps_target is None:
                both = self.sampler.eps(torch.cat([z, z]), torch.cat([times, times]), targets + references)
                eps_target, eps_reference = both.chunk(2)
            else:
                eps_reference = self.sampler.eps(z, times, references)
            goals = erasure_target(eps_reference, eps_target, self.recipe.negative_guidance)
        return Batch(z, times, targets, goals, len(targets))

    def _selective_batches(self) -> Iterator[Batch]:
        recipe = self.recipe
        kept = self._prepared()
        while self._state.iteration < recipe.iterations:
            pool = self._refreshed()
            order = self._shuffled(len(pool.prompts))
            others = self._shuffled(len(kept)) if kept else None
            for _ in range(min(recipe.refresh, recipe.iterations - self._state.iteration)):
                yield self._mixed(pool, _take(order, recipe.batch), kept, others)

    def _prepared(self) -> Latents | None:
        """Latents of prompts to keep; besides, the held-out ones are set aside. All are the base model's own."""
        recipe, generator = self.recipe, torch.Generator().manual_seed(self.recipe.seed + 1)
        kept = None
        if recipe.preserved and recipe.kept_trajectories and self.prompts.kept:
            count = max(recipe.kept_trajectories, len(self.prompts.kept))
            prompts = [self.prompts.kept[i % len(self.prompts.kept)] for i in range(count)]
            kept = self._met_by_base(prompts, generator)
        if recipe.check:
            pairs = self.prompts.erased[:2]
            met = self._met_by_base([pair.target for pair in pairs], generator)
            chosen = torch.linspace(0, len(met) - 1, min(HELD_OUT, len(met))).long()
            part = met[chosen]
            batch = self._erased(part.z, part.timesteps, [pairs[i % len(pairs)] for i in chosen.tolist()], part.eps)
            untrained = float(erasure_loss(part.eps, batch.goals))
            if untrained < LEAST_TO_LEARN:
                target, reference = pairs[0].target, pairs[0].reference
                raise TrainingError(
                    f"the model draws the same for {target!r} and {reference!r} (they differ by {untrained:.2g}), so "
                    "there is nothing to learn; use another reference"
                )
            self._held_out = batch, untrained
        return kept

    def _met_by_base(self, prompts: Sequence[str], generator: torch.Generator) -> Latents:
        noise = self._noise(len(prompts), generator)
        with torch.no_grad():
            return self.sampler.met(noise, self.recipe.schedule_steps, prompts, self.recipe.guidance_scale)

    def _refreshed(self) -> Batch:
        """Latents that the adapted model meets while denoising prompts to erase, with their targets."""
        recipe, erased = self.recipe, self.prompts.erased
        known = self._state.iteration == 0  # the adapter changes nothing yet: these are the base model's predictions
        # half of the trajectories are the concept's own prompt and the first others; the rest is drawn from all
        chosen = torch.randint(len(erased), (recipe.trajectories,), generator=self.generator).tolist()
        chosen[: (recipe.trajectories + 1) // 2] = [i % len(erased) for i in range((recipe.trajectories + 1) // 2)]
        pairs = [erased[i] for i in chosen]
        noise = self._noise(recipe.trajectories, self.generator)
        with torch.no_grad(), nullcontext() if known else self.predict.adapted():
            met = self.sampler.met(noise, recipe.schedule_steps, [p.target for p in pairs], recipe.guidance_scale)
        used = min(len(met), recipe.refresh * recipe.batch)
        rows = torch.randperm(len(met), generator=self.generator)[:used]
        part = met[rows]
        return self._erased(
            part.z, part.timesteps, [pairs[i % len(pairs)] for i in rows.tolist()], part.eps if known else None
        )

    def _noise(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randn((count, *self.shape), generator=generator).to(self.device)

    def _shuffled(self, count: int) -> Iterator[int]:
        """Row numbers for ever, each once before any comes again."""
        while True:
            yield from torch.randperm(count, generator=self.generator).tolist()

    def _mixed(self, pool: Batch, rows: Tensor, kept: Latents | None, others: Iterator[int] | None) -> Batch:
        rows = rows.to(pool.z.device)
        z, times, goals = pool.z[rows], pool.timesteps[rows], pool.goals[rows]
        prompts = tuple(pool.prompts[i] for i in rows.tolist())
        if kept is None or others is None:
            return Batch(z, times, prompts, goals, len(prompts))
        same = kept[_take(others, self.recipe.preserved)]
        return Batch(
            torch.cat([z, same.z]),
            torch.cat([times, same.timesteps]),
            prompts + same.prompts,
            torch.cat([goals, same.eps]),
            len(prompts),
        )

    # -------------------------------------------------------- steps

    def _learn(self, batch: Batch) -> tuple[float, float]:
        """Takes one step of the optimiser; returns the losses of the erased and of the kept rows."""
        while True:
            try:
                losses = self._gradients(batch)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if not (self.relieve and self.relieve()):
                    if self.sampler.rows == 1:
                        raise
                    self.sampler.halve(len(batch.prompts))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.loss_scale != 1.0:
            for parameter in parameters:
                parameter.grad /= self.loss_scale
        if all(bool(parameter.grad.isfinite().all()) for parameter in parameters):
            self.optimizer.step()
        elif self.loss_scale > 1.0 and all(map(math.isfinite, losses)):
            self.loss_scale /= 2.0  # the gradients overflowed: this step is left out
        else:
            raise TrainingError(self._diverged("gradients are not finite", self.iteration + 1))
        return losses

    def _gradients(self, batch: Batch) -> tuple[float, float]:
        """Leaves the loss's gradients in the layers; returns the losses of the erased and of the kept rows."""
        self.optimizer.zero_grad()
        erased, kept = batch.erased, len(batch.prompts) - batch.erased
        sums = [0.0, 0.0]
        for part in batch.parts(self.sampler.rows):
            with self.predict.adapted():  # until gradients are there: checkpointing computes the forward again
                eps = self.sampler.eps(part.z, part.timesteps, part.prompts)
                n, loss = part.erased, eps.new_zeros(())
                if n:
                    loss = erasure_loss(eps[:n], part.goals[:n]) * (n / erased)
                    sums[0] += float(loss.detach())
                if n < len(part.prompts):
                    share = (len(part.prompts) - n) / kept
                    same = preservation_loss(eps[n:], part.goals[n:], self.recipe.preservation_weight) * share
                    sums[1] += float(same.detach())
                    loss = loss + same
                (loss * self.loss_scale).backward()  # type: ignore[no-untyped-call]
        return sums[0], sums[1]

    def _look(self) -> None:
        """Takes the held-out loss where it is time to."""
        if self._held_out is None or self._state.iteration % self.recipe.check:
            return
        batch, untrained = self._held_out
        with torch.no_grad(), self.predict.adapted():
            eps = self.sampler.eps(batch.z, batch.timesteps, batch.prompts)
        self._state.held_out.append(float(erasure_loss(eps, batch.goals)) / untrained)

    def _require_convergence(self) -> None:
        losses = self._state.losses
        if not math.isfinite(losses[-1]):
            raise TrainingError(self._diverged(f"the loss is {losses[-1]}", self.iteration))
        if losses[-1] > 1e4 * max(losses[0], 1e-6):
            rose = f"the loss rose from {losses[0]:.3g} to {losses[-1]:.3g}"
            raise TrainingError(self._diverged(rose, self.iteration))

    def _diverged(self, what: str, iteration: int) -> str:
        rates = f"{self.recipe.rate_down:g} (down) and {self.recipe.rate_up:g} (up)"
        return (
            f"training diverged at iteration {iteration}: {what}; the learning rates are {rates}: "
            "lower them, tenfold for a start, or check that the model draws sensible pictures"
        )


def optimizer_of(layers: Mapping[str, LowRank], recipe: Recipe) -> torch.optim.Adam:
    """Return Adam over the layers, with a learning rate for each of the two factors."""
    downs, ups = [layer.down for layer in layers.values()], [layer.up for layer in layers.values()]
    return torch.optim.Adam([{"params": downs, "lr": recipe.rate_down}, {"params": ups, "lr": recipe.rate_up}])


def _take(numbers: Iterator[int], count: int) -> Tensor:
    return torch.tensor([next(numbers) for _ in range(count)])


def _plateau(looks: Sequence[float], patience: int, gain: float = 0.02) -> bool:
    """Whether the last `patience` looks brought no improvement of at least `gain` on the best before them."""
    return len(looks) > patience and min(looks[-patience:]) > min(looks[:-patience]) - gain
