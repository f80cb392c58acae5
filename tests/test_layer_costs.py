"""What a layer says that it costs is what is traced when it runs."""

import tracemalloc

import numpy as np
import pytest

from npnet.activations import Activation, Identity, ReLU, Sigmoid, Tanh
from npnet.layers import Dense, Sequential
from npnet.memory import measuring

BATCH, FEATURES, OUT, DEEP = 3000, 40, 70, 90  # the smallest array takes 480 kB
TOLERATED = 72 * 1024  # rows, columns and Python's objects; and NumPy broadcasts a bias 8192 numbers at a time
ACTIVATIONS = {"identity": Identity, "relu": ReLU, "sigmoid": Sigmoid, "tanh": Tanh}


def dense(inputs, outputs, activation="relu"):
    return lambda dtype: Dense(inputs, outputs, activation, dtype=dtype, rng=0)


def nested(*makers):
    return lambda dtype: Sequential(*(make(dtype) for make in makers))


def alone(activation):
    return lambda dtype: activation()


LAYERS = {
    **{f"dense {name}": dense(FEATURES, OUT, name) for name in ACTIVATIONS},
    **{name: alone(activation) for name, activation in ACTIVATIONS.items()},
    "dense, wide": dense(FEATURES, 1000, "tanh"),
    "dense, thin": dense(FEATURES, 1, "sigmoid"),
    "nested": nested(dense(FEATURES, DEEP, "sigmoid"), alone(Tanh), dense(DEEP, OUT, "identity")),
    "nested, growing": nested(dense(FEATURES, 10), dense(10, OUT), dense(OUT, 400, "tanh")),
    "nested, shrinking": nested(dense(FEATURES, 400), dense(400, OUT, "tanh"), dense(OUT, 2, "identity")),
    "nested, one": nested(dense(FEATURES, OUT)),
    "nested twice": nested(nested(alone(ReLU), dense(FEATURES, DEEP)), nested(dense(DEEP, 10), dense(10, OUT, "tanh"))),
    "nested, with large weights": nested(dense(FEATURES, 700), dense(700, 500, "sigmoid"), dense(500, 3)),
}
IN_PLACE_LAST = {
    "nested, an activation last": nested(dense(FEATURES, OUT, "identity"), alone(Tanh)),
    "nested, activations last": nested(dense(FEATURES, OUT), alone(ReLU), nested(alone(Identity), alone(Identity))),
}
EVERY = [(name, dtype) for name in LAYERS for dtype in (np.float32, np.float64)]


def traced(call):
    """The result, the most bytes that there were meanwhile, and those that are left."""
    with measuring():
        tracemalloc.start()
        try:
            result = call()
            left, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    return result, peak, left


def check_forward(layer, cost, x):
    """Trace it, and return what it saved, and its output."""
    layer.forward(x)  # what is made once, such as vectors of ones, is there then
    (y, saved), peak, left = traced(lambda: layer.forward(x))
    assert (y.shape, y.nbytes) == (cost.output_shape, cost.output_bytes)
    assert abs(left - cost.output_bytes - cost.saved_bytes) < TOLERATED
    assert abs(peak - cost.output_bytes - cost.forward_bytes) < TOLERATED
    return y, saved


def check_backward(layer, cost, y, saved, needs_dx):
    for warming_up in (True, False):
        dy = np.ones_like(y)
        dx, peak, left = traced(lambda dy=dy: layer.backward_(dy, saved, needs_dx))
        gradients = [parameter.take_gradient() for parameter in layer.parameters()]
        if not warming_up:
            assert sum(gradient.nbytes for gradient in gradients) == cost.gradient_bytes
            assert abs(peak - cost.backward_bytes) < TOLERATED
            passed = 0 if dx is None or np.shares_memory(dx, dy) else dx.nbytes
            assert abs(left - cost.gradient_bytes - passed) < TOLERATED


def check(layer, dtype):
    x = np.random.default_rng(0).standard_normal((BATCH, FEATURES)).astype(dtype)
    for needs_dx in (True, False):
        cost = layer.cost(x.shape, x.dtype, needs_dx)
        y, saved = check_forward(layer, cost, x)
        check_backward(layer, cost, y, saved, needs_dx)


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_what_a_layer_costs_is_what_is_traced(name, dtype):
    check(LAYERS[name](dtype), dtype)


@pytest.mark.parametrize("name", IN_PLACE_LAST)
def test_what_a_chain_that_ends_in_an_activation_costs_is_what_is_traced(name):
    check(IN_PLACE_LAST[name](np.float32), np.float32)


def test_a_cost_that_is_wrong_by_an_array_is_caught():
    layer, x = LAYERS["nested"](np.float32), np.ones((BATCH, FEATURES), np.float32)
    right = layer.cost(x.shape, x.dtype)
    for field in ("output_bytes", "saved_bytes", "forward_bytes"):
        with pytest.raises(AssertionError):
            check_forward(layer, right._replace(**{field: getattr(right, field) - x.nbytes}), x)
    y, saved = layer.forward(x)
    for field in ("gradient_bytes", "backward_bytes"):
        with pytest.raises(AssertionError):
            check_backward(layer, right._replace(**{field: getattr(right, field) - x.nbytes}), y, saved, needs_dx=True)


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_flops_are_positive_and_those_of_a_product_are_counted(name, dtype):
    layer = LAYERS[name](dtype)
    with_dx, without = (layer.cost((7, FEATURES), np.dtype(dtype), needs_dx) for needs_dx in (True, False))
    assert with_dx.forward_flops == without.forward_flops >= 0
    assert with_dx.backward_flops >= without.backward_flops >= 0
    assert isinstance(layer, Identity) or with_dx.forward_flops > 0 < without.backward_flops
    if isinstance(layer, Dense):
        product, size = 2 * 7 * layer.in_features * layer.out_features, 7 * layer.out_features
        forward, backward = layer.activation.flops
        assert with_dx.forward_flops == product + (1 + forward) * size  # 1: the bias
        assert without.backward_flops == product + (2 + backward) * size  # 2: the sum of dz
        assert with_dx.backward_flops - without.backward_flops == product
    if isinstance(layer, Activation):
        assert (with_dx.forward_flops, with_dx.backward_flops) == tuple(7 * FEATURES * n for n in layer.flops)


def test_the_flops_of_a_nested_chain_are_those_of_its_layers():
    layers = [Dense(4, 6, rng=0), Tanh(), Dense(6, 2, rng=0)]
    dtype, shape, costs = np.dtype(np.float32), (7, 4), []
    for number, layer in enumerate(layers):
        costs.append(layer.cost(shape, dtype, needs_dx=number > 0))
        shape = costs[-1].output_shape
    whole = Sequential(*layers).cost((7, 4), dtype, needs_dx=False)
    assert whole.output_shape == (7, 2)
    for field in ("forward_flops", "backward_flops", "gradient_bytes"):
        assert getattr(whole, field) == sum(getattr(cost, field) for cost in costs)


@pytest.mark.parametrize("layer", [Dense(4, 3, rng=0), Sequential(Tanh(), Sequential(Dense(4, 3, rng=0)))], ids=repr)
def test_an_input_that_does_not_fit_is_refused(layer):
    with pytest.raises(ValueError, match=r"Dense\(4, 3, relu\): expected rows of 4 features, got 5$"):
        layer.cost((7, 5), np.dtype(np.float32))
