"""What the lab's networks compute with, held under one name of the network's: all other names are the student's.

The student's attributes say what is computed: `weights` and `biases`, and whatever stands in a method's place. What
npnet needs besides is in here, so that ``network.layers = 3`` or ``self._weights = ...`` are attributes like any other.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from npnet import schedules
from npnet.backend import Array, Backend, available_backends, backend_of, dot, get_backend, to_backend
from npnet.checkpoint import Restore, backpropagate
from npnet.checks import check_array, check_float, check_pairs, check_rows, check_sizes
from npnet.failures import explained, rehearse
from npnet.layer import Layer, Pair
from npnet.layers import Dense
from npnet.lending import Lender, Lent, as_matrix
from npnet.losses import check_finite
from npnet.pools import HardBudget
from npnet.schedule import Schedule

LISTS = "biases", "weights"  # in the exercise's order


class DenseChain:
    """The layers of a lab's network, and how they run.

    An ``__init__`` that does not call ``super().__init__`` gives weights and biases alone: layers are made of them when
    they are first needed. Until then the lists are ordinary lists, to be filled by ``append``, say.
    """

    loss_arrays: ClassVar[int] = 2  # cost_derivative's, and its multiple: for `npnet.plan`

    sizes: list[int]
    backend: Backend

    def __init__(self) -> None:
        self.layers: list[Dense] = []
        self.lenders: dict[str, Lender] = {}
        self.dtype = np.dtype(np.float64)
        self.given: dict[str, Any] = {}  # of `LISTS`, what the layers do not hold yet
        self.foreign = False  # a subclass keeps the lists itself, as a property or a class attribute of its own

    def make(
        self, sizes: Sequence[int], dtype: npt.DTypeLike, backend: str | None, draw: Callable[[Any], Array]
    ) -> None:
        """Dense sigmoid layers with numbers from ``draw(shape)``: all biases first, then all weights."""
        checked, there, sizes = check_float(dtype), get_backend(backend), check_sizes(sizes)
        biases = [draw(size) for size in sizes[1:]]
        layers = [
            Dense(n, m, "sigmoid", initializer=lambda shape, _: draw(shape), dtype=checked, backend=there.name)
            for n, m in pairwise(sizes)
        ]
        for layer, bias in zip(layers, biases, strict=True):
            layer.bias.value = to_backend(bias.astype(checked), there.name)
        self.layers, self.sizes, self.dtype, self.backend = layers, sizes, checked, there
        self.lenders = {
            "biases": Lender("biases", [layer.bias for layer in layers], self.array),
            "weights": Lender("weights", [layer.weight for layer in layers], self.array),
        }
        self.parameters = [parameter for layer in layers for parameter in layer.parameters()]
        self.plain = schedules.none(len(layers))
        self.limit = HardBudget(there, None, self.counted)
        self.rehearsed: tuple[Schedule | None, int, bool] = None, 0, False  # schedule, largest batch, weights lent

    # The student's lists.

    def ready(self, network: Any) -> Self:
        """Itself, with the weights and biases that the network's attributes have now.

        Raises:
            AttributeError: the network has none yet.
            TypeError, ValueError: they are no chain of dense layers.
        """
        kind = type(network)
        self.foreign = type(kind.weights) is not Lent or type(kind.biases) is not Lent
        if self.foreign:
            names = [name for name in LISTS if type(getattr(kind, name)) is not Lent]
            self._take(network, self.given | {name: getattr(network, name) for name in names})
        elif self.given:
            self._take(network, self.given)
        elif not self.layers:
            raise _missing(network)
        return self

    def lend(self, network: Any, name: str) -> list[Array]:
        """What ``network.weights`` or ``network.biases`` is."""
        if name in self.given:
            arrays: list[Array] = self.given[name]
            return arrays
        if not self.layers:
            raise _missing(network)
        return self.lenders[name].lend()

    def assign(self, network: Any, name: str, arrays: Iterable[Array]) -> None:
        """Put the arrays in their places; or keep them until the other list fits, where ``network.sizes`` were changed.

        Raises:
            TypeError, ValueError: their number, or the kind or shape of one, does not fit.
        """
        if self.given or not self.layers:
            self.given[name] = arrays
            return
        try:
            self.lenders[name].replace_all(arrays)
        except ValueError as error:
            other = getattr(network, "sizes", None)
            if _shapes_by(other, name) == _shapes(arrays):
                self.given[name] = arrays
            else:
                raise ValueError(f"{error}; for a network of other sizes, assign network.sizes first") from None

    def take_back(self) -> None:
        """After an update: the lists lent are their holders' alone from now on."""
        self.lenders["biases"].take_back()
        self.lenders["weights"].take_back()

    def _take(self, network: Any, given: dict[str, Any]) -> None:
        """Make the layers hold the lists given: those there are, if the lists fit, or new ones."""
        given = {name: lender.lend() for name, lender in self.lenders.items()} | given
        if len(given) < len(LISTS):
            raise _missing(network)
        shapes, before = _shapes(given["weights"]), dict(vars(self))
        if not shapes or any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"weights: expected a list of (out, in) arrays, got arrays of shapes {shapes}")
        sizes = [shapes[0][1], *(shape[0] for shape in shapes)]
        try:
            if not self.layers:
                first = given["weights"][0]
                self.make(sizes, self.dtype, _home(first), np.zeros)
            elif sizes != self.sizes:
                self.make(sizes, self.dtype, self.backend.name, np.zeros)
            for name, arrays in given.items():
                self.lenders[name].replace_all(arrays)
        except BaseException:
            vars(self).update(before)
            raise
        self.given = {}

    # What people pass in.

    def array(self, array: Any, name: str) -> Array:
        """``array`` with the network's dtype and on its backend; see `check_array`."""
        return check_array(array, self.backend, self.dtype, name)

    def rows(self, array: Any, features: int, name: str, labels: bool = False) -> Array:
        """The same, if it has rows of so many features; see `check_rows`."""
        array = self.array(array, name)
        check_rows(array, features, name, labels)
        return array

    def pairs(self, pair: Pair, name: str) -> Pair:
        """x and y of a pair, checked.

        Raises:
            TypeError, ValueError: it is no pair, or an array does not fit.
        """
        x, y = two(pair, name)
        x, y = self.rows(x, self.sizes[0], f"{name}x"), self.rows(y, self.sizes[-1], f"{name}y", labels=True)
        check_pairs(x, y, name)
        return x, y

    def refuse_other(self, name: str, value: Any) -> None:
        """Refuse to set an attribute that would look like a change of the network, and be none.

        Any other value is the student's own.
        """
        if name == "layers":
            other = isinstance(value, (list, tuple)) and any(isinstance(each, Layer) for each in value)
        elif name == "dtype":
            other = isinstance(value, (np.dtype, type)) and np.dtype(value) != self.dtype
        elif name == "backend":
            names = {*available_backends()} - {self.backend.name}
            other = (
                value in names if isinstance(value, str) else isinstance(value, Backend) and value is not self.backend
            )
        else:
            other = False
        if other:
            raise AttributeError(
                f"{name}: a network keeps its own; make a new one with other arguments, and hand the weights over: "
                "other.weights = network.weights"
            )

    def changed(self, name: str, value: Any) -> bool:
        """Whether assigning ``value`` to the network's attribute changes the network; else it is the student's own."""
        if self.layers:
            self.refuse_other(name, value)
        return False

    # Forward and backward.

    def checkpointed(self, network: Any, own: Callable[..., Any]) -> bool | None:
        """Whether npnet's own ``network.backprop`` goes by a schedule. None: another method stands in its place."""
        return False if is_own(network.backprop, network, own) else None

    def scheduled(self, network: Any, batch_size: int, streaming: bool) -> tuple[Schedule, Restore | None]:
        """What a pass by a schedule computes, holds and recomputes, and by which method."""
        return self.plain, None

    def gradients(self, network: Any, x: Array, y: Array, checkpointed: bool) -> tuple[list[Array], list[Array]]:
        """(nabla_b, nabla_w) of a batch in columns."""
        x = self.rows(self.array(x, "x").T, self.sizes[0], "x.T (backprop takes columns)")
        y = self.rows(self.array(y, "y").T, self.sizes[-1], "y.T (backprop takes columns)")
        check_pairs(x, y, "backprop, transposed: ")
        self.run(network, x, y, 1.0, None, checkpointed)
        nabla_b, nabla_w = [], []
        for layer in self.layers:
            nabla_b.append(as_matrix(layer.bias.take_gradient()))
            nabla_w.append(layer.weight.take_gradient())
        return nabla_b, nabla_w

    def run(
        self,
        network: Any,
        x: Array,
        y: Array,
        factor: float,
        after_backward: Callable[[Layer], None] | None,
        checkpointed: bool,
    ) -> None:
        """Backpropagate ``factor`` times ``network.cost_derivative``."""

        def output_gradient(output: Array) -> Array:
            derivative = self.array(network.cost_derivative(output.T, y.T), "cost_derivative").T
            if derivative.shape != output.shape:
                raise ValueError(f"cost_derivative: expected shape {output.T.shape}, got {derivative.T.shape}")
            flat = derivative.ravel(order="K")
            check_finite(dot(flat, flat))
            return derivative * factor

        layers, streaming = self.layers, after_backward is not None
        schedule, restore = self.scheduled(network, len(x), streaming) if checkpointed else (self.plain, None)
        with explained(self, schedule, x, streaming=streaming), self.limit:
            if streaming:
                self.rehearse(schedule, x)
            backpropagate(
                layers, schedule, x, output_gradient, after_backward=after_backward, restore=restore, fresh=True
            )

    def rehearse(self, schedule: Schedule, x: Array) -> None:
        """Once for a schedule, and for a larger batch: do all that a step does but the update, by the engine alone.

        Methods of a subclass are not called. Once more when weights are lent: each will be copied on its update.
        """
        lent = True in [parameter.lent for parameter in self.parameters]  # each step asks: a generator would be slower
        if self.rehearsed[0] is schedule and self.rehearsed[1] >= len(x) and self.rehearsed[2] >= lent:
            return
        copies: list[Array] = []

        def prepare(layer: Layer) -> None:
            copies.extend(parameter.value.copy(order="F") for parameter in layer.parameters() if parameter.lent)

        rehearse(self.layers, schedule, x, prepare)
        self.rehearsed = schedule, len(x), lent

    def counted(self) -> list[Array]:
        """The arrays that a budget counts before a step: the parameters' but for those lent, which others hold."""
        return [parameter.value for parameter in self.parameters if not parameter.lent]


def is_own(method: Any, network: Any, function: Callable[..., Any]) -> bool:
    """Whether ``method`` is this very ``function`` of this network: nothing stands in its place."""
    return getattr(method, "__func__", None) is function and method.__self__ is network


def two(pair: Any, name: str) -> tuple[Any, Any]:
    """The two of a pair, as they are.

    Raises:
        TypeError: it is none.
    """
    try:
        x, y = pair
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}expected a pair (x, y), two arrays with a row for each sample, got a {type(pair).__name__}"
        ) from None
    return x, y


def as_given(pair: Any, name: str) -> tuple[Any, Any]:
    """x and y for a method of the student's, which knows what they are: as they are, but arrays.

    Raises:
        TypeError, ValueError: it is no pair, or x and y are not as long.
    """
    x, y = (each if hasattr(each, "shape") else np.asarray(each) for each in two(pair, name))
    check_pairs(x, y, name)
    return x, y


def _missing(network: Any) -> AttributeError:
    return AttributeError(
        f"{type(network).__name__} has no weights and biases yet: its __init__ sets both, or calls "
        "super().__init__(sizes)"
    )


def _home(array: Any) -> str | None:
    """The backend that an array is on; None, the current one, for a list."""
    if isinstance(array, (list, tuple)):
        return None
    return "numpy" if isinstance(array, np.ndarray) else backend_of(array).name


def _shapes(arrays: Any) -> list[tuple[int, ...]] | None:
    """The shape of each, or None if they have none."""
    try:
        return [tuple(np.shape(array)) for array in arrays]
    except (TypeError, ValueError):
        return None


def _shapes_by(sizes: Any, name: str) -> list[tuple[int, int]]:
    """The shapes that weights or biases have by ``sizes``, if these are sizes; else none."""
    try:
        return [(m, n if name == "weights" else 1) for n, m in pairwise(check_sizes(sizes))]
    except (TypeError, ValueError):
        return []
