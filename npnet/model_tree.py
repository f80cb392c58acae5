"""A model as a tree: the layers inside it, their mode, and the parameters that several of them share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from npnet.layer import Layer
from npnet.parameter import Buffer, Parameter


def all_layers(layer: Layer, path: str = "") -> Iterator[tuple[str, Layer]]:
    """The layer and all layers inside it, by their paths; a shared one is there once for each place."""
    yield path, layer
    for name, child in layer.children().items():
        yield from all_layers(child, f"{path}.{name}" if path else name)


@contextmanager
def mode(model: Layer, training: bool) -> Iterator[None]:
    """Inside it, the model and all layers in it train, or evaluate; afterwards each does as it did before."""
    before = [(layer, layer.training) for _, layer in all_layers(model)]
    model.train(training)
    try:
        yield
    finally:
        for layer, each in before:
            layer.training = each


def parameters_of(layers: Sequence[Layer]) -> list[Parameter]:
    """The parameters of all layers; one that layers share is there once for each of them."""
    return [parameter for layer in layers for parameter in layer.parameters()]


def completed_after(layers: Sequence[Layer], parameters: Sequence[Parameter] | None = None) -> list[list[Layer]] | None:
    """For each layer of a chain, from the first, the layers whose gradients are complete after its backward pass.

    That is the layer itself, unless one of its parameters stands in a layer below, too: then it waits for the lowest.
    None if no two layers share a parameter.

    Args:
        layers: the chain.
        parameters: what `parameters_of` gives for it, where that is known.
    """
    parameters = parameters_of(layers) if parameters is None else parameters
    if len(set(parameters)) == len(parameters):
        return None
    given = [layer.parameters() for layer in layers]
    lowest = {parameter: number for number in reversed(range(len(given))) for parameter in given[number]}
    completed: list[list[Layer]] = [[] for _ in layers]
    for number in reversed(range(len(layers))):
        last = min((lowest[parameter] for parameter in given[number]), default=number)
        if all(layers[number] is not other for other in completed[last]):
            completed[last].append(layers[number])
    return completed


def share(layer: Layer, shared: Mapping[str, str]) -> None:
    """Put the parameter or buffer at each path of ``shared`` at the other path, too: what `shared_places` gave.

    Raises:
        ValueError: a path is not there, or the two are of different kinds, shapes or dtypes.
    """
    own = dict(layer.places())
    same: dict[Parameter | Buffer, Parameter | Buffer] = {}
    for path, first in shared.items():
        if path not in own or first not in own:
            raise ValueError(f"shared: there is no {path if path not in own else first}")
        a, b = own[path], own[first]
        if type(a) is not type(b) or a.value.shape != b.value.shape or a.value.dtype != b.value.dtype:
            raise ValueError(f"shared: {path} and {first} are unlike")
        same[a] = b

    def replaced(value: Any) -> Any:
        if isinstance(value, (Parameter, Buffer)):
            return same.get(value, value)
        if type(value) in (list, tuple):
            return type(value)(map(replaced, value))
        return {key: replaced(each) for key, each in value.items()} if type(value) is dict else value

    for _, each in all_layers(layer) if same else ():
        for name, value in list(vars(each).items()):
            vars(each)[name] = replaced(value)
