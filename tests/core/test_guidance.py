import pytest
import torch

from unguide_core.guidance import blend, blend_many, classifier_free

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def predictions(generator):
    return [torch.randn(3, 4, 8, 8, generator=generator) for _ in range(4)]


def bit_identical(one, other):
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_weight_one_returns_base_itself(predictions):
    base, adapted, *_ = predictions
    assert blend(base, adapted, 1.0) is base
    assert blend(base, adapted, 1) is base


def test_weight_zero_returns_adapted_itself(predictions):
    base, adapted, *_ = predictions
    assert blend(base, adapted, 0.0) is adapted


@pytest.mark.parametrize("weight", [-1.0, -0.25, 0.5, 2.0])
def test_blend_is_the_weighted_sum(predictions, weight):
    base, adapted, *_ = predictions
    expected = weight * base.double() + (1 - weight) * adapted.double()
    torch.testing.assert_close(blend(base, adapted, weight), expected.float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 16), (3, 4, 8, 8), (3, 4, 2, 8, 8)])
def test_weights_per_sample_equal_each_sample_blended_alone(generator, shape):
    base, adapted = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    weights = torch.tensor([-1.0, 0.5, 2.0])
    blended = blend(base, adapted, weights)
    for row, weight in enumerate(weights.tolist()):
        torch.testing.assert_close(blended[row], blend(base[row : row + 1], adapted[row : row + 1], weight)[0])


@pytest.mark.parametrize("wild", [NAN, INF, -0.0])
def test_rows_of_weight_one_and_zero_are_bit_identical_whatever_the_other_prediction_holds(predictions, wild):
    base, adapted, *_ = predictions
    adapted[0, 0], base[1, 0] = wild, wild
    base[0, 1] = -0.0
    blended = blend(base, adapted, torch.tensor([1.0, 0.0, -1.0]))
    assert bit_identical(blended[0], base[0])
    assert bit_identical(blended[1], adapted[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [-1.0, torch.tensor([-1.0, 0.5, 1.0])])
def test_blend_keeps_the_dtype(predictions, dtype, weight):
    base, adapted = predictions[0].to(dtype), predictions[1].to(dtype)
    assert blend(base, adapted, weight).dtype == dtype


def test_blending_before_classifier_free_guidance_equals_blending_after_it(predictions):
    base_cond, base_uncond, adapted_cond, adapted_uncond = (p.double() for p in predictions)
    before = classifier_free(blend(base_cond, adapted_cond, -1.0), blend(base_uncond, adapted_uncond, -1.0), 7.5)
    after = blend(
        classifier_free(base_cond, base_uncond, 7.5), classifier_free(adapted_cond, adapted_uncond, 7.5), -1.0
    )
    torch.testing.assert_close(before, after, rtol=0, atol=1e-12)


def test_blending_x0_equals_blending_eps(predictions):
    x, base, adapted, _ = (p.double() for p in predictions)
    sigma = 2.5
    x0 = blend(x - sigma * base, x - sigma * adapted, -1.0)
    torch.testing.assert_close((x - x0) / sigma, blend(base, adapted, -1.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("weight", [-1.0, 0.0, 0.5, 1.0, torch.tensor([1.0, 0.0, -1.0])])
def test_blend_many_of_one_adapter_is_blend(predictions, weight):
    base, adapted, *_ = predictions
    assert bit_identical(blend_many(base, [adapted], [weight]), blend(base, adapted, weight))


def test_blend_many_adds_the_displacement_of_each_adapter(predictions):
    base, *adapted = predictions
    weights = [-1.0, 0.5, 2.0]
    expected = base.double() + sum(
        (1 - w) * (a.double() - base.double()) for a, w in zip(adapted, weights, strict=True)
    )
    torch.testing.assert_close(blend_many(base, adapted, weights), expected.float(), rtol=0, atol=5e-6)


def test_blend_many_does_not_depend_on_the_order(predictions):
    base, *adapted = (p.double() for p in predictions)
    weights = [-1.0, 0.5, torch.tensor([1.0, 0.0, 2.0])]
    forward, backward = blend_many(base, adapted, weights), blend_many(base, adapted[::-1], weights[::-1])
    torch.testing.assert_close(forward, backward, rtol=0, atol=1e-12)


def test_adapters_of_weight_one_leave_no_trace(predictions):
    base, fired, idle, _ = predictions
    idle.fill_(NAN)
    assert blend_many(base, [idle, idle], [1.0, 1.0]) is base
    assert blend_many(base, [], []) is base
    assert bit_identical(blend_many(base, [idle, fired], [1.0, -1.0]), blend(base, fired, -1.0))


def test_rows_in_which_no_adapter_fired_are_bit_identical_to_base(predictions):
    base, first, second, _ = predictions
    base[0, 0] = -0.0
    first[0] = NAN
    blended = blend_many(base, [first, second], [torch.tensor([1.0, -1.0, 0.0]), torch.tensor([1.0, 1.0, -1.0])])
    assert bit_identical(blended[0], base[0])
    torch.testing.assert_close(blended[1], blend(base, first, -1.0)[1])


def test_guidance_scale_one_gives_cond_and_zero_gives_uncond(predictions):
    cond, uncond, *_ = predictions
    torch.testing.assert_close(classifier_free(cond, uncond, 1.0), cond)
    assert torch.equal(classifier_free(cond, uncond, 0.0), uncond)


def test_shape_mismatch_names_both_shapes(predictions):
    base = predictions[0]
    with pytest.raises(ValueError, match=r"base has shape \[3, 4, 8, 8\] and adapted \[2, 4, 8, 8\]"):
        blend(base, base[:2], 0.5)
    with pytest.raises(ValueError, match=r"cond has shape \[3, 4, 8, 8\] and uncond \[1, 4, 8, 8\]"):
        classifier_free(base, base[:1], 7.5)


@pytest.mark.parametrize("weight", [NAN, INF, -INF, torch.tensor([1.0, NAN, 1.0])])
def test_weights_that_are_not_finite_are_refused(predictions, weight):
    base, adapted, *_ = predictions
    with pytest.raises(ValueError, match=r"expected .*finite number"):
        blend(base, adapted, weight)
    with pytest.raises(ValueError, match=r"expected .*finite number"):
        blend_many(base, [adapted, adapted], [1.0, weight])


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 1)])
def test_weights_that_are_not_one_per_sample_are_refused(predictions, shape):
    base, adapted, *_ = predictions
    with pytest.raises(ValueError, match=r"one weight per sample, \[3\]"):
        blend(base, adapted, torch.ones(shape))


def test_a_weight_missing_for_an_adapter_is_refused(predictions):
    base, first, second, _ = predictions
    with pytest.raises(ValueError, match="got 2 adapted predictions and 1 weights"):
        blend_many(base, [first, second], [0.5])
