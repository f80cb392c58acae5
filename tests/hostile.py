"""Hostile arguments for `tests.test_fuzz_api`: values of every kind, and arrays in every shape, dtype and layout."""

import math
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

# Values.


class Index:
    """An object with the method ``__index__``, whatever that gives."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __index__(self) -> Any:
        return self.answer


class Mine(np.ndarray):
    """A subclass that changes nothing."""


SMALL = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2.5, -0.5, 1e300, 5e-324, math.nan, math.inf, -math.inf, 3 + 4j),
        *(
            "",
            "abc",
            "7",
            "sqrt",
            "optimal",
            "\0",
            b"x",
            bytearray(b"xy"),
            ...,
            NotImplemented,
            object(),
        ),
        *(
            np.int64(3),
            np.float32(2.5),
            np.bool_(True),
            np.float64("nan"),
            np.datetime64("2020-01-01"),
            np.str_("none"),
        ),
        *(Index(2), Index(-1), Index("2"), Index(None), Index(True), slice(2), range(3), memoryview(b"abc")),
        *(lambda *_: None, lambda *_: "abc", lambda *_: np.ones((2, 2))),
    ]
)
HUGE = st.sampled_from([10**12, 2**63, -(2**63), 10**30, 10**400, 10**4000, 1e15, np.uint64(2**64 - 1), Index(10**30)])
CONTAINERS = st.sampled_from(
    [
        *(
            [],
            [1],
            [1, 2],
            [[1, 2], [3]],
            [None],
            [[]],
            ["a", "b"],
            (),
            (1,),
            (1, 2),
            (1, 2, 3),
            (None, None),
            [3, 2.0],
        ),
        *({}, {1}, {"a": 1}, {1: "a"}, set(), frozenset({2}), [("forward", 1)], [("forward", 1, 2)], [(1, "forward")]),
        *({"0.weight": None}, [np.ones(3), np.ones(2)], (np.ones((2, 3)), np.ones((2, 2)))),
    ]
)


# Arrays.


def _strided(array: Any) -> Any:
    wide = np.empty([2 * n for n in array.shape], array.dtype)
    view = wide[(..., *(slice(None, None, 2),) * array.ndim)]
    view[...] = array
    return view


def _far_apart(array: Any) -> Any:
    """Elements of the last axis 64 kB apart."""
    step = max(65536 // array.itemsize, 1)
    if not array.ndim or not array.shape[-1]:
        return array.copy()
    view = np.zeros((*array.shape[:-1], (array.shape[-1] - 1) * step + 1), array.dtype)[..., ::step]
    view[...] = array
    return view


def _backwards(array: Any) -> Any:
    turned = (..., *(slice(None, None, -1),) * array.ndim)
    return array[turned].copy()[turned]


def _matrix(array: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy says that nobody should
        return np.asmatrix(array.copy()) if array.ndim == 2 else array


def _locked(array: Any) -> Any:
    array = np.array(array)
    array.flags.writeable = False
    return array


def _mapped(array: Any) -> Any:
    if not array.size or array.dtype.hasobject:
        return array.copy()
    with tempfile.TemporaryFile() as file:
        file.write(array.tobytes())
        file.flush()
        return np.memmap(file, array.dtype, "r", shape=array.shape)


def _unaligned(array: Any) -> Any:
    if array.dtype.hasobject:
        return array.copy()
    shifted = np.ndarray(array.shape, array.dtype, bytearray(array.nbytes + 1), 1)
    shifted[...] = array
    return shifted


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "C": lambda array: array.copy(order="C"),
    "Fortran": lambda array: array.copy(order="F"),
    "strided": _strided,
    "far apart": _far_apart,
    "backwards": _backwards,
    "read-only": _locked,
    "memory-mapped": _mapped,
    "unaligned": _unaligned,
    "broadcast": lambda array: np.broadcast_to(array[:1], array.shape) if array.ndim else array,
    "subclass": lambda array: array.copy().view(Mine),
    "matrix": _matrix,
    "masked": lambda array: np.ma.masked_array(array.copy(), np.arange(array.size).reshape(array.shape) % 3 == 1),
}
SHAPES: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda array: array,
    "transposed": lambda array: array.T,
    "no rows": lambda array: array[:0],
    "no columns": lambda array: array[..., :0],
    "a row": lambda array: array[0] if array.ndim else array,
    "a row more": lambda array: np.concatenate([array, array[:1]]) if array.ndim else array,
    "fewer columns": lambda array: array[..., :-1] if array.ndim else array,
    "one column": lambda array: array[..., :1] if array.ndim else array,
    "one row": lambda array: array[:1] if array.ndim else array,
    "another axis": lambda array: array[None],
    "an axis last": lambda array: array[..., None],
    "flat": lambda array: array.ravel(),
    "a number": lambda array: array.ravel()[0:1].reshape(()) if array.size else np.array(0.0),
}
RECORD = np.dtype([("a", "f4"), ("b", "i2")])
KINDS = ["same"] * 6 + ["f2", "f4", "f8", "g", ">f4", ">f8", "i8", "u1", "i1", "?", "c8", "c16", "O", "U4", "S4"]
KINDS += ["M8[s]", "m8[s]", RECORD]
SPOILS = [None] * 6 + [math.nan, math.inf, -math.inf, 1e30, -1e300, 0.0, -3.0]


@st.composite
def arrays_like(draw: Any, array: Any) -> Any:
    """Arrays that resemble ``array``: one or more of its layout, shape, dtype and numbers are not as they were."""
    array = SHAPES[draw(st.sampled_from(["as it is"] * 6 + list(SHAPES)))](np.asarray(array))
    kind, spoil = draw(st.sampled_from(KINDS)), draw(st.sampled_from(SPOILS))
    if spoil is not None and array.size:
        array = array.copy()
        with np.errstate(all="ignore"):
            array.flat[draw(st.integers(0, array.size - 1))] = spoil if array.dtype.kind == "f" else 99
    if kind != "same":
        array = np.zeros(array.shape, RECORD) if kind is RECORD else _cast(array, kind)
    return LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](array)


def _cast(array: Any, kind: str) -> Any:
    with np.errstate(all="ignore"):
        if kind[0] in "Mm":
            array = np.nan_to_num(array).astype("i8")
        cast = array.astype(kind)
    if kind == "O" and cast.size:
        cast.flat[-1] = None
    return cast


def hostile(good: Any, huge: bool = True) -> st.SearchStrategy[Any]:
    """Values to put in the place of ``good``; without ``huge`` no number so large that it would take for ever."""
    anything = SMALL | CONTAINERS | arrays_like(np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3))
    if huge:
        anything |= HUGE
    if isinstance(good, np.ndarray):
        near = arrays_like(good)
        return near | near | near | near | anything
    if isinstance(good, (tuple, list)) and good and all(isinstance(each, np.ndarray) for each in good):
        near = st.tuples(*(arrays_like(each) | st.just(each) for each in good)).map(type(good))
        return near | near | near | anything
    if isinstance(good, dict) and good:
        (name, value), *rest = good.items()
        near = hostile(value, huge).map(lambda bad: {name: bad, **dict(rest)})
        return near | near | anything | st.just(dict(rest)) | st.just({**good, "more": value})
    return anything
