"""Second derivatives: products with the Hessian are the derivative of the gradient, under every schedule."""

import itertools

import numpy as np
import pytest

import npnet
from npnet import Dense, Dropout, Linear, Residual, Sequential, curvature, mlp
from npnet.activations import ACTIVATIONS, as_activation
from npnet.checkpoint import checkpoint
from npnet.curvature import flatten, hessian, hessian_vector_product, largest_eigenvalue, unflatten
from npnet.losses import LOSSES, TrainingDiverged
from npnet.random import one_step
from tests.test_layers import numeric_gradient
from tests.test_losses import pair

F8 = {"dtype": np.float64}
LAYERS = {
    **{name: lambda rng, name=name: as_activation(name) for name in ACTIVATIONS},
    **{f"dense {name}": lambda rng, name=name: Dense(5, 5, name, rng=rng, **F8) for name in ACTIVATIONS},
    "layernorm": lambda rng: npnet.LayerNorm(5, **F8),
    "gelu": lambda rng: npnet.GELU(),
    "gelu tanh": lambda rng: npnet.GELU("tanh"),
    "dropout": lambda rng: Dropout(0.4, rng=2),
    "residual": lambda rng: Residual(mlp([5, 6, 5], "tanh", "sigmoid", rng=rng, **F8)),
    "checkpoint": lambda rng: checkpoint(Sequential(Linear(5, 5, rng=rng, **F8), Dropout(0.3, rng=2), npnet.Tanh())),
}
SCHEDULES = ["none", "sqrt", "revolve", lambda depth, saving: npnet.schedules.every_nth(depth, 2, saving)]


@pytest.fixture(autouse=True)
def same_step():
    """Within one training step dropout drops the same."""
    with one_step(5):
        yield


def shaken(model, seed=9):
    """With biases and scales that are not what they start from, so that forgetting one shows."""
    for parameter in model.parameters():
        parameter.value += 0.3 * np.random.default_rng(seed).standard_normal(parameter.value.shape)
    return model


def between(name):
    """A layer between two linear ones, 4 features in and 3 out."""
    rng = np.random.default_rng(1)
    return shaken(Sequential(Linear(4, 5, rng=rng, **F8), LAYERS[name](rng), Linear(5, 3, rng=rng, **F8)))


def everything(part=lambda layer: layer):
    """Dropout, residual and normalization; ``part`` is made of three of the layers."""
    rng = np.random.default_rng(3)
    inner = Residual(Sequential(Linear(6, 6, rng=rng, **F8), npnet.GELU(), part(Dense(6, 6, "tanh", rng=rng, **F8))))
    layers = [Linear(4, 6, rng=rng, **F8), npnet.LayerNorm(6, **F8), part(Sequential(Dropout(0.3, rng=1), inner))]
    return shaken(Sequential(*layers, part(Dense(6, 6, "sigmoid", rng=rng, **F8)), Linear(6, 3, rng=rng, **F8)))


def batch_of(loss="quadratic", rows=7):
    return np.random.default_rng(7).standard_normal((rows, 4)), pair(loss, (rows, 3))[1]


def random_vector(model, seed=2):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(each.value.shape) for name, each in model.named_parameters().items()}


def along(model, vector, f, step=1e-5):
    """The derivative of f() where the parameters move along the vector, by central differences."""
    start, found = {name: each.value for name, each in model.named_parameters().items()}, []
    for sign in (1, -1):
        for name, parameter in model.named_parameters().items():
            parameter.value = start[name] + sign * step * vector[name]
        found.append(f())
    for name, parameter in model.named_parameters().items():
        parameter.value = start[name]
    return (found[0] - found[1]) / (2 * step)


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


# The product.


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", LAYERS)
def test_the_product_is_the_central_difference_of_the_gradient(name, loss):
    model, criterion, (x, y) = between(name), LOSSES[loss](), batch_of(loss)
    vector = random_vector(model)
    found = hessian_vector_product(model, criterion, x, y, vector)
    expected = along(model, vector, lambda: flatten(npnet.value_and_grad(model, criterion, x, y)[1]))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(flatten(found.product), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_are_those_of_value_and_grad_to_the_bit_under_every_schedule(loss):
    criterion, (x, y), found = LOSSES[loss](), batch_of(loss), []
    for part, schedule in itertools.product([lambda layer: layer, checkpoint], SCHEDULES):
        model = everything(part)
        given = schedule(5, npnet.layer.needs_saved(model.layers)) if callable(schedule) else schedule
        vector = dict(zip(model.named_parameters(), random_vector(everything()).values(), strict=True))
        each = hessian_vector_product(model, criterion, x, y, vector, schedule=given)
        value, gradient = npnet.value_and_grad(model, criterion, x, y, schedule=given)
        assert (each.value, same(each.gradient, gradient)) == (value, True)
        found.append(flatten(each.product))
        assert np.array_equal(found[-1], found[0])
    expected = along(model, vector, lambda: flatten(npnet.value_and_grad(model, criterion, x, y)[1]))
    np.testing.assert_allclose(found[0], expected, rtol=1e-6, atol=1e-7)


def test_the_schedule_that_is_asked_for_is_the_one_that_is_run():
    model, (x, y), runs = everything(), batch_of(), []
    layer, vector, saving = model.layers[2], random_vector(model), npnet.layer.needs_saved(model.layers)
    layer.forward = lambda x: runs.append(1) or Sequential.forward(layer, x)
    for schedule in (npnet.schedules.none(5, saving), npnet.schedules.revolve(5, 2, saving)):
        for times, f, more in ((1, hessian_vector_product, [vector]), (2, npnet.gradient_norm_gradient, [])):
            runs.clear()
            f(model, npnet.Quadratic(), x, y, *more, schedule=schedule)
            assert len(runs) == times * schedule.forwards[3]


# Steps.


def test_the_gradient_of_the_squared_gradient_norm_is_its_central_difference():
    model, loss, (x, y) = everything(), npnet.Quadratic(), batch_of()

    def squares():
        return sum(float((gradient**2).sum()) for gradient in npnet.value_and_grad(model, loss, x, y)[1].values())

    found = [npnet.gradient_norm_gradient(model, loss, x, y, schedule=schedule) for schedule in SCHEDULES[:3]]
    value, gradient = npnet.value_and_grad(model, loss, x, y)
    for each in found:
        assert (each.value, same(each.gradient, gradient), same(each.product, found[0].product)) == (value, True, True)
    for name, parameter in model.named_parameters().items():
        expected = numeric_gradient(squares, parameter.value)
        np.testing.assert_allclose(found[0].product[name], expected, rtol=1e-5, atol=1e-8)


def test_outside_of_a_step_both_passes_of_the_gradient_norm_draw_the_same_masks(monkeypatch):
    model = Sequential(Linear(4, 8, rng=0, **F8), Dropout(0.5, rng=1), npnet.Tanh(), Linear(8, 3, rng=2, **F8))
    monkeypatch.setattr(npnet.random._state, "step", None)
    step = npnet.random.new_step() + 1
    found = npnet.gradient_norm_gradient(model, npnet.Quadratic(), *batch_of())
    with one_step(step):
        again = hessian_vector_product(model, npnet.Quadratic(), *batch_of(), found.gradient)
    assert same(found.gradient, again.gradient)
    assert same(found.product, {name: 2 * array for name, array in again.product.items()})


def test_a_second_order_step_is_the_formula_and_leaves_lent_weights_alone():
    model, (x, y) = everything(), batch_of()
    parameters = model.named_parameters()
    parameters["0.weight"].lent = True
    arrays, before = ({name: f(p.value) for name, p in parameters.items()} for f in (np.asarray, np.copy))
    found = npnet.gradient_norm_gradient(model, npnet.Quadratic(), x, y)
    assert npnet.second_order_step(model, npnet.Quadratic(), x, y, 0.1, 0.02, schedule="sqrt") == found.value
    for name, parameter in parameters.items():
        expected = before[name] - 0.1 * found.gradient[name] - 0.02 * found.product[name]
        np.testing.assert_allclose(parameter.value, expected, rtol=1e-13, atol=1e-15)
        assert (parameter.value is arrays[name]) == (name != "0.weight")
    assert np.array_equal(arrays["0.weight"], before["0.weight"])


# The matrix.


@pytest.mark.parametrize("loss", LOSSES)
def test_the_hessian_is_symmetric_and_its_products_and_eigenvalues_are_those_found_without_it(loss):
    model, criterion, (x, y) = everything(), LOSSES[loss](), batch_of(loss)
    matrix, vector = hessian(model, criterion, x, y), random_vector(model)
    count = sum(parameter.value.size for parameter in model.parameters())
    assert matrix.shape == (count, count)
    np.testing.assert_allclose(matrix, matrix.T, rtol=0, atol=1e-13 * np.abs(matrix).max())
    product = hessian_vector_product(model, criterion, x, y, vector).product
    np.testing.assert_allclose(matrix @ flatten(vector), flatten(product), rtol=1e-11, atol=1e-12)
    eigenvalues = np.linalg.eigvalsh(matrix)
    options = {"iterations": 3000, "tolerance": 1e-13, "rng": 0}
    found, direction = largest_eigenvalue(model, criterion, x, y, schedule="sqrt", **options)
    assert found == pytest.approx(eigenvalues[np.abs(eigenvalues).argmax()], rel=1e-6)
    assert np.linalg.norm(flatten(direction)) == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(matrix @ flatten(direction), found * flatten(direction), atol=1e-3 * abs(found))
    assert largest_eigenvalue(model, criterion, x, y, **options | {"iterations": 1})[0] != found


def test_a_vector_is_flattened_row_by_row_and_back():
    model = everything()
    numbers = np.arange(float(sum(parameter.value.size for parameter in model.parameters())))
    vector = unflatten(model, numbers)
    assert np.array_equal(flatten(vector), numbers)
    assert np.array_equal(vector["0.weight"], np.arange(24.0).reshape(6, 4))
    assert vector["0.bias"][0] == 24


def test_where_the_loss_is_flat_the_largest_eigenvalue_is_zero():
    model = mlp([4, 3, 3], output="relu", rng=0, **F8)
    model.parameters()[-1].value -= 1000
    assert largest_eigenvalue(model, npnet.Quadratic(), *batch_of())[0] == 0


# What goes wrong.


@pytest.mark.parametrize("error", [TrainingDiverged, KeyboardInterrupt])
@pytest.mark.parametrize("f", [hessian_vector_product, npnet.gradient_norm_gradient, npnet.second_order_step, hessian])
def test_whatever_is_raised_leaves_the_weights_the_very_same_arrays_and_no_gradients(f, error):
    model, (x, y), parameters = everything(), batch_of(), everything().parameters()
    arrays = [parameter.value for parameter in model.parameters()]

    class Failing(npnet.Quadratic):
        def value_and_gradient(self, output, target):
            if isinstance(output, np.ndarray):  # the pass before that over dual numbers
                return super().value_and_gradient(output, target)
            raise error

    more = {hessian_vector_product: [random_vector(model)], npnet.second_order_step: [0.1, 0.1]}.get(f, [])
    with pytest.raises(error):
        f(model, Failing(), x, y, *more)
    assert [parameter.gradient for parameter in model.parameters()] == [None] * len(arrays)
    for parameter, array, expected in zip(model.parameters(), arrays, parameters, strict=True):
        assert parameter.value is array
        assert np.array_equal(array, expected.value)


def test_a_vector_that_does_not_fit_is_refused_by_name(monkeypatch):
    model, (x, y) = everything(), batch_of()
    vector = random_vector(model)
    missing, wrong = {**vector}, {**vector, "4.weight": vector["4.weight"].T}
    del missing["0.bias"]
    for bad, message in (
        (missing, "vector: expected an array for each parameter; missing or unknown: 0.bias"),
        ({**vector, "a": vector["0.bias"], "b": x}, "missing or unknown: a, b"),
        (wrong, r"vector: 4.weight: expected shape \(3, 6\), got \(6, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            hessian_vector_product(model, npnet.Quadratic(), x, y, bad)
    with pytest.raises(TypeError, match="expected an array of 'numpy', got list"):
        hessian_vector_product(model, npnet.Quadratic(), x.tolist(), y, vector)
    monkeypatch.setattr(curvature, "MOST_PARAMETERS", flatten(vector).size - 1)
    with pytest.raises(ValueError, match=r"hessian: \d+ parameters are more than the \d+ whose.*largest_eigenvalue"):
        hessian(model, npnet.Quadratic(), x, y)
    for rates in ((-1, 0), (0, -1), (np.nan, 0), ("1", 0)):
        with pytest.raises((TypeError, ValueError), match=r"(learning|curvature)_rate: expected a finite number"):
            npnet.second_order_step(model, npnet.Quadratic(), x, y, *rates)
    with pytest.raises(ValueError, match="iterations: expected a whole number, at least 1, got 0"):
        largest_eigenvalue(model, npnet.Quadratic(), x, y, iterations=0)
