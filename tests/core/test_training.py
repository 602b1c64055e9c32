"""The training loops on a network of a few numbers: what they train at, what they cost, when they stop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor

from unguide_core.adapter import LowRank
from unguide_core.schedule import official_run
from unguide_core.training.prompts import Pair, TrainingPrompts
from unguide_core.training.recipe import PRESETS, Recipe
from unguide_core.training.rollout import Draw, is_out_of_memory, sampled_timesteps
from unguide_core.training.trainer import Progress, Training, TrainingError, fresh_layers

SHAPE, WIDTH = (4, 4, 4), 6
FEATURES = {"to_k": (WIDTH, 4), "to_v": (WIDTH, 4)}
PROMPTS = TrainingPrompts((Pair("cat", "forest"), Pair("kitty", "forest")), ("", "dog", "ship"), "")
SMALL = replace(
    PRESETS["selective"],
    iterations=60,
    rate_up=1e-2,
    schedule_steps=4,
    trajectories=4,
    kept_trajectories=6,
    batch=4,
    preserved=4,
    refresh=10,
    check=0,
)
PAPER = replace(PRESETS["paper"], schedule_steps=10, iterations=3)


class Toy:
    """eps = 0.8 z + a pattern for each prompt, through two linear layers that the adapter changes."""

    def __init__(self, layers: dict[str, LowRank]):
        generator = torch.Generator().manual_seed(0)
        self.contexts = {name: torch.randn(WIDTH, generator=generator) for name in ("", "cat", "kitty", "forest")}
        self.contexts |= {name: torch.randn(WIDTH, generator=generator) for name in ("dog", "ship")}
        self.weights = {name: torch.randn(4, WIDTH, generator=generator) * 0.3 for name in layers}
        self.layers, self.adapting = layers, False
        self.calls: list[tuple[bool, tuple[str, ...]]] = []

    def __call__(self, z: Tensor, timesteps: Tensor, prompts: list[str]) -> Tensor:
        assert z.shape[0] == timesteps.shape[0] == len(prompts)
        self.calls.append((self.adapting, tuple(prompts)))
        context = torch.stack([self.contexts[prompt] for prompt in prompts])
        k, v = (self.projected(name, context)[:, :, None, None] for name in ("to_k", "to_v"))
        return 0.8 * z + v * torch.tanh(z + k) * (timesteps[:, None, None, None] / 1000)

    def projected(self, name: str, context: Tensor) -> Tensor:
        out = context @ self.weights[name].T
        return out + self.layers[name].delta(context) if self.adapting else out

    @contextmanager
    def adapted(self) -> Iterator[None]:
        before, self.adapting = self.adapting, True
        try:
            yield
        finally:
            self.adapting = before


def training(recipe: Recipe, prompts: TrainingPrompts = PROMPTS, **options) -> Training:
    layers = fresh_layers(FEATURES, recipe)
    return Training(Toy(layers), layers, prompts, recipe, SHAPE, **options)


def finished(recipe: Recipe, prompts: TrainingPrompts = PROMPTS, **options) -> tuple[Training, list[Progress]]:
    made = training(recipe, prompts, **options)
    return made, list(made.run())


def weights(made: Training) -> Tensor:
    return torch.cat([t.detach().flatten() for layer in made.layers.values() for t in (layer.down, layer.up)])


@torch.no_grad()
def moved(made: Training, prompt: str) -> float:
    """How far the adapter moves a prompt's prediction."""
    z, times = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(3)), torch.tensor([700])
    base = made.predict(z, times, [prompt])
    with made.predict.adapted():
        return float((made.predict(z, times, [prompt]) - base).norm())


def test_training_moves_the_concept_and_keeping_prompts_holds_them():
    recipe = replace(SMALL, rate_down=5e-2, iterations=100)
    kept, seen = finished(recipe)
    alone, _ = finished(replace(recipe, preserved=0))
    assert seen[-1].erasure < 0.6 * seen[0].erasure
    for prompt in ("dog", "ship", ""):
        assert moved(kept, prompt) < 0.5 * moved(alone, prompt)
        assert moved(kept, "cat") > 2 * moved(kept, prompt)


def test_the_same_seed_gives_the_same_adapter_and_another_one_another():
    first, second = finished(SMALL)[0], finished(SMALL)[0]
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(finished(replace(SMALL, seed=1))[0]))


@pytest.mark.parametrize("recipe", [SMALL, PAPER])
def test_evaluations_are_counted_row_by_row(recipe):
    made, seen = finished(recipe)
    assert seen[-1].evaluations == sum(len(prompts) for _, prompts in made.predict.calls)


def test_an_official_iteration_costs_its_trajectory_and_three_predictions():
    draws = [Draw(till_t, 1, torch.randn(1, *SHAPE)) for till_t in (0, 4, 9)]
    _, seen = finished(PAPER, draws=iter(draws))
    steps = [len(official_run(10, draw.till_t).timesteps) for draw in draws]
    assert [p.evaluations for p in seen] == [sum(2 * s + 3 for s in steps[: i + 1]) for i in range(3)]


def test_the_official_loop_trains_the_concepts_own_prompt_alone():
    made, _ = finished(PAPER)
    assert {name for _, prompts in made.predict.calls for name in prompts} == {"cat", "forest", ""}


def test_the_official_loops_average_is_about_54_evaluations():
    generator = torch.Generator().manual_seed(0)
    recipe = PRESETS["paper"]
    draws = [Draw.random(recipe, SHAPE, generator) for _ in range(2000)]
    spent = [2 * len(official_run(recipe.schedule_steps, draw.till_t).timesteps) + 3 for draw in draws]
    assert 52 < sum(spent) / len(spent) < 56


def test_base_predictions_are_taken_with_the_adapter_off_and_gradients_with_it_on():
    made, _ = finished(replace(SMALL, iterations=11))
    assert all(not adapting for adapting, prompts in made.predict.calls if "forest" in prompts)
    mixed = [adapting for adapting, prompts in made.predict.calls if len(prompts) == SMALL.batch + SMALL.preserved]
    assert sum(mixed) >= 11


def test_portions_of_rows_change_neither_gradients_nor_losses():
    recipe = replace(SMALL, iterations=20)
    whole, losses = finished(recipe)
    parts, seen = finished(recipe, rows=3)
    assert [p.loss for p in seen] == pytest.approx([p.loss for p in losses], rel=1e-3)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-2, atol=1e-4)


def test_kept_and_held_out_latents_are_the_base_models_own():
    made = training(replace(SMALL, check=5, iterations=5))
    next(made.run())
    assert made._held_out is not None
    latents, untrained = made._held_out
    assert untrained > 0
    assert set(latents.prompts) == {"cat", "kitty"}


def test_every_prompt_to_keep_is_met_however_many_there_are():
    prompts = replace(PROMPTS, kept=("", "dog", "ship", "forest"))
    for trajectories in (1, 6):
        kept = training(replace(SMALL, kept_trajectories=trajectories), prompts)._prepared()
        assert set(kept.prompts) == set(prompts.kept)
        assert len(kept) == max(trajectories, 4) * SMALL.schedule_steps


def rolled_out(erased: tuple[Pair, ...], trajectories: int) -> list[list[str]]:
    """The prompts of four rollouts in a row."""
    made = training(replace(SMALL, trajectories=trajectories, refresh=1, iterations=4), TrainingPrompts(erased))
    found: list[list[str]] = []
    visited = made._visited
    made._visited = lambda prompts, generator: found.append(list(prompts)) or visited(prompts, generator)
    list(made.run())
    return found


def test_every_prompt_to_erase_is_rolled_out_once_before_any_is_repeated():
    names = ("cat", "kitty", "dog", "ship")
    prompts = [name for part in rolled_out(tuple(Pair(name, "forest") for name in names), 3) for name in part]
    for i in (0, 4, 8):
        assert prompts[i] == "cat"  # the concept's own comes first
        assert set(prompts[i : i + 4]) == set(names)


def test_half_of_the_trajectories_lead_to_the_concepts_own_reference_and_half_elsewhere():
    words, inside = ("cat", "kitty"), ("dog", "ship", "")
    scenes = (Pair("dog", "ship"), Pair("ship", "dog"), Pair("", "dog"))
    found = rolled_out((*(Pair(name, "forest") for name in words), *scenes), 3)
    assert all(set(part[:2]) == set(words) for part in found)
    assert {part[2] for part in found[:3]} == set(inside)


def test_the_selective_loop_lowers_the_rate_of_up_linearly_and_the_official_one_keeps_both():
    for recipe, factors in ((replace(SMALL, iterations=4), (1.0, 0.75, 0.5, 0.25)), (PAPER, (1.0, 1.0, 1.0))):
        made = training(recipe)
        rates = [[group["lr"] for group in made.optimizer.param_groups] for _ in made.run()]
        assert rates == [[recipe.rate_down, recipe.rate_up * factor] for factor in factors]


def test_another_rank_keeps_the_scale_and_another_alpha_changes_it():
    recipe = PRESETS["selective"]
    assert recipe.with_rank(None) == recipe
    assert (recipe.with_rank(2).rank, recipe.with_rank(2).alpha) == (2, 2 * recipe.alpha / recipe.rank)
    assert recipe.with_rank(2, 3.0).alpha == 3.0
    assert PRESETS["paper"].with_rank(4).alpha == 32.0


def test_the_held_out_loss_starts_near_one_and_falls():
    made, _ = finished(replace(SMALL, iterations=120, check=5, patience=100))
    assert len(made.held_out) == 24
    assert made.held_out[0] < 1.2
    assert min(made.held_out) < 0.7


def test_training_stops_where_the_held_out_loss_no_longer_falls():
    recipe = replace(SMALL, check=5, patience=3, iterations=2000)
    made, seen = finished(recipe)
    assert seen[-1].iteration < 2000
    before, last = made.held_out[: -recipe.patience], made.held_out[-recipe.patience :]
    assert min(last) > min(before) - 0.02


def test_leaving_the_loop_keeps_what_was_learnt_so_far():
    made = training(SMALL)
    list(islice(made.run(), 7))
    whole = training(SMALL)
    there = [weights(whole) for _ in whole.run()]
    assert made.iteration == 7
    assert torch.equal(weights(made), there[6])


@pytest.mark.parametrize(("recipe", "at"), [(replace(SMALL, check=5, iterations=30), 20), (PAPER, 2)])
def test_a_resumed_training_ends_with_the_same_bits(recipe, at):
    whole, seen = finished(recipe)
    begun = training(recipe)
    for progress in begun.run():
        if progress.iteration == at:
            break
    assert begun.resumable
    saved = begun.state_dict()
    resumed = training(recipe)
    resumed.load_state_dict(saved)
    rest = list(resumed.run())
    assert [p.iteration for p in rest] == list(range(at + 1, seen[-1].iteration + 1))
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.held_out == whole.held_out
    assert resumed.losses == whole.losses


def test_a_resumed_training_goes_on_with_the_loss_scale_that_overflows_had_lowered():
    whole, _ = finished(PAPER, loss_scale=2.0**127)  # gradients overflow in float32 until it is lower
    begun = training(PAPER, loss_scale=2.0**127)
    next(begun.run())
    lowered = begun.loss_scale
    assert lowered < 2.0**127
    resumed = training(PAPER, loss_scale=2.0**127)
    resumed.load_state_dict(begun.state_dict())
    assert resumed.loss_scale == lowered
    list(resumed.run())
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.loss_scale == whole.loss_scale


def test_a_checkpoint_of_another_training_is_refused_and_the_message_says_what_differs():
    saved = training(SMALL).state_dict()
    with pytest.raises(ValueError, match="other values of recipe;"):
        training(replace(SMALL, seed=5)).load_state_dict(saved)
    other = replace(PROMPTS, erased=(replace(PROMPTS.erased[0], reference="elsewhere"), *PROMPTS.erased[1:]))
    with pytest.raises(ValueError, match="other values of prompts;"):
        training(SMALL, other).load_state_dict(saved)
    layers = fresh_layers({"to_v": FEATURES["to_v"]}, SMALL)
    with pytest.raises(ValueError, match="other values of latent, layers;"):
        Training(Toy(layers), layers, PROMPTS, SMALL, (4, 2, 2)).load_state_dict(saved)


def test_rates_keep_their_ratio_unless_both_are_given():
    assert (SMALL.with_rates(None).rate_up, SMALL.with_rates(None).rate_down) == (SMALL.rate_up, SMALL.rate_down)
    doubled = SMALL.with_rates(2 * SMALL.rate_up)
    assert (doubled.rate_up, doubled.rate_down) == pytest.approx((2 * SMALL.rate_up, 2 * SMALL.rate_down))
    assert SMALL.with_rates(1e-3, 1e-2) == replace(SMALL, rate_up=1e-3, rate_down=1e-2)
    assert SMALL.with_rates(None, 1e-2) == replace(SMALL, rate_down=1e-2)


@pytest.mark.parametrize("reference", ["cat", "Cat", " cat  "])
def test_a_reference_that_differs_in_case_and_blanks_alone_is_the_same_prompt(reference):
    with pytest.raises(ValueError, match="nothing to learn"):
        TrainingPrompts((Pair("cat", reference),))


def test_a_model_that_does_not_tell_target_and_reference_apart_has_nothing_to_learn():
    class Deaf(Toy):
        def __call__(self, z: Tensor, timesteps: Tensor, prompts: list[str]) -> Tensor:
            return super().__call__(z, timesteps, [""] * len(prompts))

    layers = fresh_layers(FEATURES, SMALL)
    with pytest.raises(TrainingError, match=r"predicts the same for .* nothing to learn"):
        list(Training(Deaf(layers), layers, PROMPTS, replace(SMALL, check=5), SHAPE).run())


def test_an_accelerators_general_error_counts_as_out_of_memory_where_it_says_so():
    assert is_out_of_memory(torch.OutOfMemoryError("no room"))
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    assert not is_out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access"))
    assert not is_out_of_memory(RuntimeError("out of memory"))


def test_in_the_middle_of_a_pool_a_checkpoint_is_not_resumable():
    made = training(SMALL)
    states = [made.resumable for _ in made.run()]
    assert [i + 1 for i, resumable in enumerate(states) if resumable] == [10, 20, 30, 40, 50, 60]


def test_a_learning_rate_that_diverges_stops_with_the_rates_and_a_remedy():
    with pytest.raises(TrainingError, match=r"diverged at iteration \d+.*learning rates are 1e\+06.*lower them"):
        finished(replace(SMALL, rate_down=1e6, rate_up=1e6, iterations=50))


def test_a_prediction_that_is_not_finite_stops_training():
    made = training(SMALL)
    made.predict.weights["to_v"][:] = math.nan
    with pytest.raises(TrainingError, match="not finite"):
        list(made.run())


class OutOfMemoryToy(Toy):
    """Raises torch's out-of-memory error for forwards with gradients of more than `room` rows."""

    room = 2

    def __call__(self, z: Tensor, timesteps: Tensor, prompts: list[str]) -> Tensor:
        if self.adapting and torch.is_grad_enabled() and len(prompts) > self.room:
            raise torch.OutOfMemoryError("no room")
        return super().__call__(z, timesteps, prompts)


def test_out_of_memory_halves_the_portions_and_changes_nothing_else():
    recipe = replace(SMALL, iterations=5)
    layers = fresh_layers(FEATURES, recipe)
    made = Training(OutOfMemoryToy(layers), layers, PROMPTS, recipe, SHAPE)
    losses = [p.loss for p in made.run()]
    assert made.denoiser.rows == 2
    assert losses == pytest.approx([p.loss for p in finished(recipe)[1]], rel=1e-3)


class SmallToy(Toy):
    """Raises torch's out-of-memory error for forwards without gradients of more than 3 rows."""

    def __call__(self, z: Tensor, timesteps: Tensor, prompts: list[str]) -> Tensor:
        if not torch.is_grad_enabled() and len(prompts) > 3:
            raise torch.OutOfMemoryError("no room")
        return super().__call__(z, timesteps, prompts)


def test_out_of_memory_while_latents_are_sampled_halves_the_portions_too():
    recipe = replace(SMALL, iterations=5)
    layers = fresh_layers(FEATURES, recipe)
    made = Training(SmallToy(layers), layers, PROMPTS, recipe, SHAPE)
    seen = list(made.run())
    assert made.denoiser.rows <= 3
    assert [p.loss for p in seen] == pytest.approx([p.loss for p in finished(recipe)[1]], rel=1e-3)
    assert seen[-1].evaluations == finished(recipe)[1][-1].evaluations


def test_out_of_memory_asks_for_room_first_and_tries_again():
    recipe = replace(SMALL, iterations=2)
    layers = fresh_layers(FEATURES, recipe)
    toy, asked = OutOfMemoryToy(layers), []

    def relieve() -> bool:
        asked.append(True)
        toy.room = 1000
        return True

    made = Training(toy, layers, PROMPTS, recipe, SHAPE, relieve=relieve)
    list(made.run())
    assert asked == [True]
    assert made.denoiser.rows == 32


def test_a_loss_scale_changes_no_gradient():
    recipe = replace(SMALL, iterations=5)
    torch.testing.assert_close(weights(finished(recipe, loss_scale=1024.0)[0]), weights(finished(recipe)[0]))


def test_fresh_layers_do_not_depend_on_the_order_of_names():
    forwards = fresh_layers(FEATURES, SMALL)
    backwards = fresh_layers(dict(reversed(FEATURES.items())), SMALL)
    assert all(torch.equal(forwards[name].down, backwards[name].down) for name in FEATURES)
    assert not torch.equal(forwards["to_k"].down, forwards["to_v"].down)


def test_timesteps_of_a_whole_denoising_start_at_the_noisiest_and_end_above_zero():
    assert sampled_timesteps(4) == [999, 749, 500, 250]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"loop": "fast"}, "expected one of official, selective"),
        ({"iterations": 0}, "iterations is 0"),
        ({"rate_up": 0.0}, "rate_up is 0.0"),
        ({"rate_down": math.nan}, "rate_down is nan"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"preservation_weight": -1.0}, "preservation_weight is -1.0"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **values)


def test_an_official_recipe_needs_a_schedule_that_the_official_code_has():
    with pytest.raises(ValueError, match="past the last one"):
        replace(PAPER, schedule_steps=3)


@pytest.mark.parametrize(
    ("erased", "kept", "words"),
    [
        ((), (), "no prompt to erase"),
        ((Pair("cat", "cat"),), (), "nothing to learn"),
        ((Pair("cat", "forest"),), ("cat",), "to erase and to keep"),
    ],
)
def test_prompts_that_contradict_each_other_are_refused(erased, kept, words):
    with pytest.raises(ValueError, match=words):
        TrainingPrompts(erased, kept)
