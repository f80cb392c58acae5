"""What pictures refuse, and in which words."""

import reprlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from npnet.checks import with_article

T = TypeVar("T")


def check_type(value: Any, expected: type[T], name: str, hint: str) -> T:
    """``value``, if it is an ``expected``; else TypeError, where ``hint`` says how to get one."""
    if not isinstance(value, expected):
        raise TypeError(f"{name}: expected {with_article(expected)} ({hint}), got {type(value).__name__}")
    return value


def one_each(values: Any, count: int, name: str) -> list[Any]:
    """``values`` as a list of ``count``."""
    if not isinstance(values, Iterable) or (isinstance(values, np.ndarray) and not values.ndim):
        raise ValueError(f"{name}: expected a list of {count}, one for each, got {type(values).__name__}")
    if len(given := list(values)) != count:
        raise ValueError(f"{name}: expected a list of {count}, one for each, got {len(given)}")
    return given


def named(values: Any, name: str) -> Mapping[str, Any]:
    """``values``, if they are a mapping from texts, with something to draw."""
    if not isinstance(values, Mapping) or not all(isinstance(each, str) for each in values):
        raise TypeError(f"{name}: expected numbers by name, such as {{'plain': 1.0}}, got {reprlib.repr(values)}")
    if not values:
        raise ValueError(f"{name}: expected at least one, by name, such as {{'plain': 1.0}}, got none")
    return values


def finite_numbers(
    values: Any, shape: tuple[int, ...], expected: str, name: str = "measured"
) -> npt.NDArray[np.float64]:
    """``values`` as finite numbers of this shape, where -1 stands for any length."""
    with suppress(TypeError, ValueError):
        array = np.asarray(values)
        fits = array.dtype.kind in "fiub" and array.ndim == len(shape) and array.shape[1:] == shape[1:]
        if (fits or array.shape == (0,)) and np.isfinite(array).all():
            return array.astype(np.float64).reshape(shape)
    raise ValueError(f"{name}: expected {expected}, got {reprlib.repr(values)}")
