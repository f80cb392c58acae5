"""Activations: elementwise functions, each a layer of its own and the second half of a dense layer."""

from typing import Any, ClassVar

import numpy as np

from npnet.backend import Array, array_module, scalar
from npnet.checks import shown
from npnet.initializers import Initializer, kaiming_normal, xavier_normal
from npnet.layer import InPlaceLayer, LayerCost, Saved, ShapeError


class Activation(InPlaceLayer):
    """An elementwise function whose derivative follows from its *output*, which is why dense layers save so little.

    Subclasses write both directions in place; the out-of-place forms come from here.
    """

    output_suffices = True
    flops: ClassVar[tuple[int, int]]  # an element, forward and backward
    slope_arrays: ClassVar[int] = 1  # arrays of the output's size that backward_ takes
    slope_itemsize: ClassVar[int | None] = None  # bytes of one of their elements, if not as many as the output's

    def __repr__(self) -> str:
        return type(self).__name__.lower()

    def forward_(self, z: Array, bias: Array | None = None) -> None:
        """Replace ``z``, (batch, features), by f(z + bias); ``bias`` is (features,) or None for zero."""
        raise NotImplementedError(f"{type(self).__name__}.forward_")

    def cost(self, shape: tuple[int, int], dtype: np.dtype[Any], needs_dx: bool = True) -> LayerCost:
        size = shape[0] * shape[1]
        bytes_, (forward, backward) = size * dtype.itemsize, self.flops
        slope = size * self.slope_arrays * (self.slope_itemsize or dtype.itemsize)
        return LayerCost(
            shape,
            bytes_,
            backward_bytes=slope,
            forward_flops=forward * size,
            backward_flops=backward * size,
            in_place=True,
        )

    def forward(self, x: Array) -> tuple[Array, Saved]:
        self.check_input(x)
        y = x.copy()
        self.forward_(y)
        return y, (x, y)

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array:
        """Replace ``dy`` by dz = dy * f'(z), elementwise. Reads only the output y = saved[1]."""
        raise NotImplementedError(f"{type(self).__name__}.backward_")


def _add_(z: Array, bias: Array | None) -> None:
    if bias is not None:
        array_module(z).add(z, bias, out=z)


class Identity(Activation):
    """f(z) = z, for outputs that a loss takes as they are (logits, regression)."""

    flops = (0, 0)
    slope_arrays = 0

    def forward_(self, z: Array, bias: Array | None = None) -> None:
        _add_(z, bias)

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array:
        return dy


class Sigmoid(Activation):
    """f(z) = 1 / (1 + e^-z), and f' = y (1 - y).

    For z < -709 (-88 in float32) e^-z is infinite and y = 1/inf = 0, as it should be; the engine silences
    NumPy's warning about it for a whole step, since doing so in every layer would cost as much as the exponential.
    """

    flops = (4, 3)

    def forward_(self, z: Array, bias: Array | None = None) -> None:
        xp = array_module(z)
        if bias is None:
            xp.negative(z, out=z)
        else:
            xp.subtract(xp.negative(bias), z, out=z)
        xp.exp(z, out=z)
        xp.add(z, scalar(xp, 1.0, z.dtype), out=z)
        xp.reciprocal(z, out=z)

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array:
        _, y = saved
        xp = array_module(dy)
        slope = xp.subtract(scalar(xp, 1.0, y.dtype), y)
        xp.multiply(slope, y, out=slope)
        xp.multiply(dy, slope, out=dy)
        return dy


class Tanh(Activation):
    """f(z) = tanh z, and f' = 1 - y^2."""

    flops = (1, 3)

    def forward_(self, z: Array, bias: Array | None = None) -> None:
        _add_(z, bias)
        array_module(z).tanh(z, out=z)

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array:
        _, y = saved
        xp = array_module(dy)
        slope = xp.multiply(y, y)
        xp.subtract(scalar(xp, 1.0, y.dtype), slope, out=slope)
        xp.multiply(dy, slope, out=dy)
        return dy


class ReLU(Activation):
    """f(z) = max(z, 0), and f' = 1 where y > 0, else 0 (at the kink too, as in PyTorch)."""

    flops = (1, 2)
    slope_itemsize = 1

    def forward_(self, z: Array, bias: Array | None = None) -> None:
        _add_(z, bias)
        xp = array_module(z)
        xp.maximum(z, scalar(xp, 0.0, z.dtype), out=z)

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array:
        _, y = saved
        xp = array_module(dy)
        xp.multiply(dy, xp.greater(y, scalar(xp, 0.0, y.dtype)), out=dy)  # the slope: True or False, a byte each
        return dy


class Softmax(Activation):
    """f(z)_i = e^z_i / sum of e^z_j along the row; dz = y * (dy - sum of dy_j y_j). The one that is not elementwise.

    For a loss of probabilities. For classes, keep the logits and take `SoftmaxCrossEntropy`, which is stable.
    """

    flops = (5, 4)

    def check_input(self, x: Array) -> None:
        super().check_input(x)
        if x.ndim != 2 or not x.shape[1]:
            raise ShapeError(f"{self}: expected rows of shape (batch, features), got {x.shape}")

    def forward_(self, z: Array, bias: Array | None = None) -> None:
        _add_(z, bias)
        xp = array_module(z)
        xp.subtract(z, z.max(axis=1, keepdims=True), out=z)
        xp.exp(z, out=z)
        xp.divide(z, z.sum(axis=1, keepdims=True), out=z)

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array:
        _, y = saved
        xp = array_module(dy)
        xp.subtract(dy, xp.multiply(dy, y).sum(axis=1, keepdims=True), out=dy)
        xp.multiply(dy, y, out=dy)
        return dy


ACTIVATIONS: dict[str, type[Activation]] = {
    "sigmoid": Sigmoid,
    "tanh": Tanh,
    "relu": ReLU,
    "identity": Identity,
    "softmax": Softmax,
}
INITIALIZERS: dict[type[Activation], Initializer] = {Sigmoid: xavier_normal, Tanh: xavier_normal, ReLU: kaiming_normal}


def as_activation(activation: str | Activation) -> Activation:
    """The activation called ``activation``, or itself.

    Raises:
        ValueError: no activation has that name.
    """
    if isinstance(activation, Activation):
        return activation
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {shown(activation)}; choose one of {', '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS[activation]()
