"""Checks of what people pass in: each says what was wrong, what was expected, and what to do."""

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from npnet.backend import Array, Backend, array_module, backend_of

T = TypeVar("T")


def shown(value: Any) -> str:
    """``value`` for a message: cut where it is long, and there even if it cannot be printed."""
    try:
        text = repr(value)
    except Exception:  # a whole number of more digits than Python prints, say
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_kind(value: Any, kind: type[T], name: str, example: str) -> T:
    """``value``, if it is a ``kind``.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name}: expected {article} {kind.__name__}, such as {example}, got {shown(value)}")
    return value


def check_mapping(value: Any, name: str, example: str) -> Mapping[Any, Any]:
    """``value``, if it is a mapping; raises as `check_kind`."""
    return check_kind(value, Mapping, name, example)  # type: ignore[type-abstract]


def check_callable(value: Any, name: str) -> None:
    """Refuse what cannot be called.

    Raises:
        TypeError: it cannot.
    """
    if not callable(value):
        raise TypeError(f"{name}: expected a function, got {shown(value)}")


def check_flag(value: Any, name: str) -> bool:
    """``value`` as a bool.

    Raises:
        TypeError: neither True nor False (nor 1 or 0).
    """
    if value is True or value is False:
        return value
    if not isinstance(value, np.bool_) and not (type(value) is int and value in (0, 1)):
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")
    return bool(value)


def check_whole(value: Any, name: str, least: int = 0, most: float = 2**63 - 1) -> int:
    """``value`` as an int.

    Raises:
        TypeError: not a whole number.
        ValueError: below ``least``, or above ``most`` (by default what an array can be long).

    >>> check_whole(np.int64(3), "epochs")
    3
    """
    if type(value) is int and least <= value <= most:
        return value  # the usual case: training steps check numbers, too
    try:
        number = None if isinstance(value, (bool, np.bool_)) else value.__index__()
    except (AttributeError, TypeError):  # an array of several numbers has the method, too
        number = None
    if not isinstance(number, int):
        raise TypeError(f"{name}: expected a whole number, at least {least}, got {shown(value)}")
    if number < least:
        raise ValueError(f"{name}: expected a whole number, at least {least}, got {shown(number)}")
    if number > most:
        raise ValueError(f"{name}: expected a whole number, at most {most}, got {shown(number)}")
    return int(number)


def check_number(value: Any, name: str, least: float = 0.0, below: float = math.inf) -> float:
    """``value`` as a float.

    Raises:
        TypeError: not a number.
        ValueError: not finite, below ``least``, or not below ``below``.
    """
    if type(value) is float and least <= value < below and value > -math.inf:
        return value  # the usual case, as above
    limit = "a finite number" + (f", at least {least:g}" if least > -math.inf else "")
    limit += f" and below {below:g}" if below < math.inf else ""
    kind, axes = getattr(getattr(value, "dtype", None), "kind", "f"), getattr(value, "ndim", None)
    if kind not in "fiub" or axes or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected {limit}, got {shown(value)}")
    try:
        number = float(value) if hasattr(value, "__float__") else None
    except (TypeError, ValueError):
        number = None
    except OverflowError:  # an int beyond every float
        number = math.inf
    if number is None:
        raise TypeError(f"{name}: expected {limit}, got {shown(value)}")
    if not (math.isfinite(number) and least <= number < below):
        raise ValueError(f"{name}: expected {limit}, got {shown(value)}")
    return number


def check_float(dtype: npt.DTypeLike, kinds: str = "f") -> np.dtype[Any]:
    """``dtype`` as a NumPy dtype.

    Raises:
        TypeError: it is not a floating-point type (or, with ``kinds`` "fiub", not one of real numbers).
    """
    expected = f"dtype: expected a {'floating-point type' if kinds == 'f' else 'type of numbers'} such as numpy.float32"
    try:
        checked = np.dtype(dtype)
    except Exception:  # NumPy reads texts, tuples and dictionaries, too, and fails in as many ways
        raise TypeError(f"{expected}, got {shown(dtype)}") from None
    if checked.kind not in kinds:
        raise TypeError(f"{expected}, got {checked}")
    return checked


def check_room(numbers: int, name: str) -> None:
    """Refuse to make an array of so many ``numbers``, 8 bytes each, if it is larger than the machine's memory.

    Raises:
        ValueError: it is.
    """
    if numbers > 2**27:  # a gigabyte; below, psutil need not be loaded
        import psutil

        total = psutil.virtual_memory().total
        if 8 * numbers > total:
            raise ValueError(f"{name}: {8 * numbers:.3g} bytes are more than this machine's memory, {total:.3g}")


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
        raise TypeError(f"sizes: {example}; got {shown(sizes)}") from None
    if len(given) < 2:
        raise ValueError(f"sizes: {example}; got {shown(given)}")
    return [check_whole(size, f"sizes[{i}]", least=1) for i, size in enumerate(given)]


def check_array(array: Any, backend: Backend, dtype: np.dtype[Any], name: str) -> Array:
    """``array`` with ``dtype`` on ``backend``: itself where it fits, never moved between devices.

    Raises:
        TypeError: it lives on another backend, or does not hold real numbers.
    """
    if type(array) is backend.array_type and array.dtype == dtype:  # type: ignore[attr-defined]
        return array  # type: ignore[return-value] # the usual case: a training step asks this, too
    if array is None:
        raise TypeError(f"{name}: expected real numbers, got None")
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
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an array of numbers, got a masked one; put numbers in its gaps (filled)")
    if isinstance(array, np.ndarray):
        array = np.asarray(array)  # of a matrix, whose product is another, the array
    if array.dtype != dtype:
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
        with np.errstate(over="ignore"):  # what becomes infinite is found where infinities are refused
            array = array.astype(dtype)
    return array


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


def check_rows(array: Array, features: int, name: str, labels: bool = False, classes: bool | None = None) -> None:
    """Refuse all but rows, (samples, features), at least one.

    Args:
        labels: targets are meant; a message says how a number for each sample becomes a row.
        classes: those are of classes, or are numbers (None: either).

    Raises:
        ValueError: it has another shape.
    """
    if array.ndim != 2 or array.shape[1] != features or not len(array):
        hint = rows_hint(array, features, classes) if labels else ""
        raise ValueError(f"{name}: expected rows of shape (samples, {features}), got {array.shape}{hint}")


def rows_hint(y: Array, features: int, classes: bool | None = None) -> str:
    """How targets of shape (samples,) become rows, for a message: see `check_rows`."""
    if y.ndim != 1:
        return ""
    one_hot = "; class numbers become rows with npnet.one_hot(labels, classes)"
    column = "; targets, one a sample, become a column with y.reshape(-1, 1)"
    if features > 1:
        column += ", for a network with one output"
        whole = y.dtype.kind in "iub" or (y.dtype.kind == "f" and bool((y == y.round()).all()))
        return one_hot if classes else (one_hot + column if classes is None and whole else column)
    return f"{one_hot}, for a network with an output for each" if classes else column


def as_array(value: Any, name: str) -> Array:
    """``value``, if it is an array; as one of NumPy's, if it is a table (a DataFrame, a Series).

    Raises:
        TypeError: it is neither.
    """
    try:
        backend_of(value)
    except TypeError as error:
        if isinstance(value, np.ndarray) or not hasattr(value, "__array__"):
            raise TypeError(f"{name}: {error}") from None
        return np.asarray(value)
    return value


def warn_caller(text: str) -> None:
    """Warn, at the line outside npnet that called."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "npnet":
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)


def check_pairs(x: Array, y: Array, name: str = "") -> None:
    """Refuse x and y that do not have one row each per sample.

    Raises:
        ValueError: their lengths differ.
    """
    try:
        rows = len(x), len(y)
    except TypeError:  # no dimensions, or no array
        raise TypeError(f"{name}expected rows of x and y, got {shown(x)} and {shown(y)}") from None
    if rows[0] != rows[1]:
        raise ValueError(f"{name}x and y must have a row per sample each, got {rows[0]} and {rows[1]} rows")


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


def all_finite(arrays: Iterable[Array]) -> bool:
    """Whether no number of any of the arrays is infinite or NaN; none may be empty. On a device this waits once, and
    makes no array of their size.
    """
    finite: Any = True
    for array in arrays:
        xp, flat = array_module(array), array.ravel(order="K")  # CuPy copies what is not in C order, to reduce it
        for extreme in (flat.min(), flat.max()):  # NaN is both
            finite = xp.isfinite(extreme) & finite
    return bool(finite)


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
