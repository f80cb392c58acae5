"""Record what a function does with arrays, once, and do it again without the function.

1. *Trace.* The function runs on stand-ins (`Traced`), which have a shape and a dtype but no numbers. What it calls on
   them is not computed but written down, with a new buffer for each result (`Recording`).
2. *Pack.* A buffer is alive from the first call that mentions it to the last. Buffers that are never alive together
   may have the same place in one block of memory, the arena (`npnet.replay.pack`).
3. *Replay.* ``for function, arguments in calls: function(*arguments)``, where each function is NumPy's and writes into
   the arena (`npnet.replay.Program`). No layer's Python runs, and nothing is allocated.

These are the calls that the function would make on arrays, so the numbers are the same, bit for bit. The idea is that
of ``jax.jit``'s tracing and of CUDA graphs, for NumPy. What the function decides by *numbers* cannot be recorded, and
stand-ins refuse to be looked at; what it decides by shapes and attributes is decided once.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from operator import attrgetter
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import as_strided

from npnet import into
from npnet.backend import Array, Backend, ones, register_array_type, scalar
from npnet.dual import Ones
from npnet.random import current_step
from npnet.refusal import CannotCapture as CannotCapture
from npnet.refusal import Unrecorded
from npnet.stand_in import StandIn


class Buffer:
    """A place for numbers: in the arena, somebody else's ``array``, or input number ``source``."""

    __slots__ = ("array", "begin", "dtype", "name", "order", "shape", "source", "whole")

    def __init__(self, shape: tuple[int, ...], dtype: Any, order: str, name: str = "") -> None:
        self.shape, self.dtype, self.order, self.name = shape, np.dtype(dtype), order, name
        self.array: Array | None = None
        self.source: int | None = None
        self.whole, self.begin = self, 0  # a buffer that this is a part of, from so many bytes on

    @property
    def in_arena(self) -> bool:
        """It lives as long as calls mention it."""
        return self.array is None and self.source is None

    @property
    def nbytes(self) -> int:
        """Its size."""
        return int(math.prod(self.shape) * self.dtype.itemsize)


Path: TypeAlias = tuple[Callable[[Array], Array], ...]
"""From a buffer's array to a view of it."""


def view(array: Array, path: Path) -> Array:
    """The view."""
    return reduce(lambda a, step: step(a), path, array)


class Factor:
    """A number that is another one at each replay: set `value` before it."""

    def __init__(self) -> None:
        self._arrays: dict[np.dtype[Any], Array] = {}

    def operand(self, dtype: np.dtype[Any]) -> Array:
        """The 0-d array that calls read."""
        return self._arrays.setdefault(dtype, np.zeros((), dtype))

    def set(self, value: float) -> None:
        """Change the number."""
        for array in self._arrays.values():
            array[...] = value


class Traced(Unrecorded, StandIn):
    """Stands for an array while a function is recorded: a view of a buffer.

    Its ``value`` is a phantom: an array with the right shape and strides over a single number, which is never read.
    """

    __slots__ = ("buffer", "path", "recording")
    nbytes = property(attrgetter("value.nbytes"))

    def __init__(self, recording: "Recording", buffer: Buffer, phantom: Array, path: Path = ()) -> None:
        super().__init__(phantom)
        self.recording, self.buffer = recording, buffer
        self.path = path

    def _view(self, step: Callable[[Array], Array]) -> "Traced":
        return Traced(self.recording, self.buffer, step(self.value), (*self.path, step))

    @property
    def T(self) -> "Traced":  # noqa: N802 - NumPy's name
        """The transpose."""
        return self._view(lambda a: a.T)

    def __getitem__(self, index: Any) -> "Traced":
        parts = index if isinstance(index, tuple) else (index,)
        if not all(part is None or part is ... or isinstance(part, (int, slice)) for part in parts):
            raise CannotCapture(f"an index like {index!r} copies numbers, and cannot be recorded; slices can")
        return self._view(lambda a: a[index if isinstance(index, tuple) else (index, ...)])

    def reshape(self, *shape: Any) -> "Traced":
        """In another shape: a view where the array is in C order, else of a copy."""
        whole = self if self.value.flags.c_contiguous else self.copy()
        return whole._view(lambda a: a.reshape(*shape))

    def ravel(self, order: str = "C") -> "Traced":
        """In one row, as `reshape`."""
        if order == "K" and self.value.flags.f_contiguous:
            return self.T.reshape(-1)
        return self.reshape(-1)

    def copy(self, order: str = "C") -> "Traced":
        """In a new buffer."""
        return self.astype(self.dtype, order)

    def astype(self, dtype: Any, order: str = "K", copy: bool = True) -> "Traced":
        """In another dtype."""
        if not copy and np.dtype(dtype) == self.dtype:
            return self
        result = self.recording.empty(self.shape, dtype, order if order in "CF" else _layout([self.value]))
        self.recording.call(into.copy, self, result)
        return result

    def _reduced(self, function: Callable[..., Any], axis: int | None, keepdims: bool) -> "Traced":
        if not (axis is None or isinstance(axis, int)):
            raise CannotCapture(
                f"a sum, mean or maximum over axis={axis!r} cannot be recorded; over one, or all, it can"
            )
        axes = range(self.ndim) if axis is None else [range(self.ndim)[axis]]
        shape = [1 if number in axes else size for number, size in enumerate(self.shape)]
        if not keepdims:
            shape = [size for number, size in enumerate(self.shape) if number not in axes]
        result = self.recording.empty(tuple(shape), self.dtype)
        self.recording.call(function, self, axis, None, result, keepdims)
        return result

    def sum(self, axis: int | None = None, keepdims: bool = False) -> "Traced":
        """The sum of numbers."""
        return self._reduced(np.add.reduce, axis, keepdims)

    def mean(self, axis: int | None = None, keepdims: bool = False) -> "Traced":
        """Their mean."""
        return self._reduced(np.mean, axis, keepdims)

    def max(self, axis: int | None = None, keepdims: bool = False) -> "Traced":
        """The largest of them."""
        return self._reduced(np.maximum.reduce, axis, keepdims)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any) -> "Traced":
        if method != "__call__" or options:
            raise CannotCapture(f"numpy.{ufunc.__name__} with {method} or options cannot be recorded")
        return _elementwise(ufunc, *inputs, out=None if out is None else out[0])

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> "Traced":
        call = getattr(MODULE, function.__name__)
        try:
            return call(*args, **kwargs)
        except TypeError as error:  # an option that is not known here
            raise CannotCapture(f"numpy.{function.__name__} cannot be recorded so ({error})") from None

    def __matmul__(self, other: Any) -> "Traced":
        return MODULE.matmul(self, other)


class Recording:
    """Calls in their order, on stand-ins."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.inputs = 0
        self.step: int | None = None  # the training step that random numbers were drawn for

    def empty(self, shape: tuple[int, ...], dtype: Any, order: str = "C") -> Traced:
        """A new buffer of the arena."""
        return self._stand_in(Buffer(shape, dtype, order))

    def constant(self, array: Array, name: str = "constant") -> Traced:
        """An array that stays where it is, and may be overwritten: a parameter, say."""
        buffer = Buffer(array.shape, array.dtype, "C", name)
        buffer.array = array
        return Traced(self, buffer, array)

    def input(self, array: Array, name: str = "input") -> Traced:
        """The next input: for each replay another array of the same shape and dtype."""
        buffer = Buffer(array.shape, array.dtype, _layout([array]), name)
        buffer.source = self.inputs
        self.inputs += 1
        return self._stand_in(buffer)

    def join(self, parts: Sequence[Traced]) -> Traced | None:
        """One stand-in for all of ``parts``, which from now on lie side by side; None if they are not whole buffers."""
        buffers = dict.fromkeys(part.buffer for part in parts)
        whole = all(part.buffer.in_arena and part.buffer.nbytes == part.nbytes for part in parts)
        if not whole or len(buffers) < len(parts) or any(each.whole is not each for each in buffers):
            return None
        joined = self.empty((sum(part.size for part in parts),), parts[0].dtype)
        begin = 0
        for each in buffers:
            each.whole, each.begin = joined.buffer, begin
            begin += each.nbytes
        return joined

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Write down a call; stand-ins among its arguments become arrays."""
        self.calls.append((function, arguments))

    def _stand_in(self, buffer: Buffer) -> Traced:
        strides, step = [0] * len(buffer.shape), buffer.dtype.itemsize
        axes = range(len(strides))
        for axis in axes if buffer.order == "F" else reversed(axes):
            strides[axis], step = step, step * buffer.shape[axis]
        phantom = as_strided(np.zeros((), buffer.dtype), buffer.shape, strides, writeable=False)
        return Traced(self, buffer, phantom)


def _layout(arrays: Iterable[Array]) -> str:
    """The order that NumPy gives to a result: that of its operands."""
    return "F" if all(a.flags.f_contiguous and not a.flags.c_contiguous for a in arrays) else "C"


def _recording_of(*operands: Any) -> Recording:
    return next(operand.recording for operand in operands if isinstance(operand, Traced))


def _operand(x: Any, dtype: np.dtype[Any]) -> Any:
    """What a call gets for ``x``: 0-d arrays for numbers, which NumPy combines faster than Python's."""
    if isinstance(x, Traced):
        return x
    if isinstance(x, Factor):
        return x.operand(dtype)
    if isinstance(x, Ones):
        return ones(np, *x)
    if isinstance(x, (int, float, np.generic)):
        return scalar(np, float(x), dtype)
    raise CannotCapture(
        f"a function that makes an array of its own ({type(x).__name__}) cannot be recorded: it may be another one the "
        "next time (random numbers?)"
    )


def _elementwise(ufunc: np.ufunc, *inputs: Any, out: Traced | None = None, **options: Any) -> Any:
    """Record ``ufunc(*inputs, out=out)``; of numbers alone, do it."""
    if not any(isinstance(x, (Traced, Factor)) for x in inputs) and out is None:
        return ufunc(*inputs, **options)
    if ufunc is np.matmul and not options:
        return MODULE.matmul(inputs[0], inputs[1], out)
    if options or ufunc.signature or not (out is None or isinstance(out, Traced)):
        raise CannotCapture(f"numpy.{ufunc.__name__} with options, or into another array, cannot be recorded")
    recording = _recording_of(*inputs)
    kinds = [getattr(x, "dtype", float if isinstance(x, Factor) else type(x)) for x in inputs]
    try:
        dtypes = ufunc.resolve_dtypes((*kinds, None))
    except TypeError:
        raise CannotCapture(f"numpy.{ufunc.__name__} of {', '.join(map(str, kinds))} cannot be recorded") from None
    operands = [_operand(x, dtype) for x, dtype in zip(inputs, dtypes, strict=False)]
    shape = np.broadcast_shapes(*(x.shape for x in operands))
    if out is None:
        whole = [x.value for x in operands if isinstance(x, Traced) and x.shape == shape]
        out = recording.empty(shape, dtypes[-1], _layout(whole) if whole else "C")
    elif out.shape != shape:
        raise ValueError(f"numpy.{ufunc.__name__}: the result has shape {shape}, out {out.shape}")
    recording.call(into.WITH_OUT.get(ufunc, ufunc), *operands, out)
    return out


class TracingModule:
    """The functions that layers, losses and optimizers call on an array module, written down."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(np, name, None)
        if isinstance(function, np.ufunc) and function.nout == 1:
            return partial(_elementwise, function)
        raise CannotCapture(f"numpy.{name} cannot be recorded")

    def ones(self, length: int, dtype: Any) -> Ones:
        """A constant."""
        if not isinstance(length, int):
            raise CannotCapture("numpy.ones of more than one axis cannot be recorded")
        return Ones(length, dtype)

    def empty_like(self, x: Traced) -> Traced:
        """A new buffer."""
        return x.recording.empty(x.shape, x.dtype, _layout([x.value]))

    def zeros_like(self, x: Traced) -> Traced:
        """A new buffer, of zeros at every replay."""
        result = self.empty_like(x)
        x.recording.call(into.copy, scalar(np, 0.0, x.dtype), result)
        return result

    def dot(self, x: Any, y: Any, function: Callable[..., Any] = np.dot) -> Traced:
        """A product of matrices or vectors."""
        recording = _recording_of(x, y)
        x, y = (_operand(each, each.dtype) for each in (x, y))
        dtype = np.result_type(x.dtype, y.dtype)
        if x.shape[-1] != y.shape[-2 if y.ndim > 1 else 0]:
            raise ValueError(f"numpy.dot: shapes {x.shape} and {y.shape} do not fit")
        result = recording.empty(x.shape[:-1] + y.shape[:-2] + (y.shape[-1:] if y.ndim > 1 else ()), dtype)
        recording.call(function, x, y, result)
        return result

    def matmul(self, x: Any, y: Any, out: Traced | None = None) -> Traced:
        """What ``@`` does, for matrices and vectors."""
        if out is not None or max(getattr(each, "ndim", 0) for each in (x, y)) > 2:
            raise CannotCapture("numpy.matmul of more than matrices, or into an array, cannot be recorded")
        return self.dot(x, y, np.matmul)

    def einsum(self, subscripts: str, x: Any, y: Any) -> Traced:
        """Any product of two."""
        sizes = dict(zip(subscripts.replace(",", ""), (*x.shape, *y.shape), strict=False))
        shape = tuple(sizes[letter] for letter in subscripts.split("->")[1])
        result = _recording_of(x, y).empty(shape, np.result_type(x.dtype, y.dtype))
        result.recording.call(into.einsum, subscripts, x, y, result)
        return result

    def erf(self, x: Traced) -> Traced:
        """The error function."""
        result = x.recording.empty(x.shape, x.dtype)
        x.recording.call(into.erf, x, result)
        return result

    def keep_mask(self, x: Traced, key: int, p: float) -> Traced:
        """That of dropout, drawn at each replay for its step."""
        recording = x.recording
        recording.step = current_step() if recording.step is None else recording.step
        if current_step() != recording.step:
            raise CannotCapture("a recomputation that draws other random numbers cannot be recorded")
        result = recording.empty(x.shape, np.bool_)
        recording.call(into.draw, key, p, result)
        return result


MODULE = Traced.xp = TracingModule()


def _no_host(x: Traced) -> NoReturn:
    x._looked_at()


register_array_type(Backend("recorded", MODULE, Traced, _no_host))
