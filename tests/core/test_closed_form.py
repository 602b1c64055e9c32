"""The closed-form eraser: what it guarantees, and that it is the solution of its own least-squares problem."""

from __future__ import annotations

import pytest
import torch

from unguide_core.closed_form import ClosedForm, ClosedFormEraser, ClosedFormFitter, Moment, most_different

WIDTH = 12
EXACT = {"explained": 1.0, "regularization": 1e-8}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGETS, REFERENCES, KEPT = drawn(5, 7, WIDTH), drawn(5, 7, WIDTH, seed=1), drawn(9, 7, WIDTH, seed=2)
WEIGHTS = [drawn(20, WIDTH, seed=3).float(), 5.0 * drawn(6, WIDTH, seed=4).float()]


def fitter(targets: torch.Tensor = TARGETS, references: torch.Tensor = REFERENCES) -> ClosedFormFitter:
    made = ClosedFormFitter(targets.shape[-1])
    for target, reference in zip(targets, references, strict=True):
        made.erase(target, reference)
    return made


def fitted(settings: ClosedForm, weights: list[torch.Tensor] = WEIGHTS, kept: torch.Tensor = KEPT) -> ClosedFormEraser:
    return fitter().fit(weights, Moment(kept.shape[-1]).add(kept), settings)


def change(eraser: ClosedFormEraser) -> torch.Tensor:
    """E, [width, width]."""
    return (eraser.up @ eraser.down).double()


def dense(settings: ClosedForm) -> torch.Tensor:
    """The full-rank solution, by the normal equations over all tokens."""
    c, r, k = (states.reshape(-1, WIDTH) for states in (TARGETS, REFERENCES, KEPT))
    a = c.T @ c / len(c)
    gram = a + settings.kept_weight * k.T @ k / len(k)
    gram += settings.regularization * a.trace() / WIDTH * torch.eye(WIDTH)
    return (1 + settings.eta) * torch.linalg.solve(gram, c.T @ (r - c) / len(c)).T


def objective(e: torch.Tensor, settings: ClosedForm) -> float:
    """What the eraser minimises, errors weighed as the layers feel them."""
    metric = sum(w.double().T @ w.double() / w.double().square().sum() for w in WEIGHTS)
    root = torch.linalg.cholesky(metric).T
    c, r, k = (states.reshape(-1, WIDTH) for states in (TARGETS, REFERENCES, KEPT))
    ridge = settings.regularization * (c.T @ c / len(c)).trace() / WIDTH
    error, kept = (r - c - c @ e.T) @ root.T, k @ e.T @ root.T
    terms = error.square().sum() / len(c) + settings.kept_weight * kept.square().sum() / len(k)
    return float(terms + ridge * (root @ e).square().sum())


@pytest.mark.parametrize(
    "settings",
    [
        ClosedForm(rank=WIDTH, **EXACT),
        ClosedForm(rank=WIDTH, explained=1.0, kept_weight=20.0, regularization=0.1),
        ClosedForm(rank=WIDTH, explained=1.0, eta=2.0),
    ],
)
def test_the_full_rank_is_the_dense_ridge_solution(settings: ClosedForm) -> None:
    assert torch.allclose(change(fitted(settings)), dense(settings), rtol=1e-4, atol=1e-5)


def test_a_lower_rank_is_the_best_of_that_rank_and_better_than_a_cut_svd() -> None:
    for rank in (1, 2, 4):
        settings = ClosedForm(rank=rank, explained=1.0)
        found = change(fitted(settings))
        assert torch.linalg.matrix_rank(found, rtol=1e-5) == rank
        best = objective(found, settings)
        u, s, vh = torch.linalg.svd(dense(settings))
        assert best < objective(u[:, :rank] * s[:rank] @ vh[:rank], settings)
        for seed in range(5):  # no change of that rank near it is better
            left, right = drawn(WIDTH, WIDTH, seed=seed), drawn(WIDTH, WIDTH, seed=seed + 9)
            near = (torch.eye(WIDTH) + 1e-3 * left) @ found @ (torch.eye(WIDTH) + 1e-3 * right)
            assert best < objective(near, settings)


def test_wide_states_are_solved_in_their_main_directions_as_the_dense_solution_would_be() -> None:
    width = 300  # more than the basis keeps
    targets, kept = drawn(4, 30, width), drawn(4, 30, width, seed=5)
    references = targets + drawn(4, 30, 20, seed=6) @ drawn(20, width, seed=7)
    weights = [drawn(50, width, seed=8).float()]
    settings = ClosedForm(rank=128, explained=1.0, regularization=1e-2)
    found = change(fitter(targets, references).fit(weights, Moment(width).add(kept), settings))
    c, d, k = targets.reshape(-1, width), (references - targets).reshape(-1, width), kept.reshape(-1, width)
    a = c.T @ c / len(c)
    gram = a + k.T @ k / len(k) + 1e-2 * a.trace() / width * torch.eye(width)
    expected = torch.linalg.solve(gram, c.T @ d / len(c)).T
    felt = weights[0].double()
    assert (felt @ (found - expected)).norm() < 1e-3 * (felt @ expected).norm()


def test_few_pairs_without_prompts_to_keep_become_their_references_exactly() -> None:
    targets, references = drawn(1, 3, WIDTH), drawn(1, 3, WIDTH, seed=1)
    eraser = fitter(targets, references).fit(WEIGHTS, Moment(WIDTH), ClosedForm(rank=WIDTH, **EXACT))
    assert torch.allclose(eraser(targets.float()), references.float(), atol=1e-3)


def test_eta_goes_past_the_reference_by_that_share() -> None:
    settings = ClosedForm(rank=3, explained=1.0)
    past = fitted(ClosedForm(rank=3, explained=1.0, eta=0.5))
    assert torch.allclose(change(past), 1.5 * change(fitted(settings)), rtol=1e-4, atol=1e-5)


def test_states_to_keep_change_less_the_more_they_weigh_and_not_at_all_where_targets_have_no_part_in_them() -> None:
    def moved(weight: float, kept: torch.Tensor = KEPT) -> float:
        eraser = fitted(ClosedForm(rank=WIDTH, explained=1.0, kept_weight=weight), kept=kept)
        return float((eraser(kept.float()) - kept.float()).norm() / kept.norm())

    assert moved(100.0) < 0.2 * moved(1.0) < 0.2 * moved(0.0)
    plane = torch.cat([drawn(1, 7, 6), torch.zeros(1, 7, 6)], dim=-1)
    eraser = fitter(plane, REFERENCES[:1]).fit(WEIGHTS, Moment(WIDTH), ClosedForm(rank=WIDTH, **EXACT))
    apart = torch.cat([torch.zeros(4, 6), drawn(4, 6, seed=3)], dim=-1).float()
    assert torch.allclose(eraser(apart), apart, atol=1e-5)


def test_a_layers_output_changes_as_if_its_states_were_erased() -> None:
    eraser, states = fitted(ClosedForm(rank=3)), drawn(2, 7, WIDTH, seed=8).float()
    for weight in WEIGHTS:
        layer = eraser.layer(weight)
        assert torch.allclose(states @ weight.T + layer.delta(states), eraser(states) @ weight.T, rtol=1e-4, atol=1e-4)


def test_a_layer_that_reads_more_than_the_states_changes_by_them_alone() -> None:
    eraser, weight = fitted(ClosedForm(rank=2)), drawn(8, WIDTH + 5, seed=6).float()
    layer = eraser.layer(weight)
    assert layer.weight_shape == (8, WIDTH + 5)
    assert torch.allclose(layer.weight_delta()[:, :WIDTH], weight[:, :WIDTH] @ eraser.up @ eraser.down, atol=1e-5)
    assert not layer.weight_delta()[:, WIDTH:].any()


def test_the_rank_is_the_lowest_that_explains_the_share_asked_for() -> None:
    whole = [fitted(ClosedForm(rank=rank, explained=1.0)).explained for rank in range(1, WIDTH)]
    assert whole == sorted(whole)
    for rank in (1, 3, 6):
        eraser = fitted(ClosedForm(rank=WIDTH, explained=whole[rank - 1] - 1e-6))
        assert eraser.rank == rank
        assert eraser.explained == pytest.approx(whole[rank - 1])


def test_the_result_depends_neither_on_order_nor_on_how_prompts_are_grouped() -> None:
    settings, kept = ClosedForm(rank=3), Moment(WIDTH)
    for states in KEPT.flip(0):
        kept.add(states)
    other = fitter(TARGETS.flip(0), REFERENCES.flip(0)).fit(WEIGHTS, kept, settings)
    assert torch.allclose(change(other), change(fitted(settings)), rtol=1e-4, atol=1e-5)


def test_moments_without_some_prompts_are_those_of_the_others() -> None:
    left = Moment(WIDTH).add(KEPT).minus(Moment(WIDTH).add(KEPT[:4]))
    assert left.count == 7 * 5
    assert torch.allclose(left.mean, Moment(WIDTH).add(KEPT[4:]).mean)


def test_a_long_prompt_takes_a_shorter_reference_part_by_part() -> None:
    one = fitter(TARGETS[:2].flatten(0, 1)[None], REFERENCES[:1])
    two = fitter(TARGETS[:2], REFERENCES[:1].expand(2, -1, -1))
    found = [each.fit(WEIGHTS, Moment(WIDTH).add(KEPT), ClosedForm()) for each in (one, two)]
    assert torch.allclose(change(found[0]), change(found[1]), rtol=1e-4, atol=1e-5)


def test_the_most_different_prompt_is_the_neutral_one() -> None:
    own = drawn(7, WIDTH)
    assert most_different(own, {"alike": own + 0.1, "opposite": -own, "other": drawn(7, WIDTH, seed=4)}) == "opposite"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rank": 0}, "expected 1 to"),
        ({"explained": 1.5}, "explained is 1.5"),
        ({"kept_weight": -1.0}, "kept_weight is -1.0"),
        ({"regularization": 0.0}, "regularization is 0.0"),
        ({"eta": float("nan")}, "eta is nan"),
    ],
)
def test_impossible_settings_are_refused(changed: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ClosedForm(**changed)


def test_what_cannot_be_solved_is_refused_with_the_remedy() -> None:
    kept = Moment(WIDTH)
    with pytest.raises(ValueError, match="use another reference"):
        fitter(references=TARGETS).fit(WEIGHTS, kept, ClosedForm())
    with pytest.raises(ValueError, match="use another reference"):
        ClosedFormFitter(WIDTH).fit(WEIGHTS, kept, ClosedForm())
    with pytest.raises(ValueError, match="no layer reads"):
        fitter().fit([], kept, ClosedForm())
    with pytest.raises(ValueError, match="to keep have width 3"):
        fitter().fit(WEIGHTS, Moment(3), ClosedForm())
    with pytest.raises(ValueError, match="NaN or infinite"):
        fitter().fit([torch.full((2, WIDTH), torch.nan)], kept, ClosedForm())
    with pytest.raises(ValueError, match=r"expected \[..., 12\]"):
        Moment(WIDTH).add(drawn(7, 3))
    with pytest.raises(ValueError, match="check the text encoder"):
        Moment(WIDTH).add(torch.full((2, WIDTH), torch.inf))
    with pytest.raises(ValueError, match="expected 1 to"):
        Moment(100_000)
    with pytest.raises(ValueError, match="cannot take"):
        Moment(WIDTH).minus(Moment(WIDTH).add(KEPT))
    with pytest.raises(ValueError, match=r"expected \[out, 12 or more\]"):
        fitted(ClosedForm()).layer(drawn(4, 3).float())
