"""Losses: the formula, its gradient, the mean over the batch, and which targets are refused."""

import numpy as np
import pytest

from npnet.losses import LOSSES, TrainingDiverged, accuracy, check_finite
from tests.test_layers import numeric_gradient


def plain_softmax_cross_entropy(output, target):
    probabilities = np.exp(output) / np.exp(output).sum(axis=1, keepdims=True)
    return -(target * np.log(probabilities)).sum() / len(output)


def plain_bce(output, target):
    p = 1 / (1 + np.exp(-output))
    return -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean()


FORMULAS = {
    "quadratic": lambda output, target: ((output - target) ** 2).sum() / (2 * len(output)),
    "mean_squared_error": lambda output, target: ((output - target) ** 2).sum() / output.size,
    "softmax_cross_entropy": plain_softmax_cross_entropy,
    "bce_with_logits": plain_bce,
}
every_loss = pytest.mark.parametrize("name", LOSSES)
every_shape = pytest.mark.parametrize("shape", [(1, 1), (1, 4), (5, 1), (5, 3)], ids=str)


def pair(name, shape=(5, 3), dtype=np.float64):
    """Outputs, and targets that the loss takes: numbers, or rows of probabilities."""
    random = np.random.default_rng(8)
    output, target = random.standard_normal((2, *shape))
    if name == "softmax_cross_entropy":
        target = random.dirichlet(np.ones(shape[1]), shape[0])
    if name == "bce_with_logits":
        target = random.random(shape)
    return output.astype(dtype), target.astype(dtype)


def test_every_loss_has_a_formula_here():
    assert set(FORMULAS) == set(LOSSES)


@every_shape
@every_loss
def test_the_value_is_the_formula_and_0_d(name, shape):
    output, target = pair(name, shape)
    value, _ = LOSSES[name]().value_and_gradient(output, target)
    assert value == pytest.approx(FORMULAS[name](output, target), rel=1e-12, abs=1e-14)
    assert (value.shape, value.dtype) == ((), np.float64)
    assert LOSSES[name]()(output, target) == value


@every_shape
@every_loss
def test_the_gradient_agrees_with_central_differences(name, shape):
    output, target = pair(name, shape)
    loss = LOSSES[name]()
    _, gradient = loss.value_and_gradient(output, target)
    expected = numeric_gradient(lambda: float(loss(output, target)), output)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


@every_loss
def test_output_and_target_stay_as_they_are_and_the_gradient_is_a_new_array(name):
    output, target = pair(name)
    before = output.copy(), target.copy()
    _, gradient = LOSSES[name]().value_and_gradient(output, target)
    assert np.array_equal((output, target), before)
    assert not np.shares_memory(gradient, output)
    assert not np.shares_memory(gradient, target)


@every_loss
def test_layout_in_memory_does_not_matter(name):
    output, target = pair(name)
    value, gradient = LOSSES[name]().value_and_gradient(np.asfortranarray(output), target)
    expected_value, expected_gradient = LOSSES[name]().value_and_gradient(output, np.asfortranarray(target))
    assert float(value) == pytest.approx(float(expected_value), rel=1e-13)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-13)


@every_loss
def test_float32_stays_float32(name):
    value, gradient = LOSSES[name]().value_and_gradient(*pair(name, dtype=np.float32))
    assert (value.dtype, gradient.dtype) == (np.float32, np.float32)


@every_loss
@pytest.mark.parametrize("dtype", [np.float64, np.int64, bool])
def test_targets_of_another_dtype_are_taken_as_numbers_of_the_output(name, dtype):
    output, target = pair(name, dtype=np.float32)
    target = np.eye(*target.shape).astype(dtype)
    value, gradient = LOSSES[name]().value_and_gradient(output, target)
    expected, right = LOSSES[name]().value_and_gradient(output, target.astype(np.float32))
    assert gradient.dtype == np.float32
    assert value == expected
    assert np.array_equal(gradient, right)


def test_accuracy_takes_outputs_whose_sum_is_infinite_and_refuses_those_that_are():
    y = np.eye(3, dtype=np.float32)
    assert accuracy(lambda x: 3e38 * x, y, y) == 1.0
    for bad in (np.inf, -np.inf, np.nan):
        with pytest.raises(TrainingDiverged, match="an output of the network is not finite"):
            accuracy(lambda x, bad=bad: np.where(x > 0, bad, x), y, y)
    with pytest.raises(ValueError, match="at least one sample"):
        accuracy(lambda x: x, y[:0], y[:0])


@every_loss
def test_a_batch_given_twice_costs_the_same(name):
    output, target = pair(name)
    value, gradient = LOSSES[name]().value_and_gradient(output, target)
    doubled, halves = LOSSES[name]().value_and_gradient(np.tile(output, (2, 1)), np.tile(target, (2, 1)))
    assert float(doubled) == pytest.approx(float(value), rel=1e-13)
    np.testing.assert_allclose(halves, np.tile(gradient / 2, (2, 1)), rtol=1e-13)


@every_loss
def test_the_right_output_costs_nothing_more_and_has_no_gradient(name):
    _, target = pair(name)
    output, entropy = target.copy(), 0.0
    if name == "softmax_cross_entropy":
        output, entropy = np.log(target), -(target * np.log(target)).sum() / len(target)
    if name == "bce_with_logits":
        output = np.log(target / (1 - target))
        entropy = plain_bce(output, target)
    value, gradient = LOSSES[name]().value_and_gradient(output, target)
    assert float(value) == pytest.approx(entropy, rel=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bce_with_logits_is_exact_for_huge_logits(dtype):
    value, gradient = LOSSES["bce_with_logits"]().value_and_gradient(
        np.array([[1e4, -1e4], [3e4, 0]], dtype), np.array([[1, 0], [0, 1]], dtype)
    )
    assert float(value) == pytest.approx((3e4 + np.log(2)) / 4, rel=1e-6)
    np.testing.assert_allclose(gradient, np.array([[0, 0], [1, -0.5]]) / 4, rtol=1e-6)


def test_bce_with_logits_refuses_targets_that_are_no_probabilities():
    for target in ([[1.5]], [[-0.1]], [[np.nan]]):
        with pytest.raises(ValueError, match="binary cross-entropy needs values from 0 to 1"):
            LOSSES["bce_with_logits"]().check_targets(np.array(target), 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_cross_entropy_is_exact_for_huge_logits(dtype):
    output = np.array([[1e4, -1e4, 0], [-1e4, 1e4, 0], [-3e4, -2e4, -3e4]], dtype)
    target = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0]], dtype)
    value, gradient = LOSSES["softmax_cross_entropy"]().value_and_gradient(output, target)
    assert value == 1e4  # the mean of 0, 2e4 and 1e4
    np.testing.assert_allclose(gradient, np.array([[0, 0, 0], [-1, 1, 0], [-1, 1, 0]]) / 3, rtol=1e-6)


def test_softmax_cross_entropy_ignores_a_shift_of_a_row():
    output, target = pair("softmax_cross_entropy")
    loss = LOSSES["softmax_cross_entropy"]()
    assert loss(output + 1e3, target) == pytest.approx(float(loss(output, target)), rel=1e-11)


@pytest.mark.parametrize("shape", [(5, 1), (1, 3), (3,), (), (1, 1), (5, 2), (4, 3), (3, 5), (1, 5, 3)], ids=str)
@every_loss
def test_a_target_of_another_shape_is_refused_even_where_it_would_broadcast(name, shape):
    with pytest.raises(ValueError, match=r"output and target must have the same shape, got \(5, 3\) and"):
        LOSSES[name]()(np.ones((5, 3)), np.ones(shape))
    with pytest.raises(ValueError, match=r"output and target must have the same shape, got .* and \(5, 3\)"):
        LOSSES[name]().value_and_gradient(np.ones(shape), np.ones((5, 3)))


@every_loss
def test_a_target_that_is_no_array_is_refused(name):
    with pytest.raises(TypeError, match="expected an array of 'numpy', got list"):
        LOSSES[name]()(np.ones((1, 3)), [[1.0, 0.0, 0.0]])


@every_loss
def test_targets_must_be_rows_of_as_many_features_as_the_output(name):
    loss = LOSSES[name]()
    loss.check_targets(pair(name)[1], 3)
    with pytest.raises(ValueError, match=r"targets: expected rows of shape \(samples, 4\), got \(5, 3\)$"):
        loss.check_targets(pair(name)[1], 4)
    with pytest.raises(ValueError, match=r"got \(0, 3\)"):
        loss.check_targets(np.ones((0, 3)), 3)
    hint = "targets, one a sample" if name == "bce_with_logits" else r"class numbers become rows with npnet\.one_hot"
    with pytest.raises(ValueError, match=rf"got \(3,\); {hint}"):
        loss.check_targets(np.array([0, 2, 1]), 3)


NOT_PROBABILITIES = {
    "sum 2": [[1, 1, 0]],
    "sum 0": [[0, 0, 0]],
    "negative": [[1.5, -0.5, 0]],
    "second row": [[1, 0, 0], [0.5, 0.4, 0]],
    "infinite": [[np.inf, 0, 0]],
    "nan": [[np.nan, 0.5, 0.5]],
}


@pytest.mark.parametrize("rows", NOT_PROBABILITIES.values(), ids=NOT_PROBABILITIES)
def test_softmax_cross_entropy_refuses_targets_that_are_not_probabilities(rows):
    with pytest.raises(ValueError, match=r"rows of probabilities .* npnet\.one_hot\(labels, classes\)"):
        LOSSES["softmax_cross_entropy"]().check_targets(np.array(rows, float), 3)


@pytest.mark.parametrize("rows", [[[0, 1, 0]], [[0.2, 0.3, 0.5], [1, 0, 0]]])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_cross_entropy_takes_one_hot_rows_and_probabilities(rows, dtype):
    LOSSES["softmax_cross_entropy"]().check_targets(np.array(rows, dtype), 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [float, np.float32, np.array])
def test_check_finite_says_that_training_has_diverged(value, kind):
    with pytest.raises(TrainingDiverged, match=rf"the loss is {value}, .*start again with a lower learning rate"):
        check_finite(kind(value))


@pytest.mark.parametrize("value", [0.0, -1.5, 1e300])
def test_check_finite_hands_a_finite_loss_back_as_a_float(value):
    assert check_finite(np.array(value)) == value
    assert type(check_finite(np.array(value))) is float
