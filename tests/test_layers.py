"""Layers: backward is the derivative of forward, nothing is remembered, and wrong input is named as such."""

import weakref

import numpy as np
import pytest

from npnet.activations import ACTIVATIONS, Tanh, as_activation
from npnet.blocks import GELU, Dropout, LayerNorm, Residual
from npnet.checkpoint import checkpoint
from npnet.initializers import kaiming_normal, normal, xavier_normal
from npnet.layer import Layer
from npnet.layers import Dense, Linear, Sequential, mlp
from npnet.random import one_step

# OpenBLAS 0.3.31 with AVX-512 now and then raises the "invalid" flag in float32 products that are right (inner size 5).
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in dot:RuntimeWarning")

NAMES = sorted(ACTIVATIONS)
FORMULAS = {"sigmoid": lambda z: 1 / (1 + np.exp(-z)), "tanh": np.tanh, "relu": lambda z: np.where(z > 0, z, 0.0)}
FORMULAS["softmax"] = lambda z: np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
DENSE = {f"dense-{name}": lambda dtype, name=name: with_biases(Dense(4, 3, name, dtype=dtype, rng=1)) for name in NAMES}
LAYERS = {
    **{name: lambda dtype, name=name: as_activation(name) for name in NAMES},
    **DENSE,
    "linear": lambda dtype: with_biases(Linear(4, 3, dtype=dtype, rng=1)),
    "layernorm": lambda dtype: with_biases(LayerNorm(4, dtype=dtype)),
    "gelu": lambda dtype: GELU(),
    "gelu-tanh": lambda dtype: GELU("tanh"),
    "dropout": lambda dtype: Dropout(0.4, rng=2),
    "residual": lambda dtype: Residual(with_biases(mlp([4, 5, 4], "tanh", "sigmoid", dtype=dtype, rng=3))),
    "checkpoint": lambda dtype: checkpoint(Sequential(Linear(4, 4, dtype=dtype, rng=1), Dropout(0.3, rng=2), GELU())),
    "sequential": lambda dtype: with_biases(mlp([4, 5, 2, 3], "tanh", "sigmoid", dtype=dtype, rng=3)),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
every_dense = pytest.mark.parametrize("make", DENSE.values(), ids=DENSE)


@pytest.fixture(autouse=True)
def same_step():
    """Within one training step whatever is random stays the same."""
    with one_step(5):
        yield


def with_biases(layer):
    """The layer with biases other than zero, so that forgetting one shows."""
    for bias in layer.parameters()[1::2]:
        bias.value += np.random.default_rng(9).standard_normal(bias.value.shape).astype(bias.value.dtype)
    return layer


def numeric_gradient(f, array, step=1e-6):
    """df/d(array) by central differences; f() reads the array, whose values are put back."""
    gradient = np.empty(array.shape)
    for index in np.ndindex(array.shape):
        before = array[index]
        array[index] = before + step
        gradient[index] = f() / (2 * step)
        array[index] = before - step
        gradient[index] -= f() / (2 * step)
        array[index] = before
    return gradient


def run(layer, batch=5, dtype=np.float64):
    """x, y, saved, and a random cotangent dy."""
    random = np.random.default_rng(batch)
    x = random.standard_normal((batch, 4)).astype(dtype)
    y, saved = layer.forward(x)
    return x, y, saved, random.standard_normal(y.shape).astype(dtype)


@pytest.mark.parametrize("batch", [1, 5])
@every_layer
def test_backward_agrees_with_central_differences_for_input_and_parameters(make, batch):
    layer = make(np.float64)
    x, _, saved, dy = run(layer, batch)
    dx = layer.backward(dy, saved)

    def value():
        return float((layer.forward(x)[0] * dy).sum())

    np.testing.assert_allclose(dx, numeric_gradient(value, x), rtol=1e-6, atol=1e-8)
    for parameter in layer.parameters():
        expected = numeric_gradient(value, parameter.value)
        np.testing.assert_allclose(parameter.gradient, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_the_formula(name):
    z = np.linspace(-5, 5, 21).reshape(3, 7)
    np.testing.assert_allclose(
        as_activation(name).forward(z)[0], FORMULAS.get(name, np.array)(z), rtol=1e-14, atol=1e-16
    )
    dense = with_biases(Dense(7, 2, name, dtype=np.float64, rng=0))
    expected = FORMULAS.get(name, np.array)(z @ dense.weight.value.T + dense.bias.value)
    np.testing.assert_allclose(dense.forward(z)[0], expected, rtol=1e-12, atol=1e-14)


@every_layer
def test_forward_leaves_x_alone_and_gives_the_same_bits_again(make):
    layer = make(np.float64)
    x = np.random.default_rng(0).standard_normal((5, 4))
    before, first = x.copy(), layer.forward(x)[0]
    assert np.array_equal(x, before)
    assert np.array_equal(first, layer.forward(x)[0])
    assert not np.shares_memory(first, x)


@every_layer
def test_backward_leaves_dy_and_saved_alone_and_equals_backward_(make):
    public, engine = make(np.float64), make(np.float64)
    x, y, saved, dy = run(public)
    x_before, y_before, dy_before = x.copy(), y.copy(), dy.copy()
    dx = public.backward(dy, saved)
    assert np.array_equal(dy, dy_before)
    assert not np.shares_memory(dx, dy)
    assert np.array_equal(dx, engine.backward_(dy, saved))
    assert np.array_equal(x, x_before)
    assert np.array_equal(y, y_before)
    for ours, theirs in zip(public.parameters(), engine.parameters(), strict=True):
        assert np.array_equal(ours.gradient, theirs.gradient)


@every_dense
def test_gradients_of_two_backward_passes_add_up(make):
    gradients = []
    both, x = make(np.float64), np.random.default_rng(4).standard_normal((2, 5, 4))
    for part in x:
        alone = make(np.float64)
        for layer in (alone, both):
            y, saved = layer.forward(part)
            layer.backward(y + 1, saved)
        gradients.append([parameter.gradient for parameter in alone.parameters()])
    for parameter, first, second in zip(both.parameters(), *gradients, strict=True):
        assert np.array_equal(parameter.gradient, first + second)
        assert not np.array_equal(first, second)


@every_dense
def test_without_needs_dx_dense_returns_none_and_the_same_parameter_gradients(make):
    with_dx, without = make(np.float64), make(np.float64)
    _, _, saved, dy = run(with_dx)
    assert with_dx.backward_(dy.copy(), saved, True).shape == (5, 4)
    assert without.backward_(dy.copy(), saved, False) is None
    for ours, theirs in zip(with_dx.parameters(), without.parameters(), strict=True):
        assert np.array_equal(ours.gradient, theirs.gradient)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "low", "high"), [("sigmoid", 0, 1), ("tanh", -1, 1), ("relu", 0, 1000)])
def test_far_out_an_activation_is_exactly_its_limit(name, low, high, dtype):
    x = np.array([[-1000, 1000]], dtype)
    dense = Dense(2, 2, name, initializer=lambda shape, _: np.eye(2), dtype=dtype)
    for layer in (as_activation(name), dense):
        with np.errstate(over="ignore"):  # which the engine does for a whole step
            y, saved = layer.forward(x)
        assert np.array_equal(y, [[low, high]])
        assert np.array_equal(layer.backward(np.ones_like(y), saved), [[0, name == "relu"]])


@every_layer
def test_float32_stays_float32_in_every_result(make):
    layer = make(np.float32)
    _, y, saved, dy = run(layer, dtype=np.float32)
    results = [y, layer.backward(dy, saved), *(a for p in layer.parameters() for a in (p.value, p.gradient))]
    assert {array.dtype for array in results} == {np.dtype(np.float32)}


@every_dense
def test_strided_input_and_gradient_are_as_good_as_contiguous_ones(make):
    plain, strided = make(np.float64), make(np.float64)
    x, y, saved, dy = run(plain, 6)
    y_strided, saved_strided = strided.forward(np.repeat(x, 2, axis=1)[:, ::2])
    np.testing.assert_allclose(y_strided, y, rtol=1e-14)
    dx = strided.backward(np.asfortranarray(dy), saved_strided)
    np.testing.assert_allclose(dx, plain.backward(dy, saved), rtol=1e-13)
    for ours, theirs in zip(strided.parameters(), plain.parameters(), strict=True):
        np.testing.assert_allclose(ours.gradient, theirs.gradient, rtol=1e-13)


@every_layer
def test_a_layer_remembers_neither_input_nor_output_nor_gradient(make):
    layer = make(np.float64)
    before = dict(vars(layer))
    x, y, saved, dy = run(layer)
    dx = layer.backward(dy, saved)
    refs = [weakref.ref(array) for array in (x, y, dy, dx)]
    del x, y, saved, dy, dx
    assert [ref() for ref in refs] == [None] * 4
    assert vars(layer) == before


WRONG_INPUTS = {
    "features": (np.ones((5, 3), np.float32), ValueError, r"expected rows of shape \(batch, 4\), got \(5, 3\)"),
    "1-D": (np.ones(4, np.float32), ValueError, r"expected rows of shape \(batch, 4\), got \(4,\)"),
    "3-D": (np.ones((5, 1, 4), np.float32), ValueError, r"expected rows of shape \(batch, 4\), got \(5, 1, 4\)"),
    "int": (np.ones((5, 4), np.int64), TypeError, r"the input has dtype int64, the weights float32; .*astype"),
    "float16": (np.ones((5, 4), np.float16), TypeError, r"the input has dtype float16, the weights float32"),
    "float64": (np.ones((5, 4)), TypeError, r"the input has dtype float64, the weights float32"),
    "list": ([[1.0] * 4], TypeError, r"expected an array of 'numpy', got list"),
}


@pytest.mark.parametrize(("x", "error", "message"), WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_dense_says_what_was_wrong_with_its_input(x, error, message):
    with pytest.raises(error, match=message):
        Dense(4, 3).forward(x)


def test_input_of_another_precision_than_float64_weights_is_refused():
    with pytest.raises(TypeError, match=r"Dense\(4, 3, relu\): the input has dtype float32, the weights float64"):
        Dense(4, 3, dtype=np.float64).forward(np.ones((5, 4), np.float32))


@pytest.mark.parametrize("shape", [(5, 1), (1, 3), (3,), (), (1, 1), (4, 3), (5, 4), (1, 5, 3)], ids=str)
@pytest.mark.parametrize("layer", [Dense(3, 3, name, dtype=np.float64) for name in NAMES] + [Tanh()], ids=repr)
def test_a_gradient_of_another_shape_is_refused_even_where_it_would_broadcast(layer, shape):
    _, saved = layer.forward(np.ones((5, 3)))
    with pytest.raises(ValueError, match=r"dy must have the output's shape \(5, 3\), got"):
        layer.backward(np.ones(shape), saved)
    assert all(parameter.gradient is None for parameter in layer.parameters())


BAD_MODELS = {
    "no inputs": (lambda: Dense(0, 3), ValueError, r"in_features: .* at least 1, got 0"),
    "bool": (lambda: Dense(3, True), TypeError, r"out_features: expected a whole number, at least 1, got True"),
    "activation": (lambda: Dense(3, 2, "selu"), ValueError, r"unknown activation 'selu'; choose one of 'sigmoid', "),
    "empty": (lambda: Sequential(), ValueError, r"Sequential: expected at least one layer"),
    "a list": (lambda: Sequential([Dense(3, 2)]), TypeError, r"Sequential: expected layers, got \[Dense"),
    "one size": (lambda: mlp([3]), ValueError, r"sizes: expected the sizes of at least two layers.*got \[3\]"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_model_that_cannot_be_built_says_why(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_mlp_is_a_row_of_dense_layers_of_these_sizes():
    model = mlp([7, 6, 4], "tanh", "sigmoid", rng=0)
    assert repr(model) == "Sequential(Dense(7, 6, tanh), Dense(6, 4, sigmoid))"
    assert [p.value.shape for p in model.parameters()] == [(6, 7), (6,), (4, 6), (4,)]
    x = np.random.default_rng(0).standard_normal((2, 7)).astype(np.float32)
    assert np.array_equal(model.predict(x), model.forward(x)[0])


def test_the_same_seed_gives_the_same_weights_and_another_layer_others():
    first, second = mlp([6, 6, 6], rng=5), mlp([6, 6, 6], rng=np.random.default_rng(5))
    other, fresh = mlp([6, 6, 6], rng=6), mlp([6, 6, 6])
    for ours, theirs in zip(first.layers, second.layers, strict=True):
        assert np.array_equal(ours.weight.value, theirs.weight.value)
    for weight in (first.layers[1].weight, other.layers[0].weight, fresh.layers[0].weight):
        assert not np.array_equal(first.layers[0].weight.value, weight.value)


@pytest.mark.parametrize(
    ("initializer", "name", "std"),
    [(normal, "tanh", 1.0), (xavier_normal, "relu", (2 / 700) ** 0.5), (kaiming_normal, "tanh", (2 / 500) ** 0.5)]
    + [(None, name, (2 / (500 if name == "relu" else 700)) ** 0.5) for name in NAMES],
)
def test_initial_weights_have_the_standard_deviation_of_the_formula(initializer, name, std):
    dense = Dense(500, 200, name, initializer=initializer, rng=0)
    assert dense.weight.value.std() == pytest.approx(std, rel=0.01)  # 100,000 numbers: known to 0.2%
    assert dense.weight.value.mean() == pytest.approx(0, abs=0.015 * std)
    assert not dense.bias.value.any()


# What is said of mistakes.


def test_an_array_in_a_parameters_place_is_refused():
    dense = Dense(3, 2, rng=0)
    with pytest.raises(TypeError, match=r"Dense\(3, 2, relu\): weight is a Parameter; .*weight\.value, assign to that"):
        dense.weight = dense.weight.value * 0.5
    dense.weight = type(dense.weight)(dense.weight.value * 0.5)
    dense.bias.value = dense.bias.value + 1


def test_a_weight_of_another_shape_is_named_and_not_the_input():
    dense = Dense(3, 2, rng=0)
    dense.weight.value = np.zeros((5, 5), np.float32)
    with pytest.raises(ValueError, match=r"weight.value should be .* of shape \(2, 3\); it has \(5, 5\)"):
        dense.forward(np.ones((4, 3), np.float32))


@pytest.mark.parametrize("saved", [None, 5, (1, 2, 3), np.ones(2)])
def test_saved_that_forward_did_not_return_is_refused(saved):
    for layer in (Dense(3, 2, rng=0), Tanh()):
        with pytest.raises(TypeError, match="saved must be what forward returned beside y"):
            layer.backward(np.ones((4, 2), np.float32), saved)


def test_a_layer_that_forgets_what_it_saved_is_named():
    class Doubling(Layer):
        def forward(self, x):
            return 2 * x

    x = np.ones((2, 3), np.float32)
    for call in (Doubling(), Sequential(Tanh(), Doubling()).predict):
        with pytest.raises(TypeError, match=r"Doubling.*forward must return a pair .*returned a ndarray"):
            call(x)
