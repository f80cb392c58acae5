"""A backend that behaves like CuPy on a machine without a GPU, and complains where CuPy would.

Code that works with NumPy fails on a GPU in three ways: it hands a device array to NumPy, it mixes a host array into
the arithmetic, or it waits for the device more often than it must. With NumPy alone nobody sees any of these. The
guard does NumPy's arithmetic, bit for bit, on arrays that NumPy itself does not get to see:

* `DeviceArray` wraps an array. It is *not* a subclass of np.ndarray: NumPy would take that for its own.
* `GuardModule` is the array module, the ``xp`` of npnet. ``xp.asarray`` is the one way in, ``xp.asnumpy`` the one out.
* ``syncs`` counts, by cause, how often the host would have waited for the device.
* What CuPy 14 makes in rows, where NumPy keeps the columns of its operands, is in rows; and the arrays that it makes on
  the way and NumPy does not are made here, too, so that they are counted (tests/pool.py).

>>> with install_guard() as xp:
...     x = registry.to_backend(np.ones(3), "guard")
...     total = xp.exp(x).sum()  # still on the device: an array without axes
...     print(total.shape, round(float(total), 3), dict(xp.syncs))
() 8.155 {'float': 1}
>>> np.exp(x)
Traceback (most recent call last):
    ...
TypeError: operand 'DeviceArray' does not support ufuncs (__array_ufunc__=None)
"""

import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn
from unittest.mock import patch

import numpy as np

from npnet import backend as registry

METHODS: dict[str, str] = {
    **dict.fromkeys(("all", "any", "max", "min"), "axis out keepdims"),
    **dict.fromkeys(("argmax", "argmin", "mean", "sum"), "axis dtype out keepdims"),
    "astype": "dtype order casting copy",
    "copy": "order",
    "dot": "out",
    "fill": "value",
    "ravel": "order",
    "reshape": "order copy",
    "transpose": "",
    "view": "",
}
"""The methods of a device array, each with the keywords that CuPy's takes: NumPy's take more (``where=``, say)."""

ATTRIBUTES = frozenset({"dtype", "flags", "itemsize", "nbytes", "ndim", "shape", "size", "strides"})
OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "rshift")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
WAITING = frozenset({"argwhere", "flatnonzero", "nonzero", "unique"})
"""Functions whose result has a length that only the device knows, so that the host waits for it."""
HOST_ANSWERS = frozenset({"allclose", "array_equal"})
"""Functions that give a Python bool in NumPy and an array without axes in CuPy."""

_HOST_ARRAY = "a host array (np.ndarray) in an operation on the device; bring it there with npnet.to_backend"


class DeviceArray:
    """An array that only its own module may work on."""

    __slots__ = ("_data",)
    __hash__: ClassVar[None] = None  # type: ignore[assignment]
    __array_ufunc__ = None  # NumPy's ufuncs refuse it, and host_array + device_array comes to __radd__ below

    syncs: ClassVar[Counter[str]] = Counter()
    account: ClassVar[Callable[[np.ndarray], None] | None] = None  # where memory is counted, too: tests/pool.py

    def __init__(self, data: np.ndarray) -> None:
        self._data = data
        if self.account is not None:
            self.account(data)

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("implicit conversion of a device array to a NumPy array; npnet.to_host is the explicit one")

    def __array_function__(self, function: Callable[..., Any], *_: Any) -> NoReturn:
        raise TypeError(f"np.{function.__name__} got a device array; take the function from array_module(x)")

    @property
    def T(self) -> "DeviceArray":  # noqa: N802 - its name everywhere
        return DeviceArray(self._data.T)

    @property
    def data(self) -> SimpleNamespace:
        """Where it is."""
        return SimpleNamespace(ptr=self._data.ctypes.data)

    def __getattr__(self, name: str) -> Any:
        if name in ATTRIBUTES:
            return getattr(self._data, name)
        if name not in METHODS:
            raise AttributeError(f"the guard's arrays have no {name!r}; if CuPy's have, add it to tests/guard.py")
        return partial(self._method, name)

    def _method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        refused = set(kwargs) - set(METHODS[name].split())
        if refused:
            raise TypeError(f"CuPy's {name}() takes no keyword {', '.join(sorted(refused))}")
        whole = name in ("all", "any", "max", "min", "sum") and not args and kwargs.get("axis") is None
        aside = DeviceArray(self._data.copy()) if whole and not self._data.flags.c_contiguous else None
        result = getattr(self._data, name)(*_unwrap(args), **_unwrap(kwargs))
        del aside
        return _wrap(result, *kwargs.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeviceArray":
        return DeviceArray(self._data.copy())  # in C order, whatever it was: as CuPy's

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, key: Any) -> "DeviceArray":
        """A view where NumPy gives one, and also for a single element, as in CuPy."""
        keys = _unwrap(key if isinstance(key, tuple) else (key,))
        if any(isinstance(k, np.ndarray) and k.dtype.kind == "b" for k in keys):
            self.syncs["mask"] += 1  # how many elements are there?
        whole = any(k is Ellipsis for k in keys)
        return DeviceArray(self._data[keys if whole else (*keys, ...)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._data[_unwrap(key)] = _operand(value)

    def __invert__(self) -> "DeviceArray":
        return DeviceArray(np.asarray(~self._data, order="C"))

    def __neg__(self) -> "DeviceArray":
        return DeviceArray(np.asarray(-self._data, order="C"))

    def _waits(self, cause: str) -> np.ndarray:
        self.syncs[cause] += 1
        return self._data

    def __float__(self) -> float:
        return float(self._waits("float"))

    def __int__(self) -> int:
        return int(self._waits("int"))

    def __index__(self) -> int:
        return operator.index(self._waits("index"))

    def __bool__(self) -> bool:
        return bool(self._waits("bool"))

    def __repr__(self) -> str:
        return f"device {self._waits('repr')!r}"

    def __str__(self) -> str:
        return str(self._waits("repr"))

    def __iter__(self) -> Iterator["DeviceArray"]:
        self._waits("iteration")
        return (self[i] for i in range(len(self)))

    def item(self) -> Any:
        return self._waits("item").item()


def _operand(value: Any) -> Any:
    """What may stand beside a device array in arithmetic: another one, or a scalar. No list, and no host array."""
    if isinstance(value, DeviceArray):
        return value._data
    if isinstance(value, (bool, int, float, complex, np.generic)):
        return value
    raise TypeError(_HOST_ARRAY if isinstance(value, np.ndarray) else f"{type(value).__name__} beside a device array")


def _unwrap(value: Any, way_in: bool = False) -> Any:
    """``value`` for NumPy. Host arrays are refused, or on the ``way_in`` copied: a device has its own memory."""
    if isinstance(value, DeviceArray):
        return value._data
    if isinstance(value, np.ndarray):
        if not way_in:
            raise TypeError(_HOST_ARRAY)
        return value.copy(order="K")
    if isinstance(value, dict):
        return {key: _unwrap(item, way_in) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_unwrap(item, way_in) for item in value)
    return value


def _wrap(result: Any, *given: Any) -> Any:
    """NumPy's ``result`` on the device; the very array that was ``given``, where it is that one (``out=``)."""
    for array in given:
        if isinstance(array, DeviceArray) and array._data is result:
            return array
    if isinstance(result, (np.ndarray, np.generic)):
        return DeviceArray(np.asarray(result))
    return type(result)(map(_wrap, result)) if isinstance(result, (list, tuple)) else result


def _add_operators(name: str, reflected_too: bool) -> None:
    def function(*operands: Any) -> np.ndarray:
        return np.asarray(getattr(operator, f"__{name}__")(*operands), order="C")

    setattr(DeviceArray, f"__{name}__", lambda self, other: _wrap(function(self._data, _operand(other))))
    if reflected_too:
        in_place = getattr(operator, f"__i{name}__")
        setattr(DeviceArray, f"__r{name}__", lambda self, other: _wrap(function(_operand(other), self._data)))
        setattr(DeviceArray, f"__i{name}__", lambda self, other: _wrap(in_place(self._data, _operand(other)), self))


for _name in OPERATORS + COMPARISONS:
    _add_operators(_name, _name in OPERATORS)


class GuardModule:
    """NumPy's functions, for device arrays alone."""

    __name__ = "guard"

    def __init__(self) -> None:
        self.functions_used: set[str] = set()
        self.keywords_used: defaultdict[str, set[str]] = defaultdict(set)
        self.syncs = DeviceArray.syncs

    def asnumpy(self, x: Any, order: Any = "C") -> np.ndarray:
        """A copy of ``x`` on the host: the explicit way out."""
        if not isinstance(x, DeviceArray):
            return np.asarray(x)
        aside = DeviceArray(x._data.copy()) if order == "C" and not x._data.flags.c_contiguous else None
        result = x._waits("asnumpy").copy(order=order)
        del aside
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for those
            raise AttributeError(name)
        value = getattr(np, name)
        is_class = isinstance(value, type)
        plain = value is None or isinstance(value, float)  # newaxis, pi, inf, nan
        dtype = is_class and (issubclass(value, np.generic) or value in (np.dtype, np.finfo, np.iinfo))
        if not (plain or dtype or value is np.ndarray or (callable(value) and not is_class)):
            raise AttributeError(f"the guard does not offer np.{name}; if CuPy does, add it to tests/guard.py")
        self.functions_used.add(name)
        if plain or dtype:
            return value
        return DeviceArray if value is np.ndarray else partial(self._call, name, value)

    def _call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.keywords_used[name].update(kwargs)
        if isinstance(function, np.ufunc):
            numpy_args = tuple(map(_operand, args))
        else:
            numpy_args = _unwrap(args, way_in=name in ("array", "asarray"))
        if name in WAITING:
            self.syncs[name] += 1
        if name == "einsum" and args[0] != "ij,ij->i":
            raise TypeError(f"CuPy's einsum copies what {args[0]} does not sum along rows: take other products")
        vectors = name == "dot" and args[0].ndim == args[1].ndim == 1
        aside = DeviceArray(numpy_args[0] * numpy_args[1]) if vectors else None
        result = function(*numpy_args, **_unwrap(kwargs))
        del aside
        if isinstance(function, np.ufunc) and len(args) == function.nin and "out" not in kwargs:
            result = np.asarray(result, order="C")
        return _wrap(np.asarray(result) if name in HOST_ANSWERS else result, *args, *kwargs.values())


@contextmanager
def install_guard() -> Iterator[GuardModule]:
    """Make "guard" a backend of npnet for a while, with fresh counters; afterwards the registry is as it was."""
    xp = GuardModule()
    xp.syncs.clear()
    with (
        patch.dict(registry._loaders),
        patch.dict(registry._loaded),
        patch.dict(registry._by_type),
        patch.object(registry, "_current", registry._current),
    ):
        to_host = partial(xp.asnumpy, order="A")
        registry.register_backend("guard", lambda: registry.Backend("guard", xp, DeviceArray, to_host))
        registry.get_backend("guard")  # loaded: from here on npnet knows the array when it sees one
        yield xp
