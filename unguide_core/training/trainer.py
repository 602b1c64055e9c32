"""The training loop of erasure adapters. The objective is in objective.py, the two kinds of loop in recipe.py.

Does not know the model or the host program: a `Predictor` predicts noise for prompts that it knows by name.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapter.lowrank import LowRank, initial_low_rank
from ..objective import erasure_loss, erasure_target, preservation_loss
from .prompts import Pair, TrainingPrompts
from .recipe import OFFICIAL, Recipe
from .rollout import Denoiser, Draw, Latents, Predictor, is_out_of_memory, sampled_timesteps

HELD_OUT = 8
"""Number of latents that the held-out loss is measured at."""
LEAST_TO_LEARN = 1e-7
"""Below this erasure loss of the untrained adapter, the model does not tell target and reference apart."""
FP16_LOSS_SCALE = 2.0**12
"""For models that compute in half precision: the initial factor on the loss while gradients are computed."""


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why and what to change."""


def fresh_layers(features: Mapping[str, tuple[int, int]], recipe: Recipe) -> dict[str, LowRank]:
    """Return untrained layers. Each one's numbers follow from the seed and its name, whatever the order of the layers.

    Args:
        features: (in, out) of every layer by name.
    """
    made = {}
    for name, (n_in, n_out) in features.items():
        digest = hashlib.sha256(f"{recipe.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        made[name] = initial_low_rank(n_in, n_out, recipe.rank, recipe.alpha / recipe.rank, generator)
    return made


def optimizer_of(layers: Mapping[str, LowRank], recipe: Recipe) -> torch.optim.Adam:
    """Return Adam over the layers, with a learning rate for each of the two factors."""
    downs, ups = [layer.down for layer in layers.values()], [layer.up for layer in layers.values()]
    return torch.optim.Adam([{"params": downs, "lr": recipe.rate_down}, {"params": ups, "lr": recipe.rate_up}])


@dataclass(frozen=True)
class Progress:
    """The state of training after an iteration.

    Args:
        iteration: number of iterations done, of `iterations`.
        loss: of this iteration; `erasure` and `preservation` are its parts.
        held_out: the last held-out loss, relative to the untrained adapter's; None before the first measurement.
        evaluations: model evaluations so far.
    """

    iteration: int
    iterations: int
    loss: float
    erasure: float
    preservation: float
    held_out: float | None
    evaluations: int


@dataclass(frozen=True)
class Batch:
    """What one iteration trains at: `erased` latents of prompts to erase, then latents of prompts to keep.

    The noise in `latents.eps` is the target.
    """

    latents: Latents
    erased: int

    def parts(self, rows: int) -> Iterator["Batch"]:
        """Yield the batch in parts of at most `rows` latents, each of one kind unless a single part holds all."""
        count = len(self.latents)
        if count <= rows:
            yield self
            return
        for begin, end in ((0, self.erased), (self.erased, count)):
            for i in range(begin, end, rows):
                part = self.latents[i : min(i + rows, end)]
                yield Batch(part, len(part) if end == self.erased else 0)


class Training:
    """One adapter in training. Iterate over `run()`; the layers hold what was learned so far at any time.

    Args:
        predict: the model, which `layers` change within `predict.adapted()`.
        layers: trainable, changed in place.
        prompts: what to erase and to keep.
        shape: of one latent, [C, ...].
        device: of the latents.
        rows: maximum batch size; larger batches are split, which only changes time and memory.
        relieve: called when a step ran out of memory; returns whether it made room, so that the step is tried again.
            Without it, or if it cannot, the batch size is halved.
        loss_scale: factor on the loss while gradients are computed, for models that compute in half precision.
        sigmas: as for `Denoiser`.
        draws: the official iterations' random numbers; None samples them from the recipe's seed.
        watch: called while the selective loop generates latents to train at, with how many there are of how many.
        fresh: whether the layers change nothing yet; False for those that an earlier method made.
    """

    def __init__(
        self,
        predict: Predictor,
        layers: Mapping[str, LowRank],
        prompts: TrainingPrompts,
        recipe: Recipe,
        shape: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        rows: int = 32,
        relieve: Callable[[], bool] | None = None,
        loss_scale: float = 1.0,
        sigmas: Tensor | None = None,
        draws: Iterator[Draw] | None = None,
        watch: Callable[[int, int], None] | None = None,
        fresh: bool = True,
    ):
        self.predict, self.layers, self.prompts, self.recipe = predict, dict(layers), prompts, recipe
        self.shape, self.device, self.relieve, self.loss_scale = tuple(shape), device, relieve, loss_scale
        self.denoiser = Denoiser(predict, prompts.neutral, rows, sigmas)
        self.optimizer = optimizer_of(layers, recipe)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.draws, self.watch, self.fresh = draws, watch, fresh
        self._generated = self._to_generate = 0
        self.losses: list[float] = []  # of every iteration
        self.held_out: list[float] = []  # every held-out loss, relative to the untrained adapter's
        self._held_out: tuple[Latents, float] | None = None

    @property
    def iteration(self) -> int:
        """The number of iterations done."""
        return len(self.losses)

    @property
    def settings(self) -> dict[str, Any]:
        """The card's `settings`: the recipe, the iterations done and asked for, and the model evaluations."""
        done = {"iterations": self.iteration, "asked_iterations": self.recipe.iterations}
        return {**self.recipe.to_settings(), **done, "evaluations": self.denoiser.evaluations}

    def run(self) -> Iterator[Progress]:
        """Yield after every iteration; leave the loop to stop.

        Raises: TrainingError if the loss is not finite or grows without bound.
        """
        for batch in self._official_batches() if self.recipe.loop == OFFICIAL else self._selective_batches():
            erasure, preservation = self._learn(batch)
            self.losses.append(erasure + preservation)
            self._require_convergence()
            self._measure_held_out()
            yield Progress(
                self.iteration,
                self.recipe.iterations,
                self.losses[-1],
                erasure,
                preservation,
                self.held_out[-1] if self.held_out else None,
                self.denoiser.evaluations,
            )
            if _plateau(self.held_out, self.recipe.patience):
                return

    # -------------------------------------------------------- checkpoints

    @property
    def resumable(self) -> bool:
        """Whether a checkpoint of this moment resumes exactly: no sampled latents are still to be used."""
        return self.recipe.loop == OFFICIAL or self.iteration % self.recipe.refresh == 0

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` resumes from, tensors and plain values; see `resumable`."""
        return {
            "layers": {name: [layer.down.detach(), layer.up.detach()] for name, layer in self.layers.items()},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "state": {
                "losses": [*self.losses],
                "held_out": [*self.held_out],
                "evaluations": self.denoiser.evaluations,
                "loss_scale": self.loss_scale,
            },
            "task": self._task(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`.

        Raises: ValueError if the recipe, prompts, layers or latents differ; the message says which.
        """
        own = self._task() | {"layers": sorted(self.layers)}
        there = saved["task"] | {"layers": sorted(saved["layers"])}
        if other := [name for name, value in own.items() if there.get(name) != value]:
            raise ValueError(
                f"the checkpoint is from another training: it has other values of {', '.join(other)}; remove it to "
                "start again, or train with its settings"
            )
        with torch.no_grad():
            for name, (down, up) in saved["layers"].items():
                self.layers[name].down.copy_(down)
                self.layers[name].up.copy_(up)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["generator"])
        state = saved["state"]
        self.losses, self.held_out = list(state["losses"]), list(state["held_out"])
        self.denoiser.evaluations, self.loss_scale = state["evaluations"], state["loss_scale"]

    def _task(self) -> dict[str, Any]:
        """What must be the same in a checkpoint, as plain values."""
        pairs = [[pair.target, pair.reference] for pair in self.prompts.erased]
        prompts = {"erased": pairs, "kept": list(self.prompts.kept), "neutral": self.prompts.neutral}
        return {"recipe": asdict(self.recipe), "prompts": prompts, "latent": list(self.shape)}

    # -------------------------------------------------------- batches

    def _official_batches(self) -> Iterator[Batch]:
        pair = self.prompts.erased[0]
        while self.iteration < self.recipe.iterations:
            draw = next(self.draws) if self.draws else Draw.random(self.recipe, self.shape, self.generator)
            with torch.no_grad(), self.predict.adapted():
                draw = replace(draw, noise=draw.noise.to(self.device))
                z = self.denoiser.official_latent(draw, self.recipe, pair.target)
            times = torch.full((1,), draw.timestep, device=z.device)
            yield Batch(self._with_targets(z, times, (pair,)), 1)

    def _with_targets(self, z: Tensor, times: Tensor, pairs: Sequence[Pair], eps: Tensor | None = None) -> Latents:
        """Latents of prompts to erase with their targets; `eps` is the base model's prediction, if it is known."""
        targets, references = tuple(p.target for p in pairs), tuple(p.reference for p in pairs)
        with torch.no_grad():
            if eps is None:
                both = self.denoiser.eps(torch.cat([z, z]), torch.cat([times, times]), targets + references)
                eps, eps_reference = both.chunk(2)
            else:
                eps_reference = self.denoiser.eps(z, times, references)
            return Latents(z, times, targets, erasure_target(eps_reference, eps, self.recipe.negative_guidance))

    def _selective_batches(self) -> Iterator[Batch]:
        recipe = self.recipe
        first = len(self._kept_trajectories) + len(self._checked) + recipe.trajectories
        self._generated, self._to_generate = 0, first * recipe.schedule_steps
        kept = self._prepared()
        while self.iteration < recipe.iterations:
            if self._generated >= self._to_generate:
                self._generated, self._to_generate = 0, recipe.trajectories * recipe.schedule_steps
            pool = self._refreshed()
            order = self._shuffled(len(pool))
            kept_order = self._shuffled(len(kept)) if kept else None
            for _ in range(min(recipe.refresh, recipe.iterations - self.iteration)):
                latents = pool[_take(order, recipe.batch)]
                if kept is not None and kept_order is not None:
                    latents = Latents.joined([latents, kept[_take(kept_order, recipe.preserved)]])
                yield Batch(latents, recipe.batch)

    @property
    def _kept_trajectories(self) -> list[str]:
        """The prompts to keep, one for each of the base model's trajectories."""
        recipe, kept = self.recipe, self.prompts.kept
        if not (recipe.preserved and recipe.kept_trajectories and kept):
            return []
        return [kept[i % len(kept)] for i in range(max(recipe.kept_trajectories, len(kept)))]

    @property
    def _checked(self) -> tuple[Pair, ...]:
        """The prompts of the held-out loss."""
        return self.prompts.erased[:2] if self.recipe.check else ()

    def _prepared(self) -> Latents | None:
        """The base model's latents of prompts to keep; sets those of the held-out loss aside."""
        generator = torch.Generator().manual_seed(self.recipe.seed + 1)
        trajectories, pairs = self._kept_trajectories, self._checked
        kept = self._visited(trajectories, generator) if trajectories else None
        if pairs:
            visited = self._visited([pair.target for pair in pairs], generator)
            chosen = torch.linspace(0, len(visited) - 1, min(HELD_OUT, len(visited))).long()
            part, of = visited[chosen], [pairs[i % len(pairs)] for i in chosen.tolist()]
            held_out = self._with_targets(part.z, part.timesteps, of, part.eps)
            untrained = float(erasure_loss(part.eps, held_out.eps))
            if untrained < LEAST_TO_LEARN:
                raise TrainingError(
                    f"the model predicts the same for {pairs[0].target!r} and {pairs[0].reference!r} (the loss is "
                    f"{untrained:.2g}), so there is nothing to learn; use another reference"
                )
            self._held_out = held_out, untrained
        return kept

    def _refreshed(self) -> Latents:
        """Latents of the adapted model's rollouts of prompts to erase, with their targets."""
        recipe, pairs = self.recipe, self._pairs_to_roll_out()
        untrained = self.fresh and self.iteration == 0  # its predictions are the base model's
        with nullcontext() if untrained else self.predict.adapted():
            visited = self._visited([pair.target for pair in pairs], self.generator)
        used = min(len(visited), recipe.refresh * recipe.batch)
        rows = torch.randperm(len(visited), generator=self.generator)[:used]
        part, of = visited[rows], [pairs[i % len(pairs)] for i in rows.tolist()]
        return self._with_targets(part.z, part.timesteps, of, part.eps if untrained else None)

    def _pairs_to_roll_out(self) -> list[Pair]:
        """The pairs of the next trajectories: half with the reference of the concept's own prompt, half with others.

        With fewer of the first kind the adapter learns to remove the concept, but not what takes its place.
        """
        erased, count = self.prompts.erased, self.recipe.trajectories
        own = [pair for pair in erased if pair.reference == erased[0].reference]
        others = [pair for pair in erased if pair.reference != erased[0].reference]
        half = (count + 1) // 2 if others else count
        return [*self._in_turn(own, half), *self._in_turn(others, count - half)]

    def _in_turn(self, pairs: Sequence[Pair], count: int) -> list[Pair]:
        """The next `count` pairs of an order in which each comes once, the first one first, before any is repeated."""
        order, begun = list[int](), self.iteration // self.recipe.refresh * count
        generator = torch.Generator().manual_seed(self.recipe.seed + 2)
        while len(order) < begun + count:
            order += [0, *(1 + torch.randperm(len(pairs) - 1, generator=generator)).tolist()]
        return [pairs[i] for i in order[begun : begun + count]]

    def _visited(self, prompts: Sequence[str], generator: torch.Generator) -> Latents:
        """The latents of full rollouts, one trajectory per prompt."""
        recipe = self.recipe
        noise = torch.randn((len(prompts), *self.shape), generator=generator).to(self.device)
        with torch.no_grad():
            timesteps = sampled_timesteps(recipe.schedule_steps)
            return self.denoiser.rollout(noise, timesteps, 0.0, prompts, recipe.guidance_scale, self._count).visited

    def _count(self, latents: int) -> None:
        self._generated += latents
        if self.watch is not None:
            self.watch(self._generated, self._to_generate)

    def _shuffled(self, count: int) -> Iterator[int]:
        """Row numbers without end, each once before any is repeated."""
        while True:
            yield from torch.randperm(count, generator=self.generator).tolist()

    # -------------------------------------------------------- steps

    def _learn(self, batch: Batch) -> tuple[float, float]:
        """Takes one optimiser step; returns the losses of the prompts to erase and to keep."""
        while True:
            try:
                losses = self._gradients(batch)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if not (self.relieve and self.relieve()):
                    if self.denoiser.rows == 1:
                        raise
                    self.denoiser.halve(len(batch.latents))
        self._set_rates()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.loss_scale != 1.0:
            for parameter in parameters:
                parameter.grad /= self.loss_scale
        if all(bool(parameter.grad.isfinite().all()) for parameter in parameters):
            self.optimizer.step()
        elif self.loss_scale > 1.0 and all(map(math.isfinite, losses)):
            self.loss_scale /= 2.0  # the gradients overflowed: this step is skipped
        else:
            raise self._diverged("gradients are not finite", self.iteration + 1)
        return losses

    def _set_rates(self) -> None:
        """Lowers the selective loop's rate of `up` linearly, to nothing after the last iteration."""
        if self.recipe.loop != OFFICIAL:
            _, ups = self.optimizer.param_groups
            ups["lr"] = self.recipe.rate_up * (1.0 - self.iteration / self.recipe.iterations)

    def _gradients(self, batch: Batch) -> tuple[float, float]:
        """Computes the layers' gradients; returns the losses of the prompts to erase and to keep."""
        self.optimizer.zero_grad()
        kept, sums = len(batch.latents) - batch.erased, [0.0, 0.0]
        for part in batch.parts(self.denoiser.rows):
            with self.predict.adapted():  # the backward pass too: checkpointing repeats the forward there
                latents, n = part.latents, part.erased
                eps = self.denoiser.eps(latents.z, latents.timesteps, latents.prompts)
                loss = eps.new_zeros(())
                if n:
                    loss = erasure_loss(eps[:n], latents.eps[:n]) * (n / batch.erased)
                    sums[0] += float(loss.detach())
                if n < len(latents):
                    share, weight = (len(latents) - n) / kept, self.recipe.preservation_weight
                    same = preservation_loss(eps[n:], latents.eps[n:], weight) * share
                    sums[1] += float(same.detach())
                    loss = loss + same
                (loss * self.loss_scale).backward()  # type: ignore[no-untyped-call]
        return sums[0], sums[1]

    def _measure_held_out(self) -> None:
        """Measures the held-out loss every `recipe.check` iterations."""
        if self._held_out is None or self.iteration % self.recipe.check:
            return
        latents, untrained = self._held_out
        with torch.no_grad(), self.predict.adapted():
            eps = self.denoiser.eps(latents.z, latents.timesteps, latents.prompts)
        self.held_out.append(float(erasure_loss(eps, latents.eps)) / untrained)

    def _require_convergence(self) -> None:
        first, last = self.losses[0], self.losses[-1]
        if not math.isfinite(last):
            raise self._diverged(f"the loss is {last}", self.iteration)
        if last > 1e4 * max(first, 1e-6):
            raise self._diverged(f"the loss rose from {first:.3g} to {last:.3g}", self.iteration)

    def _diverged(self, what: str, iteration: int) -> TrainingError:
        rates = f"{self.recipe.rate_down:g} (down) and {self.recipe.rate_up:g} (up)"
        return TrainingError(
            f"training diverged at iteration {iteration}: {what}; the learning rates are {rates}: "
            "lower them, tenfold to begin with, or check that the model generates sensible images"
        )


def _take(numbers: Iterator[int], count: int) -> Tensor:
    return torch.tensor([next(numbers) for _ in range(count)])


def _plateau(losses: Sequence[float], patience: int, gain: float = 0.02) -> bool:
    """Whether the last `patience` losses do not improve by at least `gain` on the best one before them."""
    return len(losses) > patience and min(losses[-patience:]) > min(losses[:-patience]) - gain
