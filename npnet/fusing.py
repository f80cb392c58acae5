"""One kernel for a run of elementwise calls: on a GPU, where each call by itself is a way through all its memory.

The formulas of activations and optimizers are plain calls on an array module. `Kernel` runs such a method once on
stand-ins (`Symbol`) that have no numbers: each call becomes a line of C, in which ``out=`` is a new value for a
variable. The lines are compiled for the GPU, and do what the calls do, but read each array once and write it once. A
method that does something else (a sum, a row's maximum) is not fused, and runs as it is written.

When CuPy is loaded, the methods in `FUSED` are replaced by such that do this for its arrays; before that, and with
NPNET_FUSE=0 in the environment, nothing is.
"""

import copy
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npnet.activations import ACTIVATIONS
from npnet.backend import Array, Backend, array_module, on_load, register_array_type
from npnet.layer import Parameter
from npnet.optimizers import SGD, Adam, Optimizer

EXPRESSIONS = {
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "negative": "-{}",
    "reciprocal": "1 / {}",
    "greater": "{} > {}",
    "maximum": "{0} != {0} || {0} > {1} ? {0} : {1}",  # NaN, which is not itself, stays
    "minimum": "{0} != {0} || {0} < {1} ? {0} : {1}",
    "exp": "exp({})",
    "tanh": "tanh({})",
    "sqrt": "sqrt({})",
}
"""What a call of a function says in C."""

TYPES = {"f": "float", "d": "double", "?": "bool"}


class CannotFuse(NotImplementedError, AttributeError, TypeError):
    """The method does something that is not elementwise."""


class Symbol:
    """Stands for an array: ``name`` is the variable that holds its element by now."""

    def __init__(self, lines: list[str], name: str, dtype: np.dtype[Any]) -> None:
        self.lines, self.name, self.dtype = lines, name, dtype

    def __getattr__(self, name: str) -> Any:
        raise CannotFuse(f"a method {name} is called")


def _call(function: str, *operands: Any, out: Symbol | None = None) -> Symbol:
    """Write down ``function(*operands, out=out)``."""
    symbols = [each for each in operands if isinstance(each, Symbol)]
    numbers = [each.dtype for each in symbols if each.dtype.char != "?"]
    plain = all(isinstance(each, Symbol) or math.isfinite(each) for each in operands)
    if not plain or len(set(numbers)) != 1 or (out is not None and out.dtype != numbers[0]):
        raise CannotFuse(f"{function} of {', '.join(map(str, numbers))}")
    dtype = np.dtype(bool) if function == "greater" else numbers[0]
    kind = TYPES[numbers[0].char]
    texts = [each.name if isinstance(each, Symbol) else f"({kind}){float(each)!r}" for each in operands]
    lines = symbols[0].lines
    name = f"v{len(lines)}"
    lines.append(f"{TYPES[dtype.char]} {name} = {EXPRESSIONS[function].format(*texts)};")
    if out is None:
        return Symbol(lines, name, dtype)
    out.name = name
    return out


class _Module:
    """The functions that can be fused."""

    def __getattr__(self, name: str) -> Any:
        if name not in EXPRESSIONS:
            raise CannotFuse(name)
        return functools.partial(_call, name)


def _no_host(x: Any) -> Any:
    raise CannotFuse("its numbers are asked for")


register_array_type(Backend("fused", _Module(), Symbol, _no_host))


class Kernel:
    """The C of ``method(*symbols)``, and which of the arrays it writes.

    Args:
        method: is called with a `Symbol` for each array, then for each factor.
        dtypes: of the arrays.
        rows: which of them are rows, (features,), broadcast over the others, (batch, features).
        factors: how many numbers follow, which differ from call to call.
        scratch: which of the arrays nobody reads afterwards: they are not written.

    Raises:
        CannotFuse: it is not elementwise.
    """

    def __init__(
        self,
        method: Callable[..., Any],
        dtypes: Sequence[np.dtype[Any]],
        rows: Sequence[bool],
        factors: int = 0,
        scratch: Sequence[int] = (),
    ) -> None:
        if any(dtype.char not in "fd" for dtype in dtypes):
            raise CannotFuse(f"arrays of {', '.join(map(str, dtypes))}")
        lines: list[str] = []
        arrays = [Symbol(lines, f"x{i}", dtype) for i, dtype in enumerate(dtypes)]
        numbers = [Symbol(lines, f"({TYPES[dtypes[0].char]})f{i}", dtypes[0]) for i in range(factors)]
        try:
            method(*arrays, *numbers)
        except (TypeError, ValueError) as error:  # of operators, of functions of another module
            raise CannotFuse(str(error)) from None
        self.written = [i for i, each in enumerate(arrays) if each.name != f"x{i}" and i not in scratch]
        if any(rows[i] for i in self.written) or not self.written:
            raise CannotFuse("a row is written, or nothing")
        kinds = [TYPES[dtype.char] for dtype in dtypes]
        parameters = [f"{'' if i in self.written else 'const '}{kind}* a{i}" for i, kind in enumerate(kinds)]
        parameters = ["long long n", "long long columns", *parameters, *(f"double f{i}" for i in range(factors))]
        reads = [f"{kind} x{i} = a{i}[{'i % columns' if rows[i] else 'i'}];" for i, kind in enumerate(kinds)]
        writes = [f"a{i}[i] = {arrays[i].name};" for i in self.written]
        body = "\n    ".join([*reads, *lines, *writes])
        self.source = (
            f'extern "C" __global__ void fused({", ".join(parameters)}) {{\n'
            "    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;\n"
            f"    if (i >= n) return;\n    {body}\n}}\n"
        )

    @functools.cached_property
    def compiled(self) -> Any:
        """By CuPy, without joining products to sums: so that the numbers are those of the single calls."""
        import cupy

        return cupy.RawKernel(self.source, "fused", options=("--fmad=false",))

    def __call__(self, arrays: Sequence[Array], factors: Sequence[float] = ()) -> None:
        """Do it."""
        n, columns = arrays[0].size, arrays[0].shape[-1] if arrays[0].ndim else 1
        if n:
            given = (np.int64(n), np.int64(columns), *arrays, *map(np.float64, factors))
            self.compiled((-(-n // 256),), (256,), given)


_kernels: dict[Any, Kernel | None] = {}


def run_fused(
    key: Any,
    method: Callable[..., Any],
    arrays: Sequence[Array],
    rows: Sequence[bool],
    factors: Sequence[float] = (),
    scratch: Sequence[int] = (),
) -> bool:
    """Run ``method`` on the arrays as one kernel, made once for a ``key`` and dtypes; False if that cannot be."""
    whole = [array for array, row in zip(arrays, rows, strict=True) if not row]
    first = whole[0]
    alike = all(array.shape == first.shape for array in whole)
    in_rows = all(array.flags.c_contiguous for array in arrays)
    in_columns = not any(rows) and all(array.flags.f_contiguous for array in arrays)
    if not (alike and (in_rows or in_columns)):
        return False
    dtypes = [array.dtype for array in arrays]
    key = key, tuple(dtypes), tuple(rows), len(factors)
    if key not in _kernels:
        try:
            _kernels[key] = Kernel(method, dtypes, rows, len(factors), scratch)
        except CannotFuse:
            _kernels[key] = None
    kernel = _kernels[key]
    if kernel is None:
        return False
    kernel(arrays, factors)
    return True


def _forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward_(self: Any, z: Array, bias: Array | None = None) -> None:
        arrays, rows = ([z], [False]) if bias is None else ([z, bias], [False, True])
        method = functools.partial(plain, self)
        if not (_on_gpu(z) and run_fused((plain, _settings(self)), method, arrays, rows)):
            plain(self, z, bias)

    return forward_


def _backward(plain: Callable[..., Any]) -> Callable[..., Any]:
    def backward_(self: Any, dy: Array, saved: Any, needs_dx: bool = True) -> Array:
        def method(gradient: Symbol, y: Symbol) -> None:
            if plain(self, gradient, (None, y), needs_dx) is not gradient:
                raise CannotFuse("dx is not where dy was")

        if _on_gpu(dy) and run_fused((plain, _settings(self)), method, [dy, saved[1]], [False, False]):
            return dy
        dx: Array = plain(self, dy, saved, needs_dx)
        return dx

    return backward_


def _update(plain: Callable[..., Any]) -> Callable[..., Any]:
    def update(self: Optimizer, parameter: Parameter, gradient: Array, *factors: float) -> None:
        names = self.state_names

        def method(weight: Any, slope: Any, *rest: Any) -> None:
            twin, stands = copy.copy(self), Parameter(weight)
            twin._state = {stands: dict(zip(names, rest, strict=False))}
            plain(twin, stands, slope, *rest[len(names) :])

        if _on_gpu(gradient):
            states = [self._state[parameter][name] for name in names]
            arrays = [parameter.value, gradient, *states]
            if run_fused((plain, _settings(self)), method, arrays, [False] * len(arrays), factors, scratch=[1]):
                return
        plain(self, parameter, gradient, *factors)

    return update


def _on_gpu(array: Any) -> bool:
    return hasattr(array_module(array), "RawKernel")


def _settings(owner: Any) -> tuple[Any, ...]:
    """What the formula depends on besides arrays and factors: the learning rate is one of these."""
    said = {name: value for name, value in vars(owner).items() if isinstance(value, (int, float, str))}
    return tuple(sorted((name, value) for name, value in said.items() if name != "learning_rate"))


FUSED: list[tuple[type, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = [
    *((cls, "forward_", _forward) for cls in ACTIVATIONS.values()),
    *((cls, "backward_", _backward) for cls in ACTIVATIONS.values()),
    *((cls, "_update", _update) for cls in (SGD, Adam)),
]
"""The methods that are replaced, and by what."""


def enable(backend: Backend) -> None:
    """Replace them, if ``backend`` compiles kernels."""
    if hasattr(backend.xp, "RawKernel") and os.environ.get("NPNET_FUSE") != "0":
        for cls, name, replace in FUSED:
            plain = vars(cls)[name]
            if not hasattr(plain, "__wrapped__"):
                setattr(cls, name, functools.wraps(plain)(replace(plain)))


on_load(enable)
