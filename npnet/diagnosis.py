"""What is wrong with an array, in words: for the tests in the labs (`npnet.labs`).

A wrong answer is seldom any array: it is the transpose of the right one, or 64 times it. Such reasons are looked for
before it is said that numbers differ.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Mistakes = Mapping[str, Any]
"""What is wrong, in words -> the result that this gives."""


def why_wrong(
    got: Any,
    right: Any,
    exact: bool = False,
    batch: int | None = None,
    mistakes: Mistakes | None = None,
    tolerance: float = 1e-8,
) -> str:
    """Why ``got`` is not the array ``right``, in a sentence; nothing if it is. See `npnet.labs.check_array`."""
    reason = _wrong_kind(got, right) or _wrong_shape(got, right, batch)
    return reason or _wrong_numbers(got, right, exact, tolerance, batch, mistakes or {})


def kind_of(value: Any) -> str:
    """What kind of thing a student handed over."""
    if value is None:
        return "None (is there a `return`?)"
    return f"{type(value).__name__}" + (f" of shape {value.shape}" if isinstance(value, np.ndarray) else "")


def why_idle(got: Any, like: Any) -> str:
    """Why ``got`` is the answer of a function that computes nothing, in a sentence; nothing if it computes something.

    Whether it is right is not asked: only that arrays, numbers and lists stand where they do in ``like``, and that none
    of them is nothing but zeros.
    """
    if isinstance(like, (list, tuple)):
        if not isinstance(got, (list, tuple)):
            return f"expected {len(like)} things, got {kind_of(got)}"
        if len(got) < len(like):
            return f"expected {len(like)} things, got {len(got)}"
        pairs = zip(got[: len(like)], like, strict=True)
        inside = (f"None stands in the place of {_a(b)}" if a is None else why_idle(a, b) for a, b in pairs)
        return next(filter(None, inside), "")
    number = isinstance(got, (int, float, np.generic)) or (isinstance(got, np.ndarray) and got.ndim == 0)
    if not (isinstance(got, np.ndarray) if isinstance(like, np.ndarray) else number):
        return f"expected {_a(like)}, got {kind_of(got)}"
    return "" if np.any(got) else "all its numbers are 0"


def _a(like: Any) -> str:
    return "an array" if isinstance(like, np.ndarray) else "a list" if isinstance(like, (list, tuple)) else "a number"


def _wrong_kind(got: Any, right: Any) -> str:
    if not isinstance(got, (np.ndarray, np.generic)):
        return f"expected an array of shape {right.shape}, got {kind_of(got)}"
    if got.dtype.kind not in "biufc":
        return f"expected an array of numbers, got one of dtype {got.dtype}"
    if got.dtype != right.dtype and got.dtype.kind == right.dtype.kind == "f":
        return f"its dtype is {got.dtype}, expected {right.dtype}"
    return ""


def _wrong_shape(got: Any, right: Any, batch: int | None) -> str:
    if got.shape == right.shape:
        return ""
    shapes = f"its shape is {got.shape}, expected {right.shape}"
    if got.shape == right.shape[::-1] and got.ndim == 2:
        return f"{shapes}: it is the transpose of the right one" if same(got.T, right) else f"{shapes}, the transpose"
    if got.size == right.size:
        return f"{shapes}: an axis of length 1 was lost, or is too much (keepdims=True keeps it)"
    if batch and batch in got.shape and batch not in right.shape:
        return f"{shapes}: the batch axis ({batch}) is still there; sum over it"
    return shapes


def _wrong_numbers(got: Any, right: Any, exact: bool, tolerance: float, batch: int | None, mistakes: Mistakes) -> str:
    if np.array_equal(got, right, equal_nan=bool(right.dtype.kind in "fc")):
        return ""
    finite = np.isfinite(got)
    if not finite.all() and np.isfinite(right).all():
        return f"{int((~finite).sum())} of its {got.size} numbers are not finite (NaN or infinite)"
    if same(got, right, tolerance):
        if not exact:
            return ""
        return (
            f"right up to rounding (largest difference {np.abs(got - right).max():.1e}), but not bit for bit: the same "
            "operations on the same numbers, in the same order, give the same bits"
        )
    for words, wrong in mistakes.items():
        if np.shape(wrong) == got.shape and same(got, wrong):
            return words
    return _known_mistake(got, right, batch) or _where(got, right, tolerance)


def _known_mistake(got: Any, right: Any, batch: int | None) -> str:
    if not got.any():
        return "all its numbers are 0"
    if got.ndim == 2 and got.shape[0] == got.shape[1] and same(got.T, right):
        return "it is the transpose of the right one"
    ratio = float(np.vdot(right, got).real / (np.vdot(right, right).real or 1.0))
    if ratio and same(got, ratio * right):
        return _factor(ratio, batch)
    for axis in range(got.ndim):
        if same(np.flip(got, axis), right):
            return f"it is in reverse order along axis {axis}"
    offset = (got - right).mean() if right.size > 1 else 0.0
    if offset and same(got, right + offset):
        return f"it is the right one plus {offset:.4g}, everywhere"
    return ""


def _factor(ratio: float, batch: int | None) -> str:
    if abs(ratio + 1) < 1e-6:
        return "it has the wrong sign: it is -1 times the right one"
    told = f"it is {told_factor(ratio) or f'{ratio:.4g} times'} the right one"
    if batch and abs(ratio - batch) < 1e-6 * batch:
        return f"{told}: did you take the sum where the mean is asked (batch {batch})?"
    if batch and abs(ratio * batch - 1) < 1e-6:
        return f"{told}: did you take the mean where the sum is asked (batch {batch})?"
    return told


def told_factor(ratio: float) -> str:
    """A factor that is a whole number, or one over one, in words."""
    for value, form in ((ratio, "{} times"), (1 / ratio, "1/{} times")):
        if abs(value - round(value)) < 1e-6 * abs(value) and 1 < abs(round(value)) < 10**6:
            return form.format(round(value))
    return ""


def _where(got: Any, right: Any, tolerance: float) -> str:
    wrong = np.abs(got - right) > tolerance * np.abs(right).max(initial=0.0)
    index = tuple(int(i) for i in np.argwhere(wrong)[0])
    place = f"at {list(index)} it is {got[index]:.6g}, expected {right[index]:.6g}" if index else f"it is {got:.6g}"
    return f"{int(wrong.sum())} of its {got.size} numbers are wrong; {place}"


def same(got: Any, right: Any, tolerance: float = 1e-8) -> bool:
    """The same shape, and the same numbers up to rounding, relative to the largest."""
    if np.shape(got) != np.shape(right):
        return False
    most = float(np.abs(right).max(initial=0.0))
    return bool(np.abs(np.subtract(got, right)).max(initial=0.0) <= tolerance * most)


def same_all(got: Sequence[Any], right: Sequence[Any]) -> bool:
    """Lists of the same arrays, up to rounding."""
    arrays = all(isinstance(array, np.ndarray) and array.dtype.kind in "biufc" for array in got)
    return arrays and len(got) == len(right) and all(map(same, got, right))
