"""Checks of what people pass in: each says what was wrong, what was expected, and what to do."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from npnet.backend import Array, Backend, array_module, backend_of


def check_whole(value: Any, name: str, least: int = 0) -> int:
    """``value`` as an int.

    Raises:
        TypeError: not a whole number.
        ValueError: below ``least``.

    >>> check_whole(np.int64(3), "epochs")
    3
    """
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected a whole number, at least {least}, got {value!r}")
    try:
        number = int(value.__index__())
    except TypeError:  # an array of several numbers has the method, too
        raise TypeError(f"{name}: expected a whole number, at least {least}, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name}: expected a whole number, at least {least}, got {number}")
    return number


def check_number(value: Any, name: str, least: float = 0.0, below: float = math.inf) -> float:
    """``value`` as a float.

    Raises:
        TypeError: not a number.
        ValueError: not finite, below ``least``, or not below ``below``.
    """
    limit = f"a finite number, at least {least:g}" + (f" and below {below:g}" if below < math.inf else "")
    try:
        number = float(value if not isinstance(value, str) else "")
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected {limit}, got {value!r}") from None
    except OverflowError:  # an int beyond every float
        number = math.inf
    if not (math.isfinite(number) and least <= number < below):
        raise ValueError(f"{name}: expected {limit}, got {value!r}")
    return number


def check_float(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """``dtype`` as a NumPy dtype.

    Raises:
        TypeError: it is not a floating-point type.
    """
    try:
        checked = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype: expected a floating-point type such as numpy.float32, got {dtype!r}") from None
    if checked.kind != "f":
        raise TypeError(f"dtype: expected a floating-point type such as numpy.float32, got {checked}")
    return checked


def check_sizes(sizes: Sequence[int]) -> list[int]:
    """Layer sizes as a list of ints.

    Raises:
        TypeError: not a sequence of whole numbers.
        ValueError: fewer than two, or one that is not positive.
    """
    example = "expected the sizes of at least two layers, input first, such as [784, 30, 10]"
    try:
        given = list(sizes)
    except TypeError:
        raise TypeError(f"sizes: {example}; got {sizes!r}") from None
    if len(given) < 2:
        raise ValueError(f"sizes: {example}; got {given!r}")
    return [check_whole(size, f"sizes[{i}]", least=1) for i, size in enumerate(given)]


def check_array(array: Any, backend: Backend, dtype: np.dtype[Any], name: str) -> Array:
    """``array`` with ``dtype`` on ``backend``: itself where it fits, never moved between devices.

    Raises:
        TypeError: it lives on another backend, or does not hold real numbers.
    """
    if not isinstance(array, backend.array_type):
        try:
            other = backend_of(array).name
        except TypeError:
            other = "the host"
        if backend.xp is not np or other != "the host":
            raise TypeError(
                f"{name}: expected an array on backend {backend.name!r}, got {type(array).__name__} on {other}; "
                f"move it with npnet.to_backend(array, {backend.name!r})"
            )
        try:
            array = np.asarray(array)
        except ValueError as error:
            raise TypeError(f"{name}: expected an array of numbers, got a ragged {type(array).__name__}") from error
    if array.dtype != dtype:
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
        with np.errstate(over="ignore"):  # what becomes infinite is found where infinities are refused
            array = array.astype(dtype)
    checked: Array = array
    return checked


def check_list(values: Any, length: int, name: str) -> list[Any]:
    """``values`` as a list.

    Raises:
        TypeError: they are no sequence.
        ValueError: they are not ``length`` many.
    """
    try:
        given = list(values)
    except TypeError:
        raise TypeError(f"{name}: expected a list of {length} arrays, got {type(values).__name__}") from None
    if len(given) != length:
        raise ValueError(f"{name}: expected a list of {length} arrays, got {len(given)}")
    return given


def check_rows(array: Array, features: int, name: str, labels: bool = False) -> None:
    """Refuse all but rows, (samples, features), at least one; ``labels`` says that one-hot rows may be meant.

    Raises:
        ValueError: it has another shape.
    """
    if array.ndim != 2 or array.shape[1] != features or not len(array):
        hint = "; class numbers become rows with npnet.one_hot(labels, classes)" if labels and array.ndim == 1 else ""
        raise ValueError(f"{name}: expected rows of shape (samples, {features}), got {array.shape}{hint}")


def check_pairs(x: Array, y: Array, name: str = "") -> None:
    """Refuse x and y that do not have one row each per sample.

    Raises:
        ValueError: their lengths differ.
    """
    if len(x) != len(y):
        raise ValueError(f"{name}x and y must have a row per sample each, got {len(x)} and {len(y)} rows")


def check_no_nan(array: Array, name: str) -> None:
    """Refuse infinities and NaNs, saying where the first one is.

    Raises:
        ValueError: there is one.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if array.dtype.kind != "f" or math.isfinite(float(array.sum())):  # no finite sum has a term that is not
            return
    xp = array_module(array)
    for start in range(0, len(array), 4096):  # by blocks: the mask of a data set is a data set
        bad = xp.argwhere(~xp.isfinite(array[start : start + 4096]))
        if len(bad):
            row, *rest = (int(i) for i in bad[0])
            where = ", ".join(map(str, (start + row, *rest)))
            raise ValueError(
                f"{name}: the value at [{where}] is {float(array[(start + row, *rest)])}, expected finite numbers; "
                "drop such rows or fill them in"
            )


def is_finite(array: Array) -> bool:
    """Whether no number is infinite or NaN."""
    return bool(array_module(array).isfinite(array).all())


def check_one_hot(y: Array, name: str) -> None:
    """Refuse rows that are not all zeros but for a single one.

    Raises:
        ValueError: some row is not.
    """
    wrong = ((y != 0).sum(axis=1) != 1) | (y.max(axis=1) != 1)
    if bool(wrong.any()):
        row = int(wrong.argmax())
        raise ValueError(
            f"{name}: expected one-hot rows, a single 1 each among zeros, but row {row} is {y[row]}; "
            "class numbers become such rows with npnet.one_hot(labels, classes)"
        )
