"""Parameters as lists of plain arrays, as the lab exercise sees them, under two promises at once.

* An array once handed out is never changed by a later update: ``weights = network.weights`` keeps the weights of
  that moment.
* Until that update the array *is* the network's: ``network.weights[0][i, j] += 1e-5`` changes the network.

So the network lends its own arrays, and an update of a lent parameter writes to a fresh copy (copy on write).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np

from npnet.backend import Array, array_module
from npnet.checks import check_list, check_whole
from npnet.losses import check_finite
from npnet.parameter import Parameter


class LentList(list[Array]):
    """What ``network.weights`` gives: putting another array in a place puts it in the network, until the update."""

    def __init__(self, arrays: Iterable[Array], replace: Callable[[int, Any], Array]) -> None:
        super().__init__(arrays)
        self.replace: Callable[[int, Any], Array] | None = replace  # None: taken back, an ordinary list from then on

    def __reduce__(self) -> tuple[type, tuple[list[Array]]]:
        return list, (list(self),)  # a copy is an ordinary list

    def __setitem__(self, index: Any, value: Any) -> None:
        if self.replace is not None:
            if not isinstance(index, SupportsIndex):
                raise TypeError("to replace several arrays, assign a whole list: network.weights = [...]")
            index = check_whole(index, "the index of an array", least=-len(self), most=len(self) - 1)
            value = self.replace(range(len(self))[index], value)
        super().__setitem__(index, value)


def _only_when_returned(name: str) -> Callable[..., Any]:
    """A list's method, refused while the list stands for a network, which cannot have more layers or fewer."""

    def method(self: LentList, *args: Any, **kwargs: Any) -> Any:
        if self.replace is not None:
            raise TypeError(
                f"{name}: a network's layers stay as they are; replace the whole list: network.weights = [...]"
            )
        return getattr(list, name)(self, *args, **kwargs)

    return method


for _name in (
    "append",
    "extend",
    "insert",
    "pop",
    "remove",
    "clear",
    "reverse",
    "sort",
    "__delitem__",
    "__iadd__",
    "__imul__",
):
    setattr(LentList, _name, _only_when_returned(_name))


class Lender:
    """The parameters of one kind (all weights, all biases) as a list of matrices.

    Args:
        name: "weights" or "biases", for messages.
        parameters: one a layer.
        convert: makes an array of the network's backend and dtype of what is assigned, or refuses it.
    """

    def __init__(self, name: str, parameters: Sequence[Parameter], convert: Callable[[Any, str], Array]) -> None:
        self.name, self.parameters, self.convert = name, parameters, convert
        self._lent: LentList | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lent": None}  # the list handed out belongs to this network, not to its copy

    def lend(self) -> LentList:
        """The arrays themselves; the same list until `take_back`."""
        if self._lent is None:
            for parameter in self.parameters:
                parameter.lent = True
            self._lent = LentList((as_matrix(parameter.value) for parameter in self.parameters), self.replace)
        return self._lent

    def take_back(self) -> None:
        """After an update: the list lent, if any, is its holder's alone from now on."""
        if self._lent is not None:
            self._lent.replace = None
            self._lent = None

    def replace(self, index: int, array: Any) -> Array:
        """Put ``array`` in the parameter's place: itself, not a copy, where its dtype fits.

        Raises:
            TypeError, ValueError: its kind or shape does not fit.
        """
        parameter = self.parameters[index]
        matrix = self._fitting(index, array, self.name)
        parameter.value = matrix.reshape(parameter.value.shape)
        parameter.lent = True
        return matrix

    def _fitting(self, index: int, array: Any, name: str) -> Array:
        matrix, expected = self.convert(array, f"{name}[{index}]"), as_matrix(self.parameters[index].value).shape
        if matrix.shape != expected:
            raise ValueError(f"{name}[{index}]: expected shape {expected}, got {matrix.shape}")
        return matrix

    @np.errstate(over="ignore", invalid="ignore")
    def descended(self, gradients: Any, rate: float) -> list[Array]:
        """New arrays, w - rate * g for each parameter w and its gradient g.

        Raises:
            TypeError, ValueError: the number of gradients, or the kind or shape of one, does not fit.
            TrainingDiverged: a gradient is not finite.
        """
        name, stepped = f"the gradient of {self.name}", []
        for index, gradient in enumerate(check_list(gradients, len(self.parameters), name)):
            matrix = self._fitting(index, gradient, name)
            check_finite(matrix.sum(), f"a sum over {name}[{index}]")
            weight = as_matrix(self.parameters[index].value)
            xp, new = array_module(weight), array_module(weight).empty_like(weight)  # in its layout
            xp.multiply(matrix, rate, out=new)
            stepped.append(xp.subtract(weight, new, out=new))
        return stepped

    def replace_all(self, arrays: Iterable[Any]) -> None:
        """Put every array in its place, or none if one does not fit.

        Raises:
            TypeError, ValueError: their number, or the kind or shape of one, does not fit.
        """
        arrays = check_list(arrays, len(self.parameters), self.name)
        before = [(parameter.value, parameter.lent) for parameter in self.parameters]
        try:
            for index, array in enumerate(arrays):
                self.replace(index, array)
        except (TypeError, ValueError):
            for parameter, (value, lent) in zip(self.parameters, before, strict=True):
                parameter.value, parameter.lent = value, lent
            raise
        self.take_back()


def as_matrix(value: Array) -> Array:
    """A weight as it is, a bias (out,) as a column (out, 1) that shares its memory."""
    return value if value.ndim == 2 else value.reshape(-1, 1)
