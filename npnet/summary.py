"""A model as a table: its layers, shapes, parameters and bytes."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from npnet.blocks import Residual
from npnet.chain_costs import HasLayers, input_of
from npnet.checkpoint import Checkpoint
from npnet.checks import check_whole
from npnet.layer import Layer, costs_of
from npnet.layers import Sequential
from npnet.memory import format_bytes
from npnet.report import Row, Table


def summary(network: HasLayers, batch_size: int = 1, *, features: int | None = None) -> Table:
    """What the layers of ``network`` make of a batch, and what they hold: print it, or read its ``rows``.

    Columns: the layer's path and name, the shape of its output, how many numbers its parameters are, and the bytes that
    a plain training step holds of it: of its output, and of what it saves besides. Each layer has the numbers of all
    its parameters; the sum above counts those that layers share once.

    Args:
        network: a `Network`, or a `Sequential`; the layers of models inside it are listed below them.
        features: of the input, if the first layer does not tell.

    Raises:
        TypeError, ValueError, NotImplementedError: as for `npnet.plan`.

    >>> from npnet import mlp
    >>> print(summary(mlp([784, 30, 10]), batch_size=100))
    23,860 parameters of 95.4 kB; batch size 100
    <BLANKLINE>
    path                   layer      output  parameters  output bytes  saved bytes
       0    Dense(784, 30, relu)   (100, 30)      23,550        12,000            0
       1  Dense(30, 10, identity)  (100, 10)         310         4,000            0
    """
    layers, features, dtype = input_of(network, features)
    shape = check_whole(batch_size, "batch_size", least=1), features
    parameters = [each.value for each in dict.fromkeys(each for layer in layers for each in layer.parameters())]
    count, size = sum(value.size for value in parameters), sum(value.nbytes for value in parameters)
    rows = list(_rows({str(number): layer for number, layer in enumerate(layers)}, "", shape, dtype))
    return Table("summary", f"{count:,} parameters of {format_bytes(size)}; batch size {batch_size}", rows)


def _rows(chain: dict[str, Layer], prefix: str, shape: tuple[int, int], dtype: np.dtype[Any]) -> Iterator[Row]:
    costs = costs_of(list(chain.values()), shape, dtype, needs_dx=True)
    for (name, layer), cost in zip(chain.items(), costs, strict=True):
        inside = isinstance(layer, (Sequential, Residual, Checkpoint))
        yield {
            "path": prefix + name,
            "layer": type(layer).__name__ if inside else repr(layer),
            "output": str(cost.output_shape),
            "parameters": sum(parameter.value.size for parameter in layer.parameters()),
            "output bytes": cost.output_bytes,
            "saved bytes": 0 if layer.output_suffices else cost.saved_bytes,
        }
        if inside:
            yield from _rows(layer.children(), f"{prefix}{name}.", shape, dtype)
        shape = cost.output_shape
