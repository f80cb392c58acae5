"""A training step: gradients by path, a model in halves, clipping, and what is left when something is raised."""

from itertools import pairwise

import numpy as np
import pytest

import npnet
from npnet import Dense, Dropout, Linear, Residual, Sequential, schedules
from npnet.checkpoint import checkpoint
from npnet.layer import needs_saved
from npnet.losses import TrainingDiverged
from npnet.random import new_step, one_step
from npnet.step import accumulated_step, add_gradients, lazy_gradient, train_step, value_and_grad
from tests.test_losses import pair


def model():
    """Without dropout, whose masks are another large batch's; outputs of 3 features."""
    rng = np.random.default_rng(0)
    inner = Sequential(npnet.LayerNorm(8, dtype=np.float64), Dense(8, 8, "tanh", dtype=np.float64, rng=rng))
    middle = [Residual(inner), checkpoint(Dense(8, 8, "sigmoid", dtype=np.float64, rng=rng)), npnet.GELU("tanh")]
    return Sequential(Dense(5, 8, dtype=np.float64, rng=rng), *middle, Linear(8, 3, dtype=np.float64, rng=rng))


def batch_of(size, loss="quadratic", features=5):
    return np.random.default_rng(size).standard_normal((size, features)), pair(loss, (size, 3))[1]


def cut(x, y, cuts):
    return [(x[a:b], y[a:b]) for a, b in pairwise(cuts)]


def gradients(each):
    return [parameter.gradient for parameter in each.parameters()]


def weights(each):
    return [parameter.value for parameter in each.parameters()]


def close(ours, theirs, rel=1e-12):
    """Each array within ``rel`` of its largest number."""
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rel * np.abs(b).max())


def same(ours, theirs):
    return len(ours) == len(theirs) > 0 and all(map(np.array_equal, ours, theirs))


def none(each):
    return schedules.none(len(each.layers), needs_saved(each.layers))


def test_value_and_grad_updates_nothing_and_adds_to_nothing():
    each, (x, y) = model(), batch_of(24)
    before = [array.copy() for array in weights(each)]
    first, second = (value_and_grad(each, npnet.Quadratic(), x, y) for _ in range(2))
    assert first[0] == second[0] == float(npnet.Quadratic()(each.predict(x), y))
    assert same(first[1].values(), second[1].values())
    assert not any(np.shares_memory(a, b) for a, b in zip(first[1].values(), second[1].values(), strict=True))
    assert same(weights(each), before)
    add_gradients(each, npnet.Quadratic(), x, y)
    assert same(value_and_grad(each, npnet.Quadratic(), x, y)[1].values(), first[1].values())
    add_gradients(each, npnet.Quadratic(), x, y)
    add_gradients(each, npnet.Quadratic(), x, y)
    close(gradients(each), [2 * gradient for gradient in first[1].values()])
    npnet.SGD(0.1).zero_grad(each.parameters())
    assert gradients(each) == [None] * len(before)


def test_value_and_grad_takes_a_model_that_is_no_chain():
    x, y = batch_of(24, features=3)
    value, found = value_and_grad(Residual(Linear(3, 3, dtype=np.float64, rng=0)), npnet.Quadratic(), x, y)
    assert set(found) == {"inner.weight", "inner.bias"}
    assert value > 0 < np.abs(found["inner.bias"]).min()


# A model in halves.


def halves():
    """Dropout in both; the bottleneck is narrow."""
    rng = np.random.default_rng(0)
    before = Sequential(Linear(16, 256, rng=rng), Dropout(0.3, rng=rng), npnet.Tanh(), Linear(256, 4, rng=rng))
    after = Sequential(Linear(4, 256, rng=rng), npnet.Tanh(), Dropout(0.4, rng=rng), Linear(256, 3, rng=rng))
    return before, after


def test_a_model_in_halves_has_the_bits_of_the_whole_in_less_memory():
    before, after = halves()
    whole, loss, rng = Sequential(*before.layers, *after.layers), npnet.MeanSquaredError(), np.random.default_rng(1)
    x, y = (rng.standard_normal((2000, features)).astype(np.float32) for features in (16, 3))
    for _ in range(2):  # in the first run what is made once
        with one_step(3):
            plain = npnet.measure_peak(value_and_grad, whole, loss, x, y)
        with one_step(3):
            lazy = npnet.measure_peak(lazy_gradient, before, after, loss, x, y)
        value, expected = plain.result
        assert lazy.result == value
        assert same(gradients(whole), expected.values())
        npnet.SGD(0.1).zero_grad(whole.parameters())
    assert lazy.increase_bytes < 0.75 * plain.increase_bytes


def test_the_halves_are_run_in_one_step_of_their_own():
    (before, after), rng = halves(), np.random.default_rng(1)
    x, y = (rng.standard_normal((50, features)).astype(np.float32) for features in (16, 3))
    step = new_step()
    lazy_gradient(before, after, npnet.Quadratic(), x, y)
    ours = gradients(before) + gradients(after)
    with one_step(step + 1):
        _, expected = value_and_grad(Sequential(before, after), npnet.Quadratic(), x, y)
    assert same(ours, expected.values())
    assert new_step() == step + 2


def test_an_update_after_each_layer_of_a_half_frees_its_gradients_and_updates_as_the_whole_would():
    (before, after), (x, y) = halves(), (np.ones((8, 16), np.float32), np.ones((8, 3), np.float32))
    alive, order, optimizer = [], [], npnet.SGD(0.5)
    whole = Sequential(*before.layers, *after.layers)

    def update(layer):
        order.append(layer)
        alive.append(sum(gradient is not None for gradient in gradients(whole)))
        optimizer.step(layer.parameters())

    with one_step(3):
        lazy_gradient(before, after, npnet.Quadratic(), x, y, after_backward=update)
    assert order == whole.layers[::-1]
    assert set(alive) == {0, 2}
    assert gradients(whole) == [None] * 8
    other = Sequential(*(layer for half in halves() for layer in half.layers))
    with one_step(3):
        train_step(other, npnet.Quadratic(), npnet.SGD(0.5), none(other), x, y)
    assert same(weights(whole), weights(other))


# The norm.


def with_gradients(*arrays):
    parameters = [npnet.Parameter(np.zeros_like(array)) for array in arrays]
    for parameter, array in zip(parameters, arrays, strict=True):
        parameter.gradient = array.copy(order="K")
    return parameters


@pytest.mark.parametrize("max_norm", [0, 0.1, 1, 12.999, 13, 13.001, 1e6])
def test_the_gradient_is_scaled_to_the_norm_and_only_down(max_norm):
    arrays = np.array([[3.0, 0], [0, 0]]), np.array([4.0, 0, 12]), np.zeros((2, 2), order="F")
    parameters = [*with_gradients(*arrays), npnet.Parameter(np.ones(2))]  # the last has no gradient
    assert npnet.clip_grad_norm(iter(parameters), max_norm) == 13
    for parameter, array in zip(parameters, arrays, strict=False):
        np.testing.assert_allclose(parameter.gradient, array * min(1, max_norm / 13), rtol=1e-14)
    assert parameters[-1].gradient is None
    assert npnet.clip_grad_norm([], 1.0) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_norm_that_is_not_finite_is_an_error_and_updates_nothing(value):
    parameters = with_gradients(np.ones(3), np.array([1, value]))
    with pytest.raises(TrainingDiverged, match=r"the norm of the gradient is (nan|inf), training has diverged"):
        npnet.clip_grad_norm(parameters, 1.0, error_if_nonfinite=True)
    assert np.array_equal(parameters[0].gradient, np.ones(3))
    assert np.isinf(npnet.clip_grad_norm(parameters, 1.0)) == np.isinf(value)  # as PyTorch: by itself it is none
    assert np.array_equal(parameters[0].gradient, np.ones(3))
    assert np.array_equal(parameters[1].gradient, [1, value], equal_nan=True)


def test_squares_that_overflow_give_the_norm_all_the_same_and_an_infinite_one_is_an_error():
    parameters = with_gradients(np.full(3, 1e30, np.float32))
    assert npnet.clip_grad_norm(parameters, 1.0, error_if_nonfinite=True) == pytest.approx(3**0.5 * 1e30, rel=1e-6)
    with pytest.raises(TrainingDiverged):
        npnet.clip_grad_norm(with_gradients(np.full(3, np.inf, np.float32)), 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("max_norm", [-1, np.nan, np.inf, "1", None])
def test_a_bad_norm_is_refused_by_name(max_norm):
    with pytest.raises((TypeError, ValueError), match="max_norm: expected a finite number, at least 0, got"):
        npnet.clip_grad_norm([], max_norm)


# Exceptions.


class Failing(npnet.Quadratic):
    """Its n-th value is an interruption, or is not finite."""

    def __init__(self, error, n):
        self.error, self.calls = error, n

    def value_and_gradient(self, output, target):
        self.calls -= 1
        value, gradient = super().value_and_gradient(output, target)
        if not self.calls and self.error is KeyboardInterrupt:
            raise KeyboardInterrupt
        return (value if self.calls else np.float64(np.inf)), gradient


def batches_until(loss, x, y):
    yield x[:8], y[:8]
    npnet.losses.check_finite(loss(y, y))


STEPS = {
    "value_and_grad": lambda each, loss, x, y: value_and_grad(each, loss(1), x, y),
    "add_gradients": lambda each, loss, x, y: add_gradients(each, loss(1), x, y),
    "train_step": lambda each, loss, x, y: train_step(each, loss(1), npnet.SGD(0.1), none(each), x, y),
    "clipped": lambda each, loss, x, y: train_step(each, loss(1), npnet.SGD(0.1), none(each), x, y, clip_norm=1.0),
    "accumulated": lambda each, loss, x, y: accumulated_step(
        each, loss(3), npnet.SGD(0.1), none(each), cut(x, y, [0, 8, 16, 24]), 24
    ),
    "between two batches": lambda each, loss, x, y: accumulated_step(
        each, npnet.Quadratic(), npnet.SGD(0.1), none(each), batches_until(loss(1), x, y), 24
    ),
    "lazy": lambda each, loss, x, y: lazy_gradient(
        Sequential(*each.layers[:2]), Sequential(*each.layers[2:]), loss(1), x, y
    ),
}


@pytest.mark.parametrize("error", [TrainingDiverged, KeyboardInterrupt])
@pytest.mark.parametrize("name", STEPS)
def test_whatever_a_loss_raises_leaves_no_gradients_and_the_weights_as_they_were(name, error):
    each, (x, y) = model(), batch_of(24)
    before = [array.copy() for array in weights(each)]
    add_gradients(each, npnet.Quadratic(), x, y)  # of a step before
    with pytest.raises(error):
        STEPS[name](each, lambda n: Failing(error, n), x, y)
    assert gradients(each) == [None] * len(before)
    assert same(weights(each), before)


def test_an_interruption_in_the_first_half_leaves_no_gradients_of_the_second():
    class Interrupted(npnet.Tanh):
        def backward_(self, dy, saved, needs_dx=True):
            raise KeyboardInterrupt

    (before, after), x, y = halves(), np.ones((8, 16), np.float32), np.ones((8, 3), np.float32)
    before.layers[2] = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        lazy_gradient(before, after, npnet.Quadratic(), x, y)
    assert gradients(before) + gradients(after) == [None] * 8
