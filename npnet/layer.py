"""Layers that never remember.

A layer holds parameters; it holds no activation. ``forward(x)`` returns ``(y, saved)`` and
``backward(dy, saved)`` returns ``dx`` and adds into the parameters' gradients. Whoever calls ``forward``
decides what becomes of ``saved``: keep it until ``backward`` and you have ordinary backpropagation, drop it
and call ``forward`` again later and you have gradient checkpointing. The memory that training takes is the
sum of what somebody kept.

Batches are rows, (batch, features); weights are (out, in), as in PyTorch.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

import numpy as np

from npnet.attributes import refuse_unknown_attribute
from npnet.backend import Array, array_module, backend_of, to_backend, to_host
from npnet.checks import check_flag
from npnet.parameter import Buffer, Parameter
from npnet.savable import Savable

Pair: TypeAlias = tuple[Array, Array]
"""Data to learn from, (x, y), a row per sample each: (samples, features) and (samples, outputs)."""

Saved: TypeAlias = Any
"""What backward needs of a forward pass; only the layer that made it looks inside."""


class LayerCost(NamedTuple):
    """What one layer takes for one batch: bytes of arrays, and flops (an elementwise operation counts as one).

    Single rows and columns (a bias on its way, a vector of ones) are not counted.
    """

    output_shape: tuple[int, int]  # (batch, features)
    output_bytes: int
    saved_bytes: int = 0  # of what ``saved`` holds besides input and output
    forward_bytes: int = 0  # the most that forward takes at once besides input and output, ``saved`` included
    gradient_bytes: int = 0  # of the gradients of the parameters
    backward_bytes: int = 0  # the most that backward_ takes at once besides what it is given: gradients, dx included
    forward_flops: int = 0
    backward_flops: int = 0
    keeps_input: bool = True  # ``saved`` holds the input
    keeps_output: bool = True  # ... and the output
    in_place: bool = False  # backward_ returns dx in the buffer of dy
    output_gradient_bytes: int | None = None  # of the gradient at the output, if not as many as the output's

    @property
    def dy_bytes(self) -> int:
        """Bytes of the gradient at the output."""
        return self.output_bytes if self.output_gradient_bytes is None else self.output_gradient_bytes


class LayerError(Exception):
    """An error that says where in the model it happened: each model that it passes through puts a name in front."""

    path: tuple[str, ...] = ()

    def within(self, name: str) -> Self:
        """The same error, seen from the model in which the layer is called ``name``."""
        self.path = (name, *self.path)
        return self

    def __str__(self) -> str:
        text = super().__str__()
        return f"layer {'.'.join(self.path)}, {text}" if self.path else text


class ShapeError(LayerError, ValueError):
    """A layer cannot take an array of this shape."""


class KindError(LayerError, TypeError):
    """A layer cannot take an array of this dtype, or of this backend."""


class ResultError(LayerError, TypeError):
    """A layer's method does not return what it must."""


class MissingMethod(LayerError, NotImplementedError):
    """A layer of one's own lacks a method."""


_NOT_FROZEN = "npnet trains every parameter, and cannot freeze one yet"
_OF_PARAMETERS = "the gradients of its parameters: layer.weight.gradient"
_SYNONYMS: dict[str, str] = {
    **dict.fromkeys(("trainable", "requires_grad", "frozen"), _NOT_FROZEN),
    **dict.fromkeys(("gradient", "grad"), _OF_PARAMETERS),
    **dict.fromkeys(("kernel", "weights"), "weight, a Parameter: layer.weight.value"),
    "biases": "bias, a Parameter: layer.bias.value",
    **dict.fromkeys(("rate", "probability", "dropout"), "p, of a Dropout layer"),
    **dict.fromkeys(("lr", "learning_rate", "weight_decay"), "that of the optimizer"),
    "is_training": "training, or the methods train() and eval()",
}
"""Attributes of layers elsewhere -> what to use in npnet."""


class Layer(Savable):
    """One link of a chain: a_l = f_l(a_{l-1}), with its derivative."""

    output_suffices: ClassVar[bool] = False
    """True where ``saved`` is just ``(x, y)``: whoever holds input and output needs nothing else for backward."""

    def forward(self, x: Array) -> tuple[Array, Saved]:
        """The output for ``x``, and what ``backward`` will need. Does not change ``x``.

        Called again with the same ``x`` in the same training step it must give the same output, or checkpointing
        computes the gradient of another function: a layer that draws random numbers has to draw the same again. What it
        changes from step to step, such as a running mean, is an `npnet.Buffer`. See `npnet.layer_rules`.
        """
        name = type(self).__name__
        raise MissingMethod(
            f"{name} has no forward; write forward(self, x), which returns (y, saved): the output for x, and what "
            "backward needs"
        )

    def backward(self, dy: Array, saved: Saved) -> Array:
        """The gradient at the input, dx, from that at the output, ``dy``; adds into the parameters' gradients."""
        name = type(self).__name__
        raise MissingMethod(
            f"{name} has no backward; write backward(self, dy, saved): from dy, the gradient at the output, and what "
            "forward saved, it returns the gradient at the input, and it adds to each parameter's, "
            "self.weight.accumulate(gradient), summed over the batch"
        )

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array | None:
        """As `backward`, but free to overwrite ``dy`` and, without ``needs_dx``, to skip dx.

        This is what the engine calls: the gradient that it passes down belongs to nobody else.
        """
        return self.backward(dy, saved)

    training: bool = True
    """Set by `train` and `eval`; what a layer does differently while it is being trained, it decides by this."""

    def __call__(self, x: Array) -> Array:
        """The output alone."""
        return both(self, self.forward(x))[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __setattr__(self, name: str, value: Any) -> None:
        held = vars(self).get(name)
        if isinstance(held, (Parameter, Buffer)) and not isinstance(value, type(held)):
            raise TypeError(f"{self}: {name} is a {type(held).__name__}; its numbers are {name}.value, assign to that")
        if held is None and name in _SYNONYMS:
            refuse_unknown_attribute(self, name, _SYNONYMS)
        if name == "training":
            value = check_flag(value, "training")
        if name in ("train", "eval") and not callable(value):
            raise TypeError(f"{self}: {name} is a method: call layer.{name}()")
        super().__setattr__(name, value)

    def children(self) -> "dict[str, Layer]":
        """The layers inside this one, by name: its attributes that are layers, or lists or dictionaries of layers."""
        return {name: part for name, part in self._parts() if isinstance(part, Layer)}

    def _parts(self) -> "list[tuple[str, Layer | Parameter | Buffer]]":
        """All layers, parameters and buffers among the attributes, and in lists, tuples and dictionaries there."""
        parts = []
        for name, value in vars(self).items():
            if isinstance(value, (Layer, Parameter, Buffer)):
                parts.append((name, value))
            elif isinstance(value, (list, tuple, dict, deque)):
                parts += _parts_of(value, name)
        return parts

    def places(self, prefix: str = "") -> Iterator[tuple[str, Parameter | Buffer]]:
        """The paths of all parameters and buffers, in a fixed order; a shared one is there once for each place."""
        for name, part in self._parts():
            if not isinstance(part, Layer):
                yield prefix + name, part
        for name, child in self.children().items():
            yield from child.places(f"{prefix}{name}.")

    def named_parameters(self, prefix: str = "") -> dict[str, Parameter]:
        """All parameters by their path in the model, such as "2.inner.0.weight"; a shared one by its first path."""
        return {path: each for each, path in _first_places(self, prefix).items() if isinstance(each, Parameter)}

    def named_buffers(self, prefix: str = "") -> dict[str, Buffer]:
        """All buffers by their path in the model; a shared one by its first path."""
        return {path: each for each, path in _first_places(self, prefix).items() if isinstance(each, Buffer)}

    def shared_places(self) -> dict[str, str]:
        """The paths at which a parameter or buffer stands once more, and the path of its first place."""
        first = _first_places(self)
        return {path: first[each] for path, each in self.places() if path != first[each]}

    def parameters(self) -> list[Parameter]:
        """All parameters, each once, in the order of `named_parameters`."""
        found = {part: None for _, part in self._parts() if isinstance(part, Parameter)}
        for child in self.children().values():
            found |= dict.fromkeys(child.parameters())
        return list(found)

    def buffers(self) -> list[Buffer]:
        """All buffers, each once, in the order of `named_buffers`."""
        return list(self.named_buffers().values())

    def train(self, mode: bool = True) -> Self:
        """Train from now on (dropout drops, `npnet.checkpoint` checkpoints), with all layers inside."""
        self.training = check_flag(mode, "mode")
        for child in self.children().values():
            child.train(mode)
        return self

    def eval(self) -> Self:
        """Evaluate from now on: ``train(False)``."""
        return self.train(False)

    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters and buffers on the host, by their path; a shared one stands under each of its paths.

        (As in PyTorch. A copy is made once for all paths.)
        """
        copies = {each: to_host(each.value).copy() for each in _first_places(self)}
        return {path: copies[each] for path, each in self.places()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Put copies of the arrays of ``state`` in place of the parameters' and buffers': all, or none if one does not
        fit. What stands in several places may be named by one of its paths, or by all.

        Raises:
            TypeError: ``state`` is no mapping to arrays of numbers.
            ValueError: names are missing or unknown, an array has another shape, or two of a shared parameter differ.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"load_state_dict: expected what state_dict() returns, got {type(state).__name__}")
        own = dict(self.places())
        given = {own[path] for path in state if path in own}
        lacking = {path for each, path in _first_places(self).items() if each not in given}
        for problem, names in (("lacks", lacking), ("has unknown", state.keys() - own.keys())):
            if names:
                raise ValueError(f"load_state_dict: the state {problem} {', '.join(sorted(map(str, names)))}")
        fresh: dict[Parameter | Buffer, Array] = {}
        for name in (path for path in own if path in state):
            each, array = own[name], to_host(state[name])
            backend_of(array)  # refuses masks
            if array.dtype.kind not in ("fiu" if each.value.dtype.kind not in "iub" else "iub"):
                raise TypeError(f"load_state_dict: {name}: expected real numbers, got dtype {array.dtype}")
            if array.shape != each.value.shape:
                raise ValueError(f"load_state_dict: {name}: expected shape {each.value.shape}, got {array.shape}")
            copied = np.array(array, each.value.dtype, order="F")
            if each in fresh and not np.array_equal(to_host(fresh[each]), copied, equal_nan=copied.dtype.kind == "f"):
                raise ValueError(f"load_state_dict: {name} is a shared parameter, and another path gives other numbers")
            fresh[each] = to_backend(copied, backend_of(each.value).name)
        put_values(fresh)

    def cost(self, shape: tuple[int, int], dtype: np.dtype[Any], needs_dx: bool = True) -> LayerCost:
        """What the layer takes for an input of this shape, (batch, features), and dtype: read by `npnet.planner`.

        Raises:
            NotImplementedError: the layer does not say; it runs all the same, but cannot be planned.
            ValueError: the input does not fit.
        """
        raise NotImplementedError(
            f"{self} does not say what it costs, so it cannot be planned: give {type(self).__name__} a method "
            "cost(self, shape, dtype, needs_dx=True) that returns an npnet.LayerCost"
        )

    def _added_cost(self, cost: LayerCost, alive: Collection[Parameter]) -> LayerCost:
        """``cost``, where the parameters ``alive`` have gradients already: those of places above that share them.

        What backward makes for these is added, and gone at once. By default it counts until backward is done, which is
        never too little.
        """
        shared = sum(each.value.nbytes for each in self.parameters() if each in alive)
        return cost._replace(gradient_bytes=cost.gradient_bytes - shared) if shared and cost.gradient_bytes else cost

    def check_input(self, x: Array) -> None:
        """Refuse an input that is not an array of floating-point numbers.

        Raises:
            TypeError: it is not.
            ValueError: it is a single number.
        """
        array_module(x)  # refuses what is no array
        if x.dtype.kind != "f" and x.dtype.name != "bfloat16":
            raise KindError(f"{self}: expected floating-point numbers, got dtype {x.dtype}; convert with x.astype")
        if not x.ndim:
            raise ShapeError(f"{self}: expected rows of shape (batch, features), got a single number")

    def check_gradient(self, dy: Array, y: Array) -> None:
        """Refuse a gradient that does not fit the output ``y``, before broadcasting can make it fit.

        Raises:
            TypeError: ``dy`` is not an array of floating-point numbers, or of another backend than ``y``.
            ValueError: ``dy`` has another shape than ``y``.
        """
        if backend_of(dy) is not backend_of(y):
            raise KindError(f"{self}: the gradient dy is on backend {backend_of(dy).name!r}; move it with to_backend")
        if dy.shape != y.shape:
            raise ValueError(f"{self}: the gradient dy must have the output's shape {y.shape}, got {dy.shape}")
        if dy.dtype.kind != "f" and dy.dtype.name != "bfloat16":
            raise KindError(f"{self}: the gradient dy must be of floating-point numbers, got dtype {dy.dtype}")


def _parts_of(value: Any, path: str) -> Iterator[tuple[str, Layer | Parameter | Buffer]]:
    """``value``, if it is a layer, a parameter or a buffer; or those that lists, tuples and dictionaries hold."""
    if isinstance(value, (Layer, Parameter, Buffer)):
        yield path, value
    elif isinstance(value, (list, tuple, deque)):
        for number, each in enumerate(value):
            yield from _parts_of(each, f"{path}.{number}")
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _parts_of(each, f"{path}.{key}")


def _first_places(layer: Layer, prefix: str = "") -> dict[Parameter | Buffer, str]:
    """All parameters and buffers, each once, and the first path of each."""
    first: dict[Parameter | Buffer, str] = {}
    for path, each in layer.places(prefix):
        first.setdefault(each, path)
    return first


def put_values(values: Mapping[Parameter | Buffer, Array]) -> None:
    """Give parameters and buffers these arrays, which belong to them from now on."""
    for each, value in values.items():
        each.value = value
        if isinstance(each, Parameter):
            each.lent = False


def both(layer: Layer, result: Any) -> tuple[Array, Saved]:
    """``result``, which the layer's ``forward`` returned, if it is a pair (y, saved).

    Raises:
        TypeError: it is not.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise ResultError(
            f"{layer}: forward must return a pair (y, saved), the output and what backward needs; it returned a "
            f"{type(result).__name__}"
        )
    return result


class InPlaceLayer(Layer):
    """A layer that writes `backward_` alone, which may overwrite ``dy``; `backward` is that on a copy."""

    def backward(self, dy: Array, saved: Saved) -> Array:
        if self.output_suffices:
            if not isinstance(saved, tuple) or len(saved) != 2:
                raise TypeError(f"{self}: saved must be what forward returned beside y, got a {type(saved).__name__}")
            self.check_gradient(dy, saved[1])
        dx = self.backward_(dy.copy(), saved)
        assert dx is not None, "needs_dx is True by default"
        return dx

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array | None:
        raise NotImplementedError(f"{type(self).__name__}.backward_")


def costs_of(layers: Sequence[Layer], shape: tuple[int, int], dtype: np.dtype[Any], needs_dx: bool) -> list[LayerCost]:
    """What each layer of a chain takes for a batch; arguments, of the first layer, and errors as for `Layer.cost`.

    A gradient that is added to another, which a layer above has made, is gone at once.
    """
    costs: list[LayerCost] = []
    for number, layer in enumerate(layers):
        try:
            costs.append(layer.cost(shape, dtype, needs_dx or number > 0))
        except ShapeError as error:
            raise error.within(str(number)) from None
        shape = costs[-1].output_shape
    alive = set[Parameter]()
    for number in reversed(range(len(costs))):
        costs[number] = layers[number]._added_cost(costs[number], alive)
        alive.update(layers[number].parameters())
    return costs


def needs_saved(layers: Sequence[Layer]) -> frozenset[int]:
    """The numbers, from 1, of the layers whose backward pass needs more than their input and output."""
    numbers = [number for number, layer in enumerate(layers, 1) if not layer.output_suffices]
    return frozenset(numbers)  # of a list: each step asks, and a generator would take half as long again
