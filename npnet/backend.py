"""Which array module does the arithmetic: NumPy on the host, CuPy on a GPU.

Two rules keep the rest of the package free of the question.

* **The backend follows the data.** A function that receives an array asks ``xp = array_module(x)`` and
  calls ``xp.dot``, ``xp.exp``...; no function exists twice. Only what *creates* arrays (a network, say)
  has to choose, and it takes the current backend: ``use_backend``, or ``NPNET_BACKEND``, or NumPy.
* **Nothing moves by itself.** ``to_backend`` and ``to_host`` are the ways between host and device; only batches of the
  host's data, and activations that a schedule offloads, are moved for you (`npnet.feeding`, `npnet.offload`).
"""

import functools
import importlib
import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
"""A NumPy array or, on a GPU, a CuPy array: the same methods, so the same annotation."""


class BackendUnavailable(RuntimeError):
    """The backend is known to npnet, but this machine lacks something that it needs."""


@dataclass(frozen=True)
class Backend:
    """An array module and the way in and out of it."""

    name: str
    xp: Any
    array_type: type
    to_host: Callable[[Any], Array]

    def __reduce__(self) -> tuple[Callable[[str], "Backend"], tuple[str]]:
        """Copies and pickles of a backend are the backend itself: modules cannot be copied."""
        return get_backend, (self.name,)


def _load_numpy() -> Backend:
    return Backend("numpy", np, np.ndarray, np.asarray)


def _load_cupy() -> Backend:
    install = "pip install 'npnet[cuda12]' (or npnet[cuda13], after the CUDA version that nvidia-smi prints)"
    try:
        import cupy

        runtime = cupy.cuda.runtime
    except (ImportError, AttributeError) as error:  # AttributeError: an empty folder called cupy imports, too
        missing = isinstance(error, AttributeError) or getattr(error, "name", None) == "cupy"
        problem = "is missing" if missing else "is there but does not load"
        raise BackendUnavailable(f"backend 'cupy': the package {problem} ({error}); {install}") from error
    try:
        driver, count = runtime.driverGetVersion(), 0
        if driver:
            count = runtime.getDeviceCount()
    except RuntimeError as error:
        raise BackendUnavailable(
            f"backend 'cupy': the driver cannot serve this CuPy ({error}); update the driver, or {install}"
        ) from error
    if not driver:
        raise BackendUnavailable(
            "backend 'cupy': the package is there, the NVIDIA driver is missing; install the driver "
            "(nvidia-smi must work), or use backend 'numpy'"
        )
    if not count:
        raise BackendUnavailable(
            "backend 'cupy': package and driver are there, a GPU is not (or CUDA_VISIBLE_DEVICES hides it); "
            "use backend 'numpy'"
        )
    return Backend("cupy", cupy, cupy.ndarray, functools.partial(cupy.asnumpy, order="A"))  # in the layout it has


_loaders: dict[str, Callable[[], Backend]] = {"numpy": _load_numpy, "cupy": _load_cupy}
_loaded: dict[str, Backend] = {}
_by_type: dict[type, Backend] = {}
_on_load: list[Callable[[Backend], None]] = []
_current: str | None = None  # None: not chosen yet, NPNET_BACKEND decides


def register_backend(name: str, load: Callable[[], Backend]) -> None:
    """Make ``name`` a backend; ``load()`` builds it when it is first asked for.

    Raises:
        TypeError: ``name`` is not a text, or ``load`` not a function.
    """
    if not (isinstance(name, str) and callable(load)):
        raise TypeError(
            f"register_backend: expected a name and a function, got {type(name).__name__} and {type(load).__name__}"
        )
    _loaders[name] = load
    replaced = _loaded.pop(name, None)
    if replaced is not None:
        _by_type.pop(replaced.array_type, None)


def register_array_type(backend: Backend) -> None:
    """Make ``backend.array_type`` an array that layers run on, but not a backend to choose (see `npnet.dual`)."""
    _by_type[backend.array_type] = backend


def on_load(call: Callable[[Backend], None]) -> None:
    """Have ``call(backend)`` made for each backend that is loaded from now on."""
    _on_load.append(call)


def get_backend(name: str | None = None) -> Backend:
    """The backend called ``name``; without a name the current one.

    Raises:
        ValueError: no backend has that name.
        BackendUnavailable: it needs a package, a driver or a device that is not there.
    """
    source = ""
    if name is None:
        name = _current
    if name is None:
        name = os.environ.get("NPNET_BACKEND") or "numpy"
        source = " (chosen by the environment variable NPNET_BACKEND)"
    if not isinstance(name, str) or name not in _loaders:
        raise ValueError(
            f"unknown backend {reprlib.repr(name)}{source}; choose one of {', '.join(map(repr, _loaders))}"
        )
    if name not in _loaded:
        try:
            backend = _loaders[name]()
        except BackendUnavailable as error:
            raise BackendUnavailable(f"{error}{source}") from error.__cause__
        if not isinstance(backend, Backend):
            raise TypeError(f"backend {name!r}: its load() must return a Backend, got {type(backend).__name__}")
        for call in _on_load:
            call(backend)
        backend = _loaded.setdefault(name, backend)  # the first, where two threads have loaded it at once
        _by_type[backend.array_type] = backend
    return _loaded[name]


class use_backend:  # noqa: N801 - used as a function
    """Choose where new arrays live: ``use_backend("cupy")``, or for a while ``with use_backend("cupy"): ...``.

    The choice is the whole process's, for all threads: where these need different backends, or choose while others
    work, let each pass ``backend=`` to what it makes.

    Raises:
        ValueError, BackendUnavailable: as `get_backend`; the choice made before stays.
    """

    def __init__(self, name: str) -> None:
        global _current
        self.backend = get_backend(name)
        self._previous = _current
        _current = name

    def __enter__(self) -> Backend:
        return self.backend

    def __exit__(self, *_: object) -> None:
        global _current
        _current = self._previous


def available_backends() -> tuple[str, ...]:
    """The names of the backends that would work here, now.

    >>> "numpy" in available_backends()
    True
    """
    names = []
    for name in tuple(_loaders):
        try:
            get_backend(name)
        except BackendUnavailable:
            continue
        names.append(name)
    return tuple(names)


def backend_of(x: Any) -> Backend:
    """The backend whose array ``x`` is.

    Raises:
        TypeError: ``x`` is not an array of any backend.
    """
    backend = _by_type.get(type(x))
    if backend is not None:
        return backend
    for array_type, backend in tuple(_by_type.items()):  # another thread may load a backend meanwhile
        if isinstance(x, array_type):  # np.memmap and other subclasses
            if isinstance(x, (np.matrix, np.ma.MaskedArray)):  # whose arithmetic is another
                raise TypeError(
                    f"expected a plain array, got a {type(x).__name__}; convert with numpy.asarray or .filled"
                )
            return backend
    raise TypeError(f"expected an array of {', '.join(map(repr, _loaded))}, got {type(x).__name__}")


def array_module(x: Any) -> Any:
    """The module (``numpy``, ``cupy``) whose functions work on ``x``.

    >>> array_module(np.zeros(3)).__name__
    'numpy'
    """
    try:
        return _by_type[type(x)].xp  # looked up here, too: layers ask this a hundred times a step
    except KeyError:
        return backend_of(x).xp


def to_backend(x: Any, name: str | None = None) -> Array:
    """``x`` as an array of the backend ``name`` (the current one by default); copied only where it must be."""
    target = get_backend(name)
    moved: Any = x if isinstance(x, target.array_type) else target.xp.asarray(to_host(x))
    return cast(Array, moved)


def to_host(x: Any) -> Array:
    """``x`` as a NumPy array; from a GPU this waits for the device and copies."""
    if isinstance(x, np.ndarray):
        return x
    try:
        backend = backend_of(x)
    except TypeError:  # numbers, lists, whatever NumPy makes an array of
        try:
            return np.asarray(x)
        except ValueError:
            raise TypeError(f"expected an array, got a ragged {type(x).__name__}") from None
    return backend.to_host(x)


def dot(x: Array, y: Array) -> Any:
    """The product of two vectors that lie in one piece, an array without axes.

    CuPy's own function makes an array of their length first; cuBLAS does not, and knows single and double precision.
    """
    if isinstance(x, np.ndarray):
        return np.dot(x, y)
    xp = array_module(x)
    cublas = hasattr(xp, "cuda") and x.dtype.char in "fd"
    return (importlib.import_module("cupy.cublas") if cublas else xp).dot(x, y)


def along_rows(*arrays: Array) -> tuple[Array, ...]:
    """Arrays of one layout, transposed where a GPU goes through them faster so. (NumPy finds the way itself.)"""
    first = arrays[0]
    if isinstance(first, np.ndarray) or not (hasattr(array_module(first), "cuda") and first.flags.f_contiguous):
        return arrays
    return tuple(array.T for array in arrays)


@functools.lru_cache(maxsize=64)
def scalar(xp: Any, value: float, dtype: np.dtype[Any]) -> Any:
    """``value`` as the operand that ``xp`` combines fastest with an array: NumPy saves a third on thin layers."""
    return _read_only(np.asarray(value, dtype)) if xp is np else value


@functools.lru_cache(maxsize=8)
def ones(xp: Any, length: int, dtype: np.dtype[Any]) -> Array:
    """A vector of ones, (length,), shared: on thin layers ``ones @ dz`` takes a third of ``dz.sum(axis=0)``."""
    return _read_only(xp.ones(length, dtype)) if xp is np else xp.ones(length, dtype)


def _read_only(array: Array) -> Array:
    """The array, shared by all callers in all threads from now on."""
    array.flags.writeable = False
    return array


get_backend("numpy")
