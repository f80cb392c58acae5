"""Layers to build models of besides dense ones: Dropout, LayerNorm, GELU, Residual."""

import importlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from npnet import random
from npnet.backend import Array, array_module, backend_of, ones, to_backend
from npnet.checks import check_float, check_number, check_room, check_whole, shown
from npnet.layer import InPlaceLayer, KindError, Layer, LayerCost, LayerError, Saved, ShapeError, both
from npnet.parameter import Parameter
from npnet.random import RNG, as_generator, current_step


class Dropout(Layer):
    """y = x * mask / (1 - p), where each element of the mask is 0 with probability p, else 1; in `eval`, y = x.

    Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014; scaled while training,
    as ``torch.nn.Dropout``. The mask is a function of the layer's key and the number of the training step: running the
    layer again in the same step gives the same mask, which nobody had to keep. See `npnet.random`.

    Args:
        p: probability of a zero, at least 0 and below 1.
        rng: seed or generator that the key is drawn from.
        key: instead, the key itself, a whole number below 2^63.
    """

    def __init__(self, p: float = 0.5, *, rng: RNG = None, key: int | None = None) -> None:
        self.p = check_number(p, "p", below=1.0)
        self.key = int(as_generator(rng).integers(2**63)) if key is None else check_whole(key, "key", most=2**63 - 1)
        self.key_given = key is not None  # else a run that is resumed takes the key from the save, like the weights

    def __repr__(self) -> str:
        return f"Dropout({self.p:g})"

    def forward(self, x: Array) -> tuple[Array, Saved]:
        self.check_input(x)
        if not self.training or not self.p:
            return x.copy(), None
        xp, mask = array_module(x), keep_mask(x, self.key, self.p)
        y = xp.multiply(x, mask)
        xp.multiply(y, 1 / (1 - self.p), out=y)
        return y, mask

    def backward(self, dy: Array, saved: Saved) -> Array:
        self.check_gradient(dy, dy if saved is None else saved)
        return self.backward_(dy.copy(), saved)

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array:
        if saved is not None:
            xp = array_module(dy)
            xp.multiply(dy, saved, out=dy)
            xp.multiply(dy, 1 / (1 - self.p), out=dy)
        return dy

    def cost(self, shape: tuple[int, int], dtype: np.dtype[Any], needs_dx: bool = True) -> LayerCost:
        size = shape[0] * shape[1]
        drops = self.training and self.p > 0
        mask = size if drops else 0
        drawn = 4 * size if drops else 0  # the numbers that the mask is made of, gone before y is there
        bytes_ = size * dtype.itemsize
        forward = max(mask, mask + drawn - bytes_)
        return LayerCost(
            shape,
            bytes_,
            saved_bytes=mask,
            forward_bytes=forward,
            forward_flops=3 * size,
            backward_flops=2 * size,
            keeps_input=False,
            keeps_output=False,
            in_place=True,
        )


def keep_mask(x: Array, key: int, p: float) -> Array:
    """What dropout keeps of ``x`` in the step under way: booleans of its shape, True with probability 1 - p.

    The same ones on every backend.
    """
    xp = array_module(x)
    if hasattr(xp, "keep_mask"):  # x only stands in for an array
        return xp.keep_mask(x, key, p)
    if hasattr(x, "value"):  # a number with a derivative: the mask is a constant
        return keep_mask(x.value, key, p)
    return random.keep_mask(xp, x.shape, p, key, current_step())


class LayerNorm(Layer):
    """y = w * (x - mean) / sqrt(var + eps) + b, with the mean and variance of each row.

    Ba, Kiros & Hinton, "Layer Normalization", 2016. Backward, with n = (x - mean) / sqrt(var + eps), dn = dy * w:
    dx = (dn - mean(dn) - n * mean(dn * n)) / sqrt(var + eps), dw = sum of dy * n and db = sum of dy, over the batch.

    Args:
        features: of a row.
        eps: added to the variance.
        dtype, backend: of the parameters.
    """

    def __init__(
        self, features: int, eps: float = 1e-5, *, dtype: npt.DTypeLike = np.float32, backend: str | None = None
    ) -> None:
        self.features = self.in_features = check_whole(features, "features", least=1)
        check_room(self.features, "features")
        self.eps, dtype = check_number(eps, "eps"), check_float(dtype)
        self.weight = Parameter(to_backend(np.ones(self.features, dtype), backend))  # (features,)
        self.bias = Parameter(to_backend(np.zeros(self.features, dtype), backend))  # (features,)

    def __repr__(self) -> str:
        return f"LayerNorm({self.features})"

    def parameters(self) -> list[Parameter]:
        return [self.weight, self.bias]

    def forward(self, x: Array) -> tuple[Array, Saved]:
        xp, weight, n = array_module(x), self.weight.value, self.features  # which refuses what is no array
        self._check(x.shape)
        if backend_of(x) is not backend_of(weight) or x.dtype != weight.dtype:
            raise KindError(
                f"{self}: the input is {x.dtype} on {backend_of(x).name!r}, the weights are {weight.dtype} on "
                f"{backend_of(weight).name!r}; convert with x.astype, move with npnet.to_backend"
            )
        mean = x.mean(axis=1, keepdims=True)  # (batch, 1)
        y = xp.subtract(x, mean)  # (batch, features)
        scale = xp.einsum("ij,ij->i", y, y)[:, None]  # (batch, 1)
        scale = 1 / xp.sqrt(scale / n + self.eps)
        xp.multiply(y, scale, out=y)
        xp.multiply(y, weight, out=y)
        xp.add(y, self.bias.value, out=y)
        return y, (x, mean, scale)

    def backward(self, dy: Array, saved: Saved) -> Array:
        self.check_gradient(dy, saved[0])
        return self.backward_(dy.copy(), saved)

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array:
        x, mean, scale = saved
        xp, n, weight = array_module(dy), self.features, self.weight.value
        one = ones(xp, len(dy), dy.dtype)  # (batch,)
        product = xp.subtract(x, mean)  # (batch, features)
        xp.multiply(product, scale, out=product)
        xp.multiply(product, dy, out=product)  # dy * n
        self.weight.accumulate(xp.dot(one, product))
        self.bias.accumulate(xp.dot(one, dy))
        along = xp.dot(product, weight)[:, None] / n  # (batch, 1): mean(dn * n)
        xp.multiply(dy, weight, out=dy)
        xp.subtract(dy, dy.mean(axis=1, keepdims=True), out=dy)
        normed = xp.subtract(x, mean, out=product)  # again: it takes less time than a second array takes memory
        xp.multiply(normed, scale * along, out=normed)
        xp.subtract(dy, normed, out=dy)
        xp.multiply(dy, scale, out=dy)
        return dy

    def cost(self, shape: tuple[int, int], dtype: np.dtype[Any], needs_dx: bool = True) -> LayerCost:
        self._check(shape)
        size, columns = shape[0] * shape[1], 2 * shape[0] * dtype.itemsize  # mean and scale
        gradients = sum(parameter.value.nbytes for parameter in self.parameters())
        bytes_ = size * dtype.itemsize
        return LayerCost(
            shape,
            bytes_,
            saved_bytes=columns,
            forward_bytes=columns,
            gradient_bytes=gradients,
            backward_bytes=bytes_ + gradients,
            forward_flops=7 * size,
            backward_flops=16 * size,
            keeps_output=False,
            in_place=True,
        )

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2 or shape[1] != self.features:
            raise ShapeError(f"{self}: expected rows of shape (batch, {self.features}), got {tuple(shape)}")


class GELU(InPlaceLayer):
    """y = x * P(x), where P(x) = (1 + erf(x / sqrt 2)) / 2 is the normal distribution function.

    Hendrycks & Gimpel, "Gaussian Error Linear Units", 2016. With ``approximate="tanh"`` P(x) is
    (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, as ``torch.nn.GELU``. Backward needs x alone: P is computed again.

    Args:
        approximate: "none" or "tanh". On NumPy "none" is fast with SciPy installed, and slow without.
    """

    output_suffices = True

    def __init__(self, approximate: str = "none") -> None:
        if not isinstance(approximate, str) or approximate not in ("none", "tanh"):
            raise ValueError(f"approximate: expected 'none' or 'tanh', got {shown(approximate)}")
        self.approximate = approximate

    def __repr__(self) -> str:
        return "GELU()" if self.approximate == "none" else "GELU('tanh')"

    def forward(self, x: Array) -> tuple[Array, Saved]:
        self.check_input(x)
        y = self._distribution(x)
        array_module(x).multiply(y, x, out=y)
        return y, (x, y)

    def _distribution(self, x: Array) -> Array:
        """P(x), a new array."""
        xp = array_module(x)
        if self.approximate == "none":
            p = erf(x * (1 / math.sqrt(2)))  # (batch, features)
        else:
            p = xp.multiply(x, x)
            xp.multiply(p, 0.044715, out=p)
            xp.add(p, 1, out=p)
            xp.multiply(p, x, out=p)
            xp.multiply(p, math.sqrt(2 / math.pi), out=p)
            xp.tanh(p, out=p)
        xp.add(p, 1, out=p)
        xp.multiply(p, 0.5, out=p)
        return p

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array:
        """dx = dy * (P + x P')."""
        x, _ = saved
        xp = array_module(dy)
        p = self._distribution(x)
        if self.approximate == "none":  # P' = e^(-x^2 / 2) / sqrt(2 pi)
            slope = xp.multiply(x, x)
            xp.multiply(slope, -0.5, out=slope)
            xp.exp(slope, out=slope)
            xp.multiply(slope, 1 / math.sqrt(2 * math.pi), out=slope)
        else:  # P' = 2 P (1 - P) * sqrt(2 / pi) (1 + 3 * 0.044715 x^2)
            slope = xp.multiply(x, x)
            xp.multiply(slope, 3 * 0.044715, out=slope)
            xp.add(slope, 1, out=slope)
            xp.multiply(slope, 2 * math.sqrt(2 / math.pi), out=slope)
            xp.multiply(slope, p, out=slope)
            xp.multiply(slope, 1 - p, out=slope)
        xp.multiply(slope, x, out=slope)
        xp.add(slope, p, out=slope)
        xp.multiply(dy, slope, out=dy)
        return dy

    def cost(self, shape: tuple[int, int], dtype: np.dtype[Any], needs_dx: bool = True) -> LayerCost:
        size = shape[0] * shape[1]
        bytes_, exact = size * dtype.itemsize, self.approximate == "none"
        workspace = bytes_ * (2 if exact else 3)
        return LayerCost(
            shape,
            bytes_,
            forward_bytes=bytes_ if exact else 0,
            backward_bytes=workspace,
            forward_flops=9 * size,
            backward_flops=17 * size,
            in_place=True,
        )


def erf(x: Array) -> Array:
    """The error function, elementwise: SciPy's where there is one, CuPy's on a GPU, else Python's, number by number."""
    xp = array_module(x)
    function: Any
    if hasattr(xp, "erf"):
        function = xp.erf
    elif x.dtype.itemsize > 8:  # long doubles, which SciPy does not take
        function = _erf_by_number
    else:
        try:
            function = importlib.import_module("scipy.special" if xp is np else "cupyx.scipy.special").erf
        except ImportError:
            function = _erf_by_number
    return function(x)


def _erf_by_number(x: Array) -> Array:
    return np.fromiter(map(math.erf, x.flat), x.dtype, x.size).reshape(x.shape)


class Residual(Layer):
    """y = x + inner(x). He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", 2016.

    Args:
        inner: a layer (a `Sequential`, say) whose output has its input's shape.
    """

    def __init__(self, inner: Layer) -> None:
        if not isinstance(inner, Layer):
            raise TypeError(f"Residual: expected a layer, got {shown(inner)}")
        self.inner = inner

    def __repr__(self) -> str:
        return f"Residual({self.inner})"

    def forward(self, x: Array) -> tuple[Array, Saved]:
        try:
            h, kept = both(self.inner, self.inner.forward(x))
        except LayerError as error:
            raise error.within("inner") from None
        self._check(x.shape, h.shape)
        return array_module(x).add(x, h), kept

    def backward(self, dy: Array, saved: Saved) -> Array:
        try:
            inner = self.inner.backward(
                dy, saved
            )  # which refuses a dy that does not fit: its output has this shape, too
        except LayerError as error:
            raise error.within("inner") from None
        return array_module(dy).add(dy, inner)

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array | None:
        try:
            inner = self.inner.backward_(dy.copy(), saved, needs_dx)
        except LayerError as error:
            raise error.within("inner") from None
        if inner is None or not needs_dx:
            return None
        array_module(dy).add(dy, inner, out=dy)
        return dy

    def cost(self, shape: tuple[int, int], dtype: np.dtype[Any], needs_dx: bool = True) -> LayerCost:
        try:
            inner = self.inner.cost(shape, dtype, needs_dx)
        except ShapeError as error:
            raise error.within("inner") from None
        self._check(shape, inner.output_shape)
        bytes_, size = inner.output_bytes, shape[0] * shape[1]
        saved = inner.saved_bytes + (bytes_ if inner.keeps_output else 0)  # its output is not this layer's
        return LayerCost(
            shape,
            bytes_,
            saved_bytes=saved,
            forward_bytes=max(inner.forward_bytes, bytes_ + inner.saved_bytes),
            gradient_bytes=inner.gradient_bytes,
            backward_bytes=bytes_ + inner.backward_bytes,
            forward_flops=inner.forward_flops + size,
            backward_flops=inner.backward_flops + size,
            keeps_input=inner.keeps_input,
            keeps_output=False,
            in_place=True,
            output_gradient_bytes=inner.output_gradient_bytes,
        )

    def _check(self, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        if before != after:
            raise ShapeError(f"{self}: the inner layer must keep the shape, but makes {after} of {before}")
