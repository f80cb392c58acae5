"""A thousand layers: the same gradients in a small part of the memory."""

import numpy as np
import pytest

import npnet
from npnet import SGD, Quadratic, measure_peak, mlp, plan, train_step, value_and_grad

DEPTH, WIDTH, BATCH = 1000, 8, 500


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(0)
    near_identity = lambda shape, generator: np.eye(*shape) + 0.003 * generator.standard_normal(shape)  # noqa: E731
    model = mlp([WIDTH] * (DEPTH + 1), "tanh", "identity", initializer=near_identity, rng=0)
    return model, rng.random((BATCH, WIDTH), np.float32), rng.random((BATCH, WIDTH), np.float32)


@pytest.mark.parametrize("strategy", ["sqrt", "revolve"])
def test_a_thousand_layers_have_the_gradients_of_plain_backpropagation_bit_for_bit(network, strategy):
    model, x, y = network
    value, expected = value_and_grad(model, Quadratic(), x, y)
    found_value, found = value_and_grad(model, Quadratic(), x, y, schedule=strategy)
    assert found_value == value
    assert all(gradient.any() and np.array_equal(found[name], gradient) for name, gradient in expected.items())


def test_a_thousand_layers_train_in_memory_that_grows_like_the_square_root_or_the_logarithm(network):
    model, x, y = network
    peaks = {}
    for strategy in ("none", "sqrt", "revolve"):
        planned = plan(model, BATCH, strategy=strategy)
        peak = measure_peak(train_step, model, Quadratic(), SGD(1e-3), planned.schedule, x, y).increase_bytes
        assert abs(peak - (planned.peak_bytes - planned.chain.fixed)) < 0.01 * planned.peak_bytes + 128 * 1024
        peaks[strategy] = peak / (BATCH * WIDTH * 4)  # in activations
    assert peaks["none"] > DEPTH
    assert peaks["sqrt"] < 3 * DEPTH**0.5
    assert peaks["revolve"] < 3 * np.log2(DEPTH)


def test_a_budget_for_more_layers_than_are_planned_exactly_is_kept_to_and_not_called_proven():
    model = mlp([WIDTH] * 501, "tanh", rng=0)
    plain = plan(model, BATCH)
    planned = plan(model, BATCH, memory_budget=plain.peak_bytes // 3)
    assert planned.peak_bytes <= plain.peak_bytes // 3
    assert (planned.bound, planned.proven) == (None, False)
    assert "not proven optimal" in planned.describe()
    with pytest.raises(npnet.InfeasibleBudget):
        plan(model, BATCH, memory_budget=plain.chain.fixed)
