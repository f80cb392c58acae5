"""Second derivatives of a loss: products with the Hessian, without the Hessian.

For a loss L(theta) with gradient g and Hessian H, the derivative of g in the direction v is H v. The backward pass *is*
the function that computes g, so running it on dual numbers (`npnet.dual`), with v as the tangent of the parameters,
gives g and H v at once: forward mode over reverse mode. It is exact, takes a small multiple of a gradient's time and
memory, and works under every checkpointing schedule.

Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from npnet.backend import Array, array_module, backend_of, to_backend
from npnet.checks import check_kind, check_number, check_whole, shown
from npnet.dual import Dual
from npnet.layer import Layer
from npnet.losses import Loss
from npnet.random import RNG, as_generator, one_step
from npnet.schedules import ScheduleLike
from npnet.step import value_and_grad

Vector: TypeAlias = Mapping[str, Array]
"""One array per parameter, by its path: what `value_and_grad` returns is such a vector."""

MOST_PARAMETERS = 5000
"""The most parameters that a network may have for `hessian`."""


class HessianProduct(NamedTuple):
    """What one pass over dual numbers gives."""

    value: float  # the loss
    gradient: dict[str, Array]
    product: dict[str, Array]  # H v


def hessian_vector_product(
    model: Layer, loss: Loss, x: Array, y: Array, vector: Vector, *, schedule: ScheduleLike = "none"
) -> HessianProduct:
    """The loss, its gradient g, and H v for the Hessian H of the loss with respect to all parameters.

    At the kink of a ReLU the second derivative is taken as 0.

    Args:
        x: (batch, features).
        y: targets, (batch, outputs).
        vector: v, an array in the shape of each parameter, by its path; see `Layer.named_parameters`.
        schedule: as for `npnet.fit`.

    Raises:
        TypeError, ValueError: ``vector`` does not fit the parameters.
        TrainingDiverged: the loss is not finite.
    """
    parameters = check_kind(model, Layer, "model", "mlp([784, 30, 10])").named_parameters()
    if not isinstance(vector, Mapping):
        raise TypeError(f"vector: expected a mapping from paths of parameters to arrays, got {type(vector).__name__}")
    if parameters.keys() != vector.keys():
        wrong = ", ".join(sorted(map(str, parameters.keys() ^ vector.keys())))
        raise ValueError(f"vector: expected an array for each parameter; missing or unknown: {wrong}")
    for name, parameter in parameters.items():
        if backend_of(vector[name]) is not backend_of(parameter.value) or vector[name].dtype.kind != "f":
            raise TypeError(
                f"vector: {name}: expected real numbers on the parameter's backend, got {shown(vector[name])}"
            )
        if vector[name].shape != parameter.value.shape:
            raise ValueError(f"vector: {name}: expected shape {parameter.value.shape}, got {vector[name].shape}")
    with _tangents(model, vector), one_step(counts=False):
        duals: Any = value_and_grad(model, loss, _dual(x), _dual(y), schedule=schedule)
    value, gradients = duals
    product = {
        name: array_module(each.value).zeros_like(each.value) if each.tangent is None else each.tangent
        for name, each in gradients.items()
    }
    return HessianProduct(value, {name: each.value for name, each in gradients.items()}, product)


def _dual(x: Array) -> Any:
    backend_of(x)  # refuse what is not an array
    return Dual(x)


@contextmanager
def _tangents(model: Layer, vector: Vector) -> Iterator[None]:
    """Inside it, the parameters are dual arrays with the vector as their tangent."""
    parameters = model.named_parameters()
    before = {name: parameter.value for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.value = Dual(before[name], vector[name].astype(before[name].dtype))  # type: ignore[assignment]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.value = before[name]


def gradient_norm_gradient(
    model: Layer, loss: Loss, x: Array, y: Array, *, schedule: ScheduleLike = "none"
) -> HessianProduct:
    """The loss, its gradient g, and as ``product`` the gradient of |g|^2, which is 2 H g. Args: as above."""
    with one_step():  # both passes draw the same random numbers
        _, gradient = value_and_grad(model, loss, x, y, schedule=schedule)
        found = hessian_vector_product(model, loss, x, y, gradient, schedule=schedule)
    return found._replace(product={name: 2 * array for name, array in found.product.items()})


def second_order_step(
    model: Layer,
    loss: Loss,
    x: Array,
    y: Array,
    learning_rate: float,
    curvature_rate: float,
    *,
    schedule: ScheduleLike = "none",
) -> float:
    """theta <- theta - learning_rate * g - curvature_rate * grad(|g|^2): away from where the gradient is large.

    Returns:
        The loss before the step.

    Raises:
        TrainingDiverged: the loss is not finite; nothing was updated.
    """
    alpha, beta = check_number(learning_rate, "learning_rate"), check_number(curvature_rate, "curvature_rate")
    found = gradient_norm_gradient(model, loss, x, y, schedule=schedule)
    for name, parameter in model.named_parameters().items():
        weight = parameter.writable()
        with np.errstate(over="ignore", invalid="ignore"):  # found in the next step's loss
            weight -= alpha * found.gradient[name] + beta * found.product[name]
    return found.value


def hessian(model: Layer, loss: Loss, x: Array, y: Array) -> Array:
    """The whole Hessian, (n, n) for n parameters in the order of `Layer.named_parameters`, each flattened row by row.

    Raises:
        ValueError: n is more than `MOST_PARAMETERS`: n products are taken, and n^2 numbers kept.
    """
    parameters = check_kind(model, Layer, "model", "mlp([784, 30, 10])").named_parameters()
    count = sum(parameter.value.size for parameter in parameters.values())
    if count > MOST_PARAMETERS:
        raise ValueError(
            f"hessian: {count} parameters are more than the {MOST_PARAMETERS} whose whole Hessian is kept; take "
            "products with it (hessian_vector_product), or its largest eigenvalue (largest_eigenvalue)"
        )
    if not count:
        raise ValueError(f"hessian: {model} has no parameters")
    columns = []
    with one_step():
        for index in range(count):
            unit = np.zeros(count)
            unit[index] = 1
            product = hessian_vector_product(model, loss, x, y, unflatten(model, unit)).product
            columns.append(flatten(product))
    return array_module(columns[0]).stack(columns, axis=1)


def flatten(vector: Vector) -> Array:
    """The numbers of a vector in one row, (n,)."""
    arrays = [array.ravel() for array in vector.values()]
    return array_module(arrays[0]).concatenate(arrays)


def unflatten(model: Layer, numbers: Array) -> dict[str, Array]:
    """The inverse of `flatten`: (n,) numbers in the shapes of the parameters."""
    vector, start = {}, 0
    for name, parameter in model.named_parameters().items():
        value = parameter.value
        part = numbers[start : start + value.size].reshape(value.shape).astype(value.dtype)
        vector[name] = to_backend(part, backend_of(value).name)
        start += value.size
    return vector


def largest_eigenvalue(
    model: Layer,
    loss: Loss,
    x: Array,
    y: Array,
    *,
    iterations: int = 100,
    tolerance: float = 1e-6,
    rng: RNG = None,
    schedule: ScheduleLike = "none",
) -> tuple[float, dict[str, Array]]:
    """The eigenvalue of the Hessian that is largest in size, and its eigenvector of length 1, by power iteration.

    v <- H v / |H v| until the Rayleigh quotient v.Hv changes by less than ``tolerance`` of itself.

    Args:
        iterations: at most so many products.
        rng: seed or generator of the first vector.
    """
    iterations, tolerance = check_whole(iterations, "iterations", least=1), check_number(tolerance, "tolerance")
    parameters = check_kind(model, Layer, "model", "mlp([784, 30, 10])").parameters()
    count = sum(parameter.value.size for parameter in parameters)
    vector = unflatten(model, as_generator(rng).standard_normal(count))
    vector, found = _normalized(vector), math.inf
    with one_step():
        for _ in range(iterations):
            product = hessian_vector_product(model, loss, x, y, vector, schedule=schedule).product
            before, found = found, _dot(vector, product)
            if not any(float(abs(array).max()) for array in product.values()):
                return 0.0, vector  # the vector is in the null space
            vector = _normalized(product)
            if abs(found - before) <= tolerance * abs(found):
                break
    return found, vector


def _dot(a: Vector, b: Vector) -> float:
    return sum(float((a[name] * b[name]).sum()) for name in a)


def _normalized(vector: Vector) -> dict[str, Array]:
    length = math.sqrt(_dot(vector, vector))
    return {name: array / length for name, array in vector.items()}
