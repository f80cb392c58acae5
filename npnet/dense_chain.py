"""What the lab's network is made of, held under one name: all other names are the student's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from npnet.backend import Backend, available_backends, get_backend, to_backend
from npnet.checks import check_float, check_sizes
from npnet.layer import Layer
from npnet.layers import Dense


@dataclass
class DenseChain:
    """What a network is made of. The network holds it under one name, so that all other names are the student's."""

    layers: list[Dense]
    sizes: list[int]
    dtype: np.dtype[Any]
    backend: Backend
    loss_arrays: ClassVar[int] = 2  # cost_derivative's, and its multiple: for `npnet.plan`

    def refuse_other(self, name: str, value: Any) -> None:
        """Refuse to set an attribute that would look like a change of the network, and be none.

        Any other value is the student's own.
        """
        if name == "layers":
            other = isinstance(value, (list, tuple)) and any(isinstance(each, Layer) for each in value)
        elif name == "dtype":
            other = isinstance(value, (np.dtype, type)) and np.dtype(value) != self.dtype
        else:
            names = {*available_backends()} - {self.backend.name}
            other = (
                value in names if isinstance(value, str) else isinstance(value, Backend) and value is not self.backend
            )
        if other:
            raise AttributeError(
                f"{name}: a network keeps its own; make a new one with other arguments, and hand the weights over: "
                "other.weights = network.weights"
            )


def dense_chain(
    sizes: Sequence[int], dtype: npt.DTypeLike, backend: str | None, draw: Callable[[Any], Any]
) -> DenseChain:
    """Dense sigmoid layers with numbers from ``draw(shape)``: all biases first, then all weights."""
    checked, there, sizes = check_float(dtype), get_backend(backend), check_sizes(sizes)
    biases = [draw(size) for size in sizes[1:]]
    layers = [
        Dense(n, m, "sigmoid", initializer=lambda shape, _: draw(shape), dtype=checked, backend=there.name)
        for n, m in pairwise(sizes)
    ]
    for layer, bias in zip(layers, biases, strict=True):
        layer.bias.value = to_backend(bias.astype(checked), there.name)
    return DenseChain(layers, sizes, checked, there)


class Shown:
    """An attribute to read. Assigning to its name puts the student's own value there, and changes nothing else."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read, self.__doc__ = read, read.__doc__

    def __get__(self, network: Any, kind: type | None = None) -> Any:
        return self if network is None else self.read(network)
