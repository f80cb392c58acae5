"""Formulas of npnet that run as one kernel each on a GPU: activations, losses, updates, dropout's masks.

When CuPy is loaded, the methods in `FUSED` are replaced by such that make a kernel of the one they replace (see
`npnet.kernels`), and run that on CuPy's arrays; before that, and with NPNET_FUSE=0 in the environment, nothing is. What
cannot be written down as a kernel (another layout, another dtype) runs as it is written.
"""

import copy
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npnet import random
from npnet.activations import ACTIVATIONS
from npnet.backend import Array, Backend, array_module, on_load
from npnet.kernels import MOST_NUMBERS, MOST_PARTS, Kernel
from npnet.losses import BCEWithLogits, SoftmaxCrossEntropy, _SquaredError
from npnet.optimizers import SGD, Adam, Optimizer
from npnet.parameter import Parameter
from npnet.symbols import CannotFuse, Symbol

_kernels: dict[Any, Kernel | None] = {}


def kernel_for(
    key: Any,
    method: Callable[..., Any],
    arrays: Sequence[Array],
    vectors: Sequence[bool] = (),
    factors: int = 0,
    scratch: Sequence[int] = (),
    parts: int = 0,
) -> Kernel | None:
    """The kernel of ``method`` for such arrays, made once for a ``key`` and dtypes; None if there is none."""
    if not _on_gpu(arrays[0]):
        return None
    vectors = tuple(vectors) or (False,) * len(arrays)
    whole = [array for array, vector in zip(arrays, vectors, strict=True) if not vector]
    alike = all(array.shape == whole[0].shape for array in whole)
    in_rows = all(array.flags.c_contiguous for array in arrays)
    in_columns = not any(vectors) and all(array.flags.f_contiguous for array in arrays)
    if not (alike and (in_rows or in_columns) and whole[0].size < MOST_NUMBERS):
        return None
    dtypes = [array.dtype for array in arrays]
    key = key, tuple(dtypes), vectors, factors, parts
    if key not in _kernels:
        try:
            _kernels[key] = Kernel(method, dtypes, vectors, factors, scratch, parts)
        except CannotFuse:
            _kernels[key] = None
    kernel = _kernels[key]
    return None if kernel is not None and kernel.row_by_row and not in_rows else kernel


def _forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward_(self: Any, z: Array, bias: Array | None = None) -> None:
        arrays, vectors = ([z], [False]) if bias is None else ([z, bias], [False, True])
        kernel = kernel_for(plain, functools.partial(plain, self), arrays, vectors)
        if kernel is None:
            plain(self, z, bias)
        else:
            kernel(arrays)

    return forward_


def _backward(plain: Callable[..., Any]) -> Callable[..., Any]:
    def backward_(self: Any, dy: Array, saved: Any, needs_dx: bool = True) -> Array:
        def method(gradient: Symbol, y: Symbol) -> None:
            if plain(self, gradient, (None, y), needs_dx) is not gradient:
                raise CannotFuse("dx is not where dy was")

        arrays = [dy, saved[1]]
        kernel = kernel_for(plain, method, arrays)
        if kernel is None:
            return plain(self, dy, saved, needs_dx)
        kernel(arrays)
        return dy

    return backward_


def _loss(plain: Callable[..., Any]) -> Callable[..., Any]:
    def formula(self: Any, output: Array, target: Array, scale: float) -> tuple[Array, Array]:
        def method(output: Symbol, target: Symbol, gradient: Symbol, scale: Symbol) -> Any:
            value, found = plain(self, output, target, scale)
            gradient.become(found)
            return value

        arrays = [output, target, output]  # the gradient will be like the output
        kernel = kernel_for(plain, method, arrays, factors=1)
        if kernel is None:
            return plain(self, output, target, scale)
        gradient = array_module(output).empty_like(output)
        return kernel([output, target, gradient], [scale]), gradient

    return formula


def _update_each(plain: Callable[..., Any]) -> Callable[..., Any]:
    def update_each(self: Optimizer, ready: Sequence[Parameter]) -> None:
        names, formula = self.state_names, type(self)._update

        def method(weight: Any, slope: Any, *rest: Any) -> None:
            twin, stands = copy.copy(self), Parameter(weight)
            twin._state = {stands: dict(zip(names, rest, strict=False))}
            formula(twin, stands, slope, *rest[len(names) :])

        launches: dict[tuple[Kernel, tuple[float, ...]], list[list[Array]]] = {}
        key, factors = (formula, _settings(self)), len(self._factors(1))
        parts = min(2 ** (len(ready) - 1).bit_length(), MOST_PARTS)  # few sizes, since each is compiled
        for parameter in ready:
            kernel = None
            if formula in (SGD._update, Adam._update):
                arrays = [parameter.value, parameter.gradient, *(self._state[parameter][name] for name in names)]
                kernel = kernel_for(key, method, arrays, factors=factors, scratch=[1], parts=parts)
            if kernel is None:
                plain(self, [parameter])
            else:
                launches.setdefault((kernel, self._next_factors(parameter)), []).append(arrays)
                parameter.gradient = None
        for (kernel, numbers), found in launches.items():
            for first in range(0, len(found), parts):
                kernel.of_parts(found[first : first + parts], numbers)

    return update_each


def _keep(plain: Callable[..., Any]) -> Callable[..., Any]:
    def keep_(blocks: Array, *numbers: np.uint64) -> None:
        def method(counter: Symbol, *given: Symbol) -> None:
            counter.become(random._kept(counter, *given))

        kernel = kernel_for(plain, method, [blocks], factors=3)
        if kernel is None:
            plain(blocks, *numbers)
        else:
            kernel([blocks], numbers)

    return keep_


def _on_gpu(array: Any) -> bool:
    return hasattr(array_module(array), "RawKernel")


def _settings(optimizer: Optimizer) -> tuple[Any, ...]:
    """What the formula of an update depends on besides arrays and factors, of which the learning rate is one."""
    said = {name: value for name, value in vars(optimizer).items() if isinstance(value, (int, float, str))}
    return tuple(sorted((name, value) for name, value in said.items() if name != "learning_rate"))


FUSED: list[tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = [
    *((cls, "forward_", _forward) for cls in ACTIVATIONS.values()),
    *((cls, "backward_", _backward) for cls in ACTIVATIONS.values()),
    *((cls, "_formula", _loss) for cls in (_SquaredError, SoftmaxCrossEntropy, BCEWithLogits)),
    (Optimizer, "_update_each", _update_each),
    (random, "_keep_", _keep),
]
"""The methods (and a function) that are replaced, and by what."""


def enable(backend: Backend) -> None:
    """Replace them, if ``backend`` compiles kernels."""
    if hasattr(backend.xp, "RawKernel") and os.environ.get("NPNET_FUSE") != "0":
        for cls, name, replace in FUSED:
            plain = vars(cls)[name]
            if not hasattr(plain, "__wrapped__"):
                setattr(cls, name, functools.wraps(plain)(replace(plain)))


on_load(enable)
