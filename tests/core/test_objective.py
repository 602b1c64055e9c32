import pytest
import torch

from unguide_core.objective import erasure_loss, erasure_target, preservation_loss


@pytest.fixture
def eps(generator):
    return [torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3)]


def test_the_target_lies_beyond_the_reference_away_from_the_erased_prompt(eps):
    reference, target, _ = eps
    torch.testing.assert_close(erasure_target(reference, target, 2.0), 3.0 * reference - 2.0 * target)
    torch.testing.assert_close(erasure_target(reference, target, 0.0), reference)


def test_no_gradient_flows_into_the_target(eps):
    reference, target, _ = (e.requires_grad_() for e in eps)
    assert not erasure_target(reference, target, 2.0).requires_grad


def test_the_first_loss_is_nine_times_the_distance_of_the_two_prompts(eps):
    """An untrained adapter predicts what the base does: (e_p - (e_0 - 2 (e_p - e_0)))^2 = 9 (e_p - e_0)^2."""
    reference, target, _ = eps
    loss = erasure_loss(target, erasure_target(reference, target, 2.0))
    torch.testing.assert_close(loss, 9.0 * (target - reference).square().mean())


def test_preservation_is_the_weighted_distance_from_the_base(eps):
    adapted, base, _ = eps
    torch.testing.assert_close(preservation_loss(adapted, base, 3.0), 3.0 * (adapted - base).square().mean())
    assert preservation_loss(base, base, 3.0) == 0.0


def test_gradients_flow_into_the_adapted_prediction_only(eps):
    adapted, base, _ = (e.requires_grad_() for e in eps)
    preservation_loss(adapted, base, 1.0).backward()
    assert adapted.grad is not None
    assert base.grad is None


@pytest.mark.parametrize("function", [erasure_target, erasure_loss, preservation_loss])
def test_shapes_that_would_broadcast_are_refused(eps, function):
    extra = () if function is erasure_loss else (2.0,)
    with pytest.raises(ValueError, match="expected the same shape"):
        function(eps[0], eps[1][:1], *extra)
