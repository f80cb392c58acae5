"""What a layer holds: parameters, which are trained by their gradients, and buffers, which a step changes directly."""

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from npnet.backend import Array, along_rows, array_module, backend_of
from npnet.checks import check_callable
from npnet.random import in_step, updates_of_step

NAMES_ELSEWHERE = {
    "grad": "gradient",
    "data": "value",
    "requires_grad": None,
    "trainable": None,
}
"""What a parameter's attributes are called elsewhere -> in npnet; None: npnet has no such thing."""


def _elsewhere(name: str) -> property:
    """An attribute of another library's parameters: using it is an error that says ours."""
    ours = NAMES_ELSEWHERE[name]
    what = f"it is called {ours}" if ours else "every parameter is trained; npnet cannot freeze one yet"

    def refuse(self: "Parameter", *_: Any) -> NoReturn:
        raise AttributeError(f"a Parameter has no {name}: {what}")

    return property(refuse, refuse)


class Parameter:
    """An array that is trained, and its gradient (None until a backward pass adds one).

    A parameter may stand in several places of a model: its gradient is then the sum over all places.

    ``lent`` says that somebody outside holds the array: the next update then goes to a fresh copy, so that
    an array once handed out is never changed by training.
    """

    __slots__ = ("gradient", "lent", "value")

    def __init__(self, value: Array) -> None:
        self.value = value
        self.gradient: Array | None = None
        self.lent = False

    def accumulate(self, gradient: Array) -> None:
        """Add to the gradient. The first array is stored without copying; the caller must not reuse it."""
        if self.gradient is None:
            self.gradient = gradient
        else:
            mine, more = along_rows(self.gradient, gradient)
            mine += more

    def take_gradient(self) -> Array:
        """The gradient, which from then on is no longer the parameter's."""
        gradient, self.gradient = self.gradient, None
        if gradient is None:
            raise ValueError("Parameter.take_gradient: no backward pass has added a gradient")
        return gradient

    def writable(self) -> Array:
        """The array that an update may overwrite (in the layout that products like best)."""
        if self.lent:
            self.value = self.value.copy(order="F")
            self.lent = False
        return self.value

    grad, data, requires_grad, trainable = map(_elsewhere, NAMES_ELSEWHERE)


class Buffer:
    """An array that training changes without a gradient: a running mean, a counter (PyTorch's word for it).

    A layer keeps it as an attribute, beside its parameters: it is saved, loaded and copied with them, and is equal on
    all ranks. A layer reads ``value`` and changes it by `update`, in `forward`:

        self.mean = Buffer(np.zeros(features))
        ...
        if self.training:
            self.mean.update(lambda mean: 0.9 * mean + 0.1 * x.mean(axis=0))

    Args:
        value: an array, or a number, of any real dtype, which it keeps.

    Raises:
        TypeError: it is not an array of real numbers.
    """

    __slots__ = ("value",)

    def __init__(self, value: Array | float) -> None:
        array: Array = np.array(value) if isinstance(value, (int, float, np.generic)) else value
        backend_of(array)  # refuses what is no array
        if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
            raise TypeError(f"Buffer: expected an array of real numbers, got dtype {array.dtype}")
        self.value = array

    def __repr__(self) -> str:
        return f"Buffer({self.value!r})"

    def update(self, function: Callable[[Array], Any]) -> None:
        """Change the value once for this training step, from the old value to ``function(old)``.

        The new value is computed now and takes effect at the end of the step, so that all forward passes of a step see
        the same one. A pass that is run again (under a schedule, in a checkpointed part, in a rehearsal) changes
        nothing: ``function`` is not even called. In a layer that stands in several places of a model the changes follow
        each other. Outside of a step, every forward pass is a step. A step that fails changes nothing. Where several
        ranks share a batch, floating-point values become the mean over the ranks, weighted by rows, and whole numbers
        the last rank's. With accumulation, each micro-batch changes the value once.

        Args:
            function: from an array to one of the same shape; it must not change its argument.

        Raises:
            TypeError, ValueError: it returns something else, or numbers of another kind.
        """
        check_callable(function, "Buffer.update")
        updates = updates_of_step()
        if updates is None and in_step():
            return
        old = self.value if updates is None else updates.get(self, self.value)
        new = self._fitting(function(old), old)
        if updates is None:
            self.value = new
        else:
            updates[self] = new

    def _fitting(self, given: Any, old: Array) -> Array:
        """A copy of ``given``, in the old value's dtype."""
        xp = array_module(old)
        if isinstance(given, (int, float, np.generic)):
            given = np.asarray(given)
        if getattr(given, "shape", None) != old.shape:
            got = getattr(given, "shape", type(given).__name__)
            raise ValueError(f"Buffer.update: expected an array of shape {old.shape}, got {got}")
        if given.dtype.kind not in ("iub" if old.dtype.kind in "iub" else "fiubV"):  # V: bfloat16
            raise TypeError(f"Buffer.update: the buffer holds {old.dtype}, the function returned {given.dtype}")
        if xp is np:
            return np.array(given, old.dtype)
        return given.astype(old.dtype)
