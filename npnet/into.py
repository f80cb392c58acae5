"""What NumPy's functions do, into an array that is there: the last argument of each (see `npnet.tracing`)."""

from collections.abc import Callable
from typing import Any

import numpy as np

from npnet import blocks
from npnet.backend import Array

WITH_OUT: dict[np.ufunc, Callable[..., Any]] = {
    np.maximum: lambda x, y, out: np.maximum(x, y, out=out),
    np.minimum: lambda x, y, out: np.minimum(x, y, out=out),
}
"""In place of those that NumPy no longer gives a positional ``out``."""


def copy(x: Array, out: Array) -> None:
    """``x``, in the dtype of ``out``."""
    np.copyto(out, x, casting="unsafe")


def einsum(subscripts: str, x: Array, y: Array, out: Array) -> None:
    """Any product of two."""
    np.einsum(subscripts, x, y, out=out)


def erf(x: Array, out: Array) -> None:
    """The error function."""
    out[...] = blocks.erf(x)


def draw(key: int, p: float, out: Array) -> None:
    """The mask of dropout, in the step under way."""
    out[...] = blocks.keep_mask(out, key, p)
