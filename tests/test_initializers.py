"""Initializers: the mean, the standard deviation and the range of each formula, by name, layer by layer."""

from functools import partial

import numpy as np
import pytest

import npnet
from npnet import Dense, Linear, mlp
from npnet.activations import ACTIVATIONS
from npnet.initializers import (
    GAINS,
    INITIALIZERS,
    as_initializer,
    calculate_gain,
    kaiming_normal,
    kaiming_uniform,
    normal,
    xavier_normal,
    xavier_uniform,
    zeros,
)

RELU, TANH = 2**0.5, 5 / 3
SHAPES = [(700, 300), (300, 700), (2000, 30), (30, 2000), (512, 512)]  # (out, in)
CASES = {  # the initializer, and the standard deviation for (out, in)
    "normal": (normal, lambda out, n: 1.0),
    "normal, std": (partial(normal, std=0.02), lambda out, n: 0.02),
    "xavier normal": (xavier_normal, lambda out, n: (2 / (n + out)) ** 0.5),
    "xavier normal, gain": (partial(xavier_normal, gain=3), lambda out, n: 3 * (2 / (n + out)) ** 0.5),
    "xavier uniform": (xavier_uniform, lambda out, n: (2 / (n + out)) ** 0.5),
    "xavier uniform, gain": (partial(xavier_uniform, gain=RELU), lambda out, n: RELU * (2 / (n + out)) ** 0.5),
    "kaiming normal": (kaiming_normal, lambda out, n: (2 / n) ** 0.5),
    "kaiming normal, out": (partial(kaiming_normal, mode="fan_out"), lambda out, n: (2 / out) ** 0.5),
    "kaiming normal, tanh": (partial(kaiming_normal, nonlinearity="tanh"), lambda out, n: TANH / n**0.5),
    "kaiming uniform": (kaiming_uniform, lambda out, n: (2 / n) ** 0.5),
    "kaiming uniform, out": (partial(kaiming_uniform, mode="fan_out"), lambda out, n: (2 / out) ** 0.5),
    "kaiming uniform, linear": (partial(kaiming_uniform, nonlinearity="linear"), lambda out, n: 1 / n**0.5),
}


def drawn(initializer, shape, seed=0):
    return initializer(shape, np.random.default_rng(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("initializer", "std"), CASES.values(), ids=CASES)
def test_mean_and_standard_deviation_are_the_formulas(initializer, std, shape):
    weight, expected = drawn(initializer, shape), std(*shape)
    assert (weight.shape, weight.dtype) == (shape, np.float64)
    assert weight.std() == pytest.approx(expected, rel=5 / (2 * weight.size) ** 0.5)  # five standard errors
    assert weight.mean() == pytest.approx(0, abs=5 * expected / weight.size**0.5)


@pytest.mark.parametrize("name", CASES)
def test_the_distribution_is_the_one_that_its_name_says(name):
    (initializer, std), shape = CASES[name], SHAPES[0]
    weight = drawn(initializer, shape) / std(*shape)
    if "uniform" in name:
        assert np.abs(weight).max() == pytest.approx(3**0.5, rel=1e-3)
        assert np.abs(weight).max() <= 3**0.5 * (1 + 1e-12)
        assert (weight**4).mean() == pytest.approx(9 / 5, rel=0.02)
    else:
        assert np.abs(weight).max() > 4
        assert (weight**4).mean() == pytest.approx(3, rel=0.03)


def test_the_mean_of_the_normal_distribution_may_be_another():
    weight = drawn(partial(normal, mean=-3.0, std=0.1), (400, 500))
    assert weight.mean() == pytest.approx(-3, abs=0.002)
    assert weight.std() == pytest.approx(0.1, rel=0.01)


def test_zeros_are_zeros():
    assert np.array_equal(drawn(zeros, (3, 2)), [[0, 0]] * 3)


@pytest.mark.parametrize(("initializer", "_std"), CASES.values(), ids=CASES)
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(initializer, _std):
    assert np.array_equal(drawn(initializer, (9, 5)), drawn(initializer, (9, 5)))
    assert not np.intersect1d(drawn(initializer, (9, 5)), drawn(initializer, (9, 5), seed=1)).size


# Gains.


def test_gains_are_those_of_the_books():
    gains = {"linear": 1, "identity": 1, "sigmoid": 1, "tanh": 5 / 3, "relu": 2**0.5}
    assert set(GAINS) == set(gains)
    for name, gain in gains.items():
        assert calculate_gain(name) == pytest.approx(gain, rel=1e-15)


@pytest.mark.parametrize("name", ["linear", "sigmoid", "tanh", "relu"])
def test_gains_are_pytorchs(name):
    torch = pytest.importorskip("torch")
    assert calculate_gain(name) == pytest.approx(torch.nn.init.calculate_gain(name), rel=1e-15)


# Names.


@pytest.mark.parametrize("name", INITIALIZERS)
def test_a_name_stands_for_the_function_of_that_name_in_every_layer(name):
    function = getattr(npnet.initializers, name)
    assert as_initializer(name) is as_initializer(function) is function
    expected = drawn(function, (6, 4), 3).astype(np.float32)
    for layer in (Dense(4, 6, "tanh", initializer=name, rng=3), Linear(4, 6, initializer=name, rng=3)):
        assert np.array_equal(layer.weight.value, expected)
        assert not layer.bias.value.any()
    model = mlp([4, 6, 2], initializer=name, rng=3)
    rng = np.random.default_rng(3)
    for layer in model.layers:
        weight = function(layer.weight.value.shape, rng)
        assert np.array_equal(layer.weight.value, weight.astype(np.float32))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_a_name_a_layer_takes_the_one_that_suits_its_activation(activation):
    expected = kaiming_normal if activation == "relu" else xavier_normal
    weight = Dense(40, 60, activation, dtype=np.float64, rng=3).weight.value
    assert np.array_equal(weight, drawn(expected, (60, 40), 3))
    assert np.array_equal(Linear(40, 60, dtype=np.float64, rng=3).weight.value, drawn(xavier_normal, (60, 40), 3))


def test_the_exercises_three_layers_have_the_standard_deviations_of_its_formulas():
    cases = [
        ((32, 8), partial(xavier_uniform, gain=calculate_gain("relu")), (2 * 2 / 40) ** 0.5),
        ((16, 32), "kaiming_normal", (2 / 32) ** 0.5),
        ((4, 16), partial(normal, std=0.02), 0.02),
    ]
    for (out, inputs), initializer, std in cases:
        weights = [
            Dense(inputs, out, initializer=initializer, dtype=np.float64, rng=seed).weight.value for seed in range(400)
        ]
        assert np.std(weights) == pytest.approx(std, rel=0.02)
        assert np.mean(weights) == pytest.approx(0, abs=0.05 * std)
        assert weights[0].shape == (out, inputs)


# Errors.


BAD = {
    "a name": (
        lambda: Dense(3, 2, initializer="orthogonal"),
        "unknown initializer 'orthogonal'; choose one of 'zer",
    ),
    "no name": (
        lambda: Linear(3, 2, initializer=3),
        "unknown initializer 3; choose one of 'zeros', 'normal', 'x",
    ),
    "a list": (lambda: as_initializer(["normal"]), r"unknown initializer \['normal'\]"),
    "nonlinearity": (lambda: calculate_gain("selu"), "unknown nonlinearity 'selu'; choose one of 'linear', 'identity'"),
    "bound": (lambda: drawn(partial(kaiming_normal, nonlinearity="x"), (2, 2)), "unknown nonlinearity 'x'; choose"),
    "mode": (
        lambda: drawn(partial(kaiming_normal, mode="fan"), (2, 2)),
        "mode: expected 'fan_in' or 'fan_out', got 'fan'",
    ),
    "mode, uniform": (lambda: drawn(partial(kaiming_uniform, mode=None), (2, 2)), "mode: expected .*, got None"),
    "std": (lambda: drawn(partial(normal, std=-1), (2, 2)), "std: expected a finite number, at least 0, got -1"),
    "shape": (
        lambda: Dense(3, 2, initializer=lambda shape, rng: np.ones(shape[::-1])),
        r"initializer: expected shape \(2, 3\), got \(3, 2\)",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_what_cannot_initialize_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
