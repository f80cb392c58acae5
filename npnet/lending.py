"""Parameters as lists of plain arrays, as the lab exercise sees them, under two promises at once.

* An array once handed out is never changed by a later update: ``weights = network.weights`` keeps the weights of
  that moment.
* Until that update the array *is* the network's: ``network.weights[0][i, j] += 1e-5`` changes the network.

So the network lends its own arrays, and an update of a lent parameter writes to a fresh copy (copy on write).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, SupportsIndex, TypeVar

import numpy as np

from npnet.backend import Array, array_module, backend_of, get_backend
from npnet.checks import check_array, check_list, check_whole
from npnet.losses import check_finite
from npnet.parameter import Parameter

T = TypeVar("T")


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
        matrix, expected = self.convert(array, f"{self.name}[{index}]"), as_matrix(parameter.value).shape
        if matrix.shape != expected:
            raise ValueError(f"{self.name}[{index}]: expected shape {expected}, got {matrix.shape}")
        parameter.value = matrix.reshape(parameter.value.shape)
        parameter.lent = True
        return matrix

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


@np.errstate(over="ignore", invalid="ignore")
def descended(name: str, arrays: Iterable[Any], gradients: Any, rate: float) -> list[Array]:
    """New arrays, w - rate * g for each array w and its gradient g.

    Args:
        name: "weights" or "biases", for messages.

    Raises:
        TypeError, ValueError: the number of gradients, or the kind or shape of one, does not fit.
        TrainingDiverged: a gradient is not finite.
    """
    said, stepped, weights = f"the gradient of {name}", [], list(arrays)
    for index, (weight, gradient) in enumerate(zip(weights, check_list(gradients, len(weights), said), strict=True)):
        if getattr(getattr(weight, "dtype", None), "kind", None) != "f":
            weight = check_array(weight, get_backend("numpy"), np.dtype(np.float64), f"{name}[{index}]")
        matrix = check_array(gradient, backend_of(weight), weight.dtype, f"{said}[{index}]")
        if matrix.shape != weight.shape:
            raise ValueError(f"{said}[{index}]: expected shape {weight.shape}, got {matrix.shape}")
        check_finite(matrix.sum(), f"a sum over {said}[{index}]")
        xp, new = array_module(weight), array_module(weight).empty_like(weight)  # in its layout
        xp.multiply(matrix, rate, out=new)
        stepped.append(xp.subtract(weight, new, out=new))
    return stepped


class Lent(property):
    """The attribute ``weights`` or ``biases``: a list that is the network's."""

    def __init__(self, name: str, doc: str) -> None:
        super().__init__(
            lambda network: network._npnet.lend(network, name),
            lambda network, arrays: network._npnet.assign(network, name, arrays),
            doc=doc,
        )


class Shown(Generic[T]):
    """An attribute to read. A value that is assigned to its name stands there from then on, and changes nothing else.

    (Unless it looks like a change of the network: that is made, or refused.)
    """

    def __init__(self, read: Callable[[Any], T]) -> None:
        self.read, self.__doc__ = read, read.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, network: Any, kind: type | None = None) -> T:
        if network is None:
            return self  # type: ignore[return-value]
        own: dict[str, Any] = vars(network)
        return own[self.name] if self.name in own else self.read(network)

    def __set__(self, network: Any, value: Any) -> None:
        if network._npnet.changed(self.name, value):
            vars(network).pop(self.name, None)
        else:
            vars(network)[self.name] = value

    def __delete__(self, network: Any) -> None:
        if self.name not in vars(network):
            raise AttributeError(f"{self.name}: a network keeps its own")
        del vars(network)[self.name]
