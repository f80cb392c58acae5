"""Dual numbers: each function's tangent is its derivative, whatever it is mixed with; and what layers cost on them."""

import math
import operator

import numpy as np
import pytest

import npnet
from npnet import Dense, Linear, Sequential, mlp
from npnet.curvature import flatten, hessian_vector_product
from npnet.dual import MODULE, Dual
from tests.test_curvature import F8, along, batch_of, random_vector, shaken

SHAPES = [((3, 4), (3, 4)), ((3, 4), (4,)), ((4,), (3, 4)), ((3, 1), (3, 4)), ((3, 1), (1, 4)), ((2, 3, 4), (3, 1))]
UNARY = {
    **{name: getattr(np, name) for name in ("negative", "exp", "tanh", "abs", "sqrt", "log", "log1p")},
    "erf": np.vectorize(math.erf),
}
BINARY = {name: getattr(np, name) for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum")}
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
METHODS = {
    "T": lambda a: a.T,
    "row": lambda a: a[1],
    "column": lambda a: a[:, None, 2],
    "mask": lambda a: a[np.array([True, False, True])],
    "ravel": lambda a: a.ravel(),
    "ravel F": lambda a: a.ravel("F"),
    "reshape": lambda a: a.reshape(2, 6),
    "copy": lambda a: a.copy(order="F"),
    "sum": lambda a: a.sum(),
    "sum of rows": lambda a: a.sum(axis=1, keepdims=True),
    "sum of columns": lambda a: a.sum(axis=0),
    "mean": lambda a: a.mean(),
    "mean of rows": lambda a: a.mean(axis=1, keepdims=True),
    "mean of columns": lambda a: a.mean(axis=0),
}
PRODUCTS = {"ij,ij->i": ((3, 4), (3, 4)), "ij,ij->j": ((3, 4), (3, 4)), "ij,jk->ik": ((3, 4), (4, 2))}


def numbers(shape, seed, positive=False):
    """Away from zero, where |u| has its kink."""
    array = np.random.default_rng(seed).uniform(0.2, 2, shape)
    return array if positive else array * np.random.default_rng(seed + 10).choice([-1, 1], shape)


def both(shape, seed, positive=False):
    return Dual(numbers(shape, seed, positive), numbers(shape, seed + 50))


def check(found, f, *arguments):
    """``found`` is f of the arguments, and its tangent the derivative where duals move along theirs."""

    def moved(step):
        plain = []
        for each in arguments:
            tangent = each.tangent if isinstance(each, Dual) else None
            value = each.value if isinstance(each, Dual) else each
            plain.append(value if tangent is None else value + step * tangent)
        return f(*plain)

    assert np.array_equal(found.value, moved(0)) or np.allclose(found.value, moved(0), rtol=1e-15)
    if all(not isinstance(each, Dual) or each.tangent is None for each in arguments):
        assert found.tangent is None
        return
    assert found.tangent.shape == found.value.shape == found.shape
    np.testing.assert_allclose(found.tangent, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-7, atol=1e-8)


def kinds(shapes, positive=False):
    """Every mixture of duals, duals without a tangent, and plain arrays; a dual at least once."""
    u, v = both(shapes[0], 1, positive), both(shapes[1], 2, positive)
    for a in (u, Dual(u.value), u.value):
        for b in (v, Dual(v.value), v.value):
            if isinstance(a, Dual) or isinstance(b, Dual):
                yield a, b


@pytest.mark.parametrize("name", UNARY)
def test_a_function_of_one_has_its_derivative_as_its_tangent(name):
    u, f = both((3, 4), 0, name in ("sqrt", "log", "log1p")), getattr(MODULE, name)
    for argument in (u, Dual(u.value), u.value):
        check(f(argument), UNARY[name], argument)
    if name == "erf":
        return
    before, out = (u.value, u.tangent), Dual(np.zeros((3, 4)))
    assert f(u, out=out) is out
    check(out, UNARY[name], u)
    assert f(u, out=u) is u
    check(u, UNARY[name], Dual(*before))


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("name", BINARY)
def test_a_function_of_two_has_its_derivative_as_its_tangent(name, shapes):
    f = getattr(MODULE, name)
    for a, b in kinds(shapes):
        check(f(a, b), BINARY[name], a, b)
        out = Dual(np.zeros((9, 9)), np.zeros((9, 9)))
        assert f(a, b, out=out) is out
        check(out, BINARY[name], a, b)
    for number in (2, -0.5, np.float64(3)):
        check(f(both(shapes[0], 1), number), BINARY[name], both(shapes[0], 1), number)
        if name not in ("maximum", "minimum"):
            check(f(number, both(shapes[0], 1)), BINARY[name], number, both(shapes[0], 1))


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_take_duals_arrays_and_numbers_on_either_side(name, shapes):
    f = OPERATORS[name]
    for a, b in kinds(shapes):
        check(f(a, b), f, a, b)
    for number in (2, 0.5):
        check(f(both(shapes[0], 1), number), f, both(shapes[0], 1), number)
        check(f(number, both(shapes[0], 1)), f, number, both(shapes[0], 1))


def test_operators_in_place_change_the_dual_and_not_the_arrays_in_it():
    for f in (lambda a, b: a.__iadd__(b), lambda a, b: a.__imul__(b)):
        for other in (both((3, 4), 3), numbers((3, 4), 3), 2.5):
            u = both((3, 4), 1)
            value, tangent = u.value.copy(), u.tangent.copy()
            kept = u.value, u.tangent
            assert f(u, other) is u
            assert np.array_equal(kept[0], value)
            assert np.array_equal(kept[1], tangent)
            plain = (lambda a, b: a + b) if f(Dual(np.ones(1)), 1.0).value == 2 else (lambda a, b: a * b)
            check(u, plain, Dual(value, tangent), other)


@pytest.mark.parametrize("name", METHODS)
def test_a_linear_method_is_its_own_derivative(name):
    for u in (both((3, 4), 1), Dual(numbers((3, 4), 1))):
        check(METHODS[name](u), METHODS[name], u)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_two_follow_the_product_rule(name):
    for a, b in kinds(PRODUCTS[name]):
        check(MODULE.einsum(name, a, b), lambda u, v: np.einsum(name, u, v), a, b)
        if name == "ij,jk->ik":
            check(MODULE.dot(a, b), np.dot, a, b)


def test_a_dual_is_like_its_value():
    u = both((3, 4), 1)
    assert (u.shape, u.ndim, u.size, u.dtype, len(u)) == ((3, 4), 2, 12, np.dtype(np.float64), 3)
    assert float(Dual(np.float64(2.5), np.float64(1))) == 2.5
    assert u.max(axis=1, keepdims=True).tangent is None
    assert np.array_equal(u.max(axis=1, keepdims=True).value, u.value.max(axis=1, keepdims=True))
    assert u.max().value == u.value.max()
    product = MODULE.dot(MODULE.ones(3, np.float32), Dual(u.value.astype(np.float32), u.tangent))  # a sum of columns
    np.testing.assert_allclose(product.value, u.value.sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(product.tangent, u.tangent.sum(axis=0), rtol=1e-6)
    assert product.dtype == np.float32
    assert npnet.array_module(u) is MODULE
    assert npnet.to_host(u) is u.value
    assert "dual" not in npnet.available_backends()


def test_at_a_kink_the_derivative_is_as_documented():
    u, v = Dual(np.ones(2), np.full(2, 3.0)), Dual(np.ones(2), np.full(2, 5.0))
    assert MODULE.maximum(u, v).tangent.tolist() == [5, 5]
    assert MODULE.minimum(u, v).tangent.tolist() == [4, 4]
    assert MODULE.maximum(Dual(np.zeros(1), np.ones(1)), 0).tangent.tolist() == [0]  # the kink of a ReLU
    assert MODULE.divide(1.0, Dual(np.full(2, np.inf), np.full(2, 7.0))).tangent.tolist() == [0, 0]


# Layers on dual numbers.


def complex_gradient(numbers, x, y, activation):
    """Of the quadratic cost of a network with one hidden layer of 5, 4 features in and 3 out, in plain NumPy."""
    w, b, u, c = np.split(numbers, np.cumsum([20, 5, 15]))
    w, u = w.reshape(5, 4), u.reshape(3, 5)
    forward, slope = {
        "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda h: h * (1 - h)),
        "tanh": (np.tanh, lambda h: 1 - h * h),
        "identity": (lambda z: z, np.ones_like),
    }[activation]
    h = forward(x @ w.T + b)
    output = forward(h @ u.T + c)
    dy = (output - y) / len(x) * slope(output)
    dz = dy @ u * slope(h)
    return np.concatenate([(dz.T @ x).ravel(), dz.sum(axis=0), (dy.T @ h).ravel(), dy.sum(axis=0)])


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "identity"])
def test_the_product_is_the_complex_step_of_the_gradient(activation):
    model, (x, y) = shaken(mlp([4, 5, 3], activation, activation, rng=0, **F8)), batch_of()
    vector = random_vector(model)
    numbers = flatten({name: each.value for name, each in model.named_parameters().items()})
    found = hessian_vector_product(model, npnet.Quadratic(), x, y, vector)
    stepped = complex_gradient(numbers + 1e-100j * flatten(vector), x, y, activation)  # no difference, so no rounding
    np.testing.assert_allclose(flatten(found.gradient), stepped.real, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(flatten(found.product), stepped.imag / 1e-100, rtol=1e-11, atol=1e-13)


def test_the_product_is_in_the_dtype_of_the_parameters_and_zero_where_nothing_depends_on_them():
    model = Sequential(Linear(4, 5, rng=0), npnet.GELU("tanh"), npnet.LayerNorm(5), Dense(5, 3, "softmax", rng=1))
    x, y = (array.astype(np.float32) for array in batch_of())
    vector = random_vector(model)  # float64
    found = hessian_vector_product(model, npnet.Quadratic(), x, y, vector)
    assert {array.dtype for array in (*found.gradient.values(), *found.product.values())} == {np.dtype(np.float32)}
    assert {name: array.dtype for name, array in vector.items()} == dict.fromkeys(vector, np.dtype(np.float64))
    zero = {name: np.zeros_like(array) for name, array in vector.items()}
    assert not flatten(hessian_vector_product(model, npnet.Quadratic(), x, y, zero).product).any()


def test_the_product_of_a_float32_network_with_an_exact_gelu_is_float32():
    model, (x, y) = Sequential(Linear(4, 3, rng=0), npnet.GELU()), [each.astype(np.float32) for each in batch_of()]
    found = hessian_vector_product(model, npnet.Quadratic(), x, y, random_vector(model))
    assert {array.dtype for array in found.product.values()} == {np.dtype(np.float32)}


def test_the_product_for_binary_cross_entropy_at_logits_of_zero_is_that_of_a_smooth_function():
    model, (x, y) = Sequential(Linear(4, 3, initializer="zeros", **F8)), batch_of("bce_with_logits")
    vector, loss = random_vector(model), npnet.BCEWithLogits()
    expected = along(model, vector, lambda: flatten(npnet.value_and_grad(model, loss, x, y)[1]))
    np.testing.assert_allclose(flatten(hessian_vector_product(model, loss, x, y, vector).product), expected, rtol=1e-6)


def test_the_product_is_finite_where_a_sigmoid_is_flat():
    model, (x, y) = mlp([4, 3, 3], "sigmoid", rng=0, **F8), batch_of()
    model.layers[0].bias.value[:] = -1000
    found = hessian_vector_product(model, npnet.Quadratic(), x, y, random_vector(model))
    assert np.isfinite(flatten(found.product)).all()


@pytest.mark.parametrize("schedule", ["none", "sqrt"])
def test_a_product_takes_a_small_multiple_of_the_memory_of_a_gradient_and_no_matrix(schedule):
    model, rng = mlp([64, *[64] * 8, 10], "tanh", rng=0, **F8), np.random.default_rng(0)
    args = npnet.SoftmaxCrossEntropy(), rng.standard_normal((2000, 64)), np.full((2000, 10), 0.1)
    vector, plan = random_vector(model), npnet.schedules.as_schedule(schedule, 9, frozenset())
    gradient, product = (
        npnet.measure_peak(f, model, *args, *more, schedule=plan).increase_bytes
        for f, more in [(npnet.value_and_grad, ()), (hessian_vector_product, (vector,))]
    )
    assert gradient < product < 4 * gradient
    assert product < 0.01 * 8 * flatten(vector).size ** 2
