"""The lab's network: dense sigmoid layers and the quadratic cost (with checkpointing: next file).

A thin face over the engine, with the names and conventions of the lab exercise that npnet serves: an MLP after Nielsen,
"Neural Networks and Deep Learning", 2015, chapters 1 and 2, to be given checkpointing. x and y come as rows, (samples,
features), into `Network.SGD`, `update_mini_batch` and `evaluate`, as columns into `backprop` and whatever it calls.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from npnet import schedules
from npnet.backend import (
    Array,
    Backend,
    along_rows,
    array_module,
    dot,
)
from npnet.checkpoint import Restore, backpropagate, clear_gradients
from npnet.checks import (
    check_array,
    check_flag,
    check_list,
    check_no_nan,
    check_number,
    check_one_hot,
    check_pairs,
    check_rows,
    check_whole,
)
from npnet.dense_chain import DenseChain, Shown, dense_chain
from npnet.failures import explained, rehearse
from npnet.interrupts import Interrupts
from npnet.layer import Layer, Pair
from npnet.layers import Dense
from npnet.lending import Lender, as_matrix
from npnet.losses import TrainingDiverged, accuracy, check_finite
from npnet.parameter import Parameter
from npnet.pools import HardBudget
from npnet.random import RNG, as_generator
from npnet.savable import Savable
from npnet.schedule import Schedule


class Network(Savable):
    """A chain of dense sigmoid layers with the quadratic cost, trained by stochastic gradient descent.

    A subclass may leave out ``super().__init__`` if its own ``__init__`` sets ``weights`` and ``biases``, as in the
    exercise; they are then float64. Every method may be replaced: on the class, in a subclass, on one network.

    Args:
        sizes: layer sizes, input first, such as [784, 30, 10].
        dtype: of parameters and activations.
        rng: seed or generator. None draws from NumPy's global stream, all biases first, then all weights: after
            ``np.random.seed(k)`` the network is the one that the classic exercise builds.
        backend: "numpy" or "cupy"; the current backend by default.

    Raises:
        TypeError, ValueError: ``sizes`` are not at least two positive whole numbers.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        dtype: npt.DTypeLike = np.float64,
        rng: RNG = None,
        backend: str | None = None,
    ) -> None:
        draw = np.random.standard_normal if rng is None else as_generator(rng).standard_normal
        self._begin(dense_chain(sizes, dtype, backend, draw))
        self.sizes = self._chain.sizes.copy()
        self.num_layers = len(self.sizes)  # as the exercise counts: the input is a layer, too

    def _begin(self, chain: DenseChain) -> None:
        """Take the chain as one's own."""
        self._chain = chain
        self._weights = Lender("weights", [layer.weight for layer in chain.layers], self._array)
        self._biases = Lender("biases", [layer.bias for layer in chain.layers], self._array)
        self._schedule = schedules.none(len(chain.layers))
        self._restore: Restore | None = None
        self._limit = HardBudget(chain.backend, None, self._counted)
        self._rehearsed: tuple[Schedule | None, int, bool] = None, 0, False  # schedule, largest batch, weights lent

    def _given_first(self, name: str, arrays: Iterable[Array]) -> None:
        """An ``__init__`` without ``super().__init__`` sets its weights and biases: with both, there is a chain."""
        given = vars(self).setdefault("_given", {})
        given[name] = arrays
        if len(given) < 2:
            return
        weights = list(given["weights"])
        shapes = [np.shape(weight) for weight in weights]
        if not shapes or any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"weights: expected a list of (out, in) arrays, got arrays of shapes {shapes}")
        self._begin(dense_chain([shapes[0][1], *(shape[0] for shape in shapes)], np.float64, None, np.zeros))
        del self._given
        self._weights.replace_all(weights)
        self._biases.replace_all(given["biases"])

    def __getattr__(self, name: str) -> Any:
        """Called where there is no such attribute."""
        given = vars(self).get("_given", {})
        if name in given:  # asked for before the other of the two is set
            return given[name]
        if name in ("_chain", "_weights", "_biases", "_schedule", "_limit", "weights", "biases"):
            raise AttributeError(
                f"{type(self).__name__} has no weights and biases yet: its __init__ sets both, or calls "
                "super().__init__(sizes)"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        chain = vars(self).get("_chain")
        if chain is not None and name in ("layers", "dtype", "backend"):
            chain.refuse_other(name, value)
        super().__setattr__(name, value)

    @Shown
    def layers(self) -> list[Dense]:
        """The dense layers."""
        return self._chain.layers

    @Shown
    def dtype(self) -> np.dtype[Any]:
        """Of parameters and activations."""
        return self._chain.dtype

    @Shown
    def backend(self) -> Backend:
        """Where its arrays are."""
        return self._chain.backend

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._chain.sizes})"

    def __copy__(self) -> "Network":
        """A copy that trains alone, as a copy of the exercise's network does."""
        return copy.deepcopy(self)

    def named_parameters(self) -> dict[str, Parameter]:
        """All parameters: "0.weight", "0.bias" and so on."""
        layers = enumerate(self._chain.layers)
        return {f"{i}.{name}": each for i, layer in layers for name, each in layer.named_parameters().items()}

    @property
    def weights(self) -> list[Array]:
        """The weights, a list of (out, in) arrays; see `npnet.lending` for what may be done with them."""
        given: Any = vars(self).get("_given", {}).get("weights")  # before there is a chain
        return self._weights.lend() if given is None else given

    @weights.setter
    def weights(self, arrays: Iterable[Array]) -> None:
        if "_chain" not in vars(self):
            self._given_first("weights", arrays)
        else:
            self._weights.replace_all(arrays)

    @property
    def biases(self) -> list[Array]:
        """The biases, a list of (out, 1) arrays; as `weights`."""
        given: Any = vars(self).get("_given", {}).get("biases")
        return self._biases.lend() if given is None else given

    @biases.setter
    def biases(self, arrays: Iterable[Array]) -> None:
        if "_chain" not in vars(self):
            self._given_first("biases", arrays)
        else:
            self._biases.replace_all(arrays)

    @np.errstate(over="ignore", invalid="ignore")
    def feedforward(self, a: Array) -> Array:
        """The network's output.

        Args:
            a: rows, (samples, sizes[0]).

        Returns:
            Columns, (sizes[-1], samples).
        """
        a = self._rows(a, self._chain.sizes[0], "a")
        for layer in self._chain.layers:
            a, _ = layer.forward(a)
        return a.T

    def evaluate(self, test_data: Pair) -> float:
        """The share of samples whose largest output is at the label, in [0, 1].

        Args:
            test_data: (x, y), rows; y one-hot.

        Raises:
            ValueError: shapes do not fit, or y is not one-hot.
        """
        x, y = self._pairs(test_data, "test_data: ")
        check_no_nan(x, "test_data: x")
        return accuracy(lambda rows: self.feedforward(rows).T, x, y)

    def cost_derivative(self, output_activations: Array, y: Array) -> Array:
        """dC/da at the output for C = sum of (a - y)^2 / 2; columns. Override it for another cost.

        Raises:
            TypeError, ValueError: the two are not arrays of numbers, or have different shapes.
        """
        output_activations, y = self._array(output_activations, "output_activations"), self._array(y, "y")
        if output_activations.shape != y.shape:
            raise ValueError(f"cost_derivative: expected equal shapes, got {output_activations.shape}, {y.shape}")
        return output_activations - y

    def backprop(self, x: Array, y: Array) -> tuple[list[Array], list[Array]]:
        """The gradient of the cost, summed over the batch.

        Args:
            x: columns, (sizes[0], batch).
            y: columns, (sizes[-1], batch).

        Returns:
            (nabla_b, nabla_w): lists in the shapes of `biases` and `weights`.
        """
        x = self._rows(self._array(x, "x").T, self._chain.sizes[0], "x.T (backprop takes columns)")
        y = self._rows(self._array(y, "y").T, self._chain.sizes[-1], "y.T (backprop takes columns)")
        check_pairs(x, y, "backprop, transposed: ")
        self._run(x, y, 1.0, None)
        nabla_b, nabla_w = [], []
        for layer in self._chain.layers:
            nabla_b.append(as_matrix(layer.bias.take_gradient()))
            nabla_w.append(layer.weight.take_gradient())
        return nabla_b, nabla_w

    def update_mini_batch(self, mini_batch: Pair, eta: float) -> None:
        """One step of gradient descent on a batch: w <- w - eta/batch * dC/dw.

        The step is linear in the gradient at the output, so eta/batch is multiplied in there, once. Each layer is
        updated as soon as its gradient is known, and the gradient is freed. (Where another `backprop` stands in its
        place, the update is made from what that returns.) The first batch is rehearsed, and so is each
        that is larger, so that memory runs out before anything is updated, if it does.

        Args:
            mini_batch: (x, y), rows.
            eta: learning rate.

        Raises:
            TrainingDiverged: the loss is not finite; the weights are as before. (What overflows in the backward
                pass itself is found by the next step's loss.)
            OutOfMemory: memory ran out; the weights are as before.
        """
        x, y = self._pairs(mini_batch, "mini_batch: ")
        rate = check_number(eta, "eta") / len(x)
        if getattr(self.backprop, "__func__", None) is _BACKPROP:
            try:
                self._run(x, y, rate, _descend)
            finally:  # after the step, in which overridden methods may have asked for the lists, too
                self._weights.take_back()
                self._biases.take_back()
            return
        nabla_b, nabla_w = check_list(self.backprop(x.T, y.T), 2, "backprop")
        biases, weights = self._biases.descended(nabla_b, rate), self._weights.descended(nabla_w, rate)
        self.biases, self.weights = biases, weights

    def _run(self, x: Array, y: Array, factor: float, after_backward: Callable[[Layer], None] | None) -> None:
        """Backpropagate ``factor`` times the cost derivative."""

        def output_gradient(output: Array) -> Array:
            derivative = self._array(self.cost_derivative(output.T, y.T), "cost_derivative").T
            if derivative.shape != output.shape:
                raise ValueError(f"cost_derivative: expected shape {output.T.shape}, got {derivative.T.shape}")
            flat = derivative.ravel(order="K")
            check_finite(dot(flat, flat))
            return derivative * factor

        clear_gradients(self._chain.layers)
        schedule = self._schedule_for(len(x), streaming=after_backward is not None)
        with explained(self._chain, schedule, x, streaming=after_backward is not None), self._limit:
            if after_backward is not None:
                self._rehearse(schedule, x)
            backpropagate(
                self._chain.layers, schedule, x, output_gradient, after_backward=after_backward, restore=self._restore
            )

    def _rehearse(self, schedule: Schedule, x: Array) -> None:
        """Once for a schedule, and for a larger batch: do all that a step does but the update, by the engine alone.

        Methods of a subclass are not called. Once more when weights are lent: each will be copied on its update.
        """
        lent = any(each.lent for lender in (self._weights, self._biases) for each in lender.parameters)
        if self._rehearsed[0] is schedule and self._rehearsed[1] >= len(x) and self._rehearsed[2] >= lent:
            return
        copies: list[Array] = []

        def prepare(layer: Layer) -> None:
            copies.extend(parameter.value.copy(order="F") for parameter in layer.parameters() if parameter.lent)

        rehearse(self._chain.layers, schedule, x, prepare)
        self._rehearsed = schedule, len(x), lent

    def _counted(self) -> list[Array]:
        """The arrays that a budget counts before a step: the parameters' but for those lent, which others hold."""
        return [
            parameter.value for layer in self._chain.layers for parameter in layer.parameters() if not parameter.lent
        ]

    def _schedule_for(self, batch_size: int, streaming: bool) -> Schedule:
        """What a pass computes, holds and recomputes; streaming: layers are updated on the way back."""
        return self._schedule

    def SGD(  # noqa: N802 - the exercise's name
        self,
        training_data: Pair,
        epochs: int,
        mini_batch_size: int,
        eta: float,
        test_data: Pair | None = None,
        log: bool = True,
    ) -> None:
        """Stochastic gradient descent, in the order of the data, whole batches only.

        Ctrl-C ends it after the step that is under way (a second one at once).

        Args:
            training_data: (x, y), rows.
            epochs: passes over the data.
            mini_batch_size: samples a step.
            eta: learning rate.
            test_data: (x, y) to `evaluate` after each epoch, when ``log`` is set. Another `evaluate` in its place may
                take other data.
            log: print a line per epoch (numbered from 0, as in the exercise).

        Raises:
            ValueError: shapes do not fit, the batch is larger than the data, or the data hold NaN.
            TrainingDiverged: the loss is not finite, with the epoch and the step.
        """
        x, y = self._pairs(training_data, "training_data: ")
        epochs, batch = check_whole(epochs, "epochs"), check_whole(mini_batch_size, "mini_batch_size", least=1)
        if batch > len(x):
            raise ValueError(f"mini_batch_size: {batch} is more than the {len(x)} training samples")
        check_no_nan(x, "training_data: x")
        check_no_nan(y, "training_data: y")
        log = check_flag(log, "log")
        if isinstance(test_data, tuple) and not test_data:
            test_data = None  # as in the exercise
        if test_data is not None and log and getattr(self.evaluate, "__func__", None) is _EVALUATE:
            test_data = self._pairs(test_data, "test_data: ")
            check_no_nan(test_data[0], "test_data: x")
            check_one_hot(test_data[1], "test_data: y")
        with Interrupts() as interrupts:
            for epoch in range(epochs):
                for step in range(len(x) // batch):
                    rows = slice(step * batch, (step + 1) * batch)
                    try:
                        self.update_mini_batch((x[rows], y[rows]), eta)
                    except TrainingDiverged as error:
                        raise TrainingDiverged(f"epoch {epoch}, step {step}, eta {eta}: {error}") from None
                    interrupts.check(interrupts.pending)
                if log and test_data is not None:
                    print(f"Epoch: {epoch}, Accuracy: {self.evaluate(test_data)}")
                elif log:
                    print(f"Epoch: {epoch}")

    def _array(self, array: Any, name: str) -> Array:
        return check_array(array, self._chain.backend, self._chain.dtype, name)

    def _rows(self, array: Array, features: int, name: str, labels: bool = False) -> Array:
        array = self._array(array, name)
        check_rows(array, features, name, labels)
        return array

    def _pairs(self, pair: Pair, name: str) -> Pair:
        try:
            x, y = pair
        except (TypeError, ValueError):
            raise TypeError(
                f"{name}expected a pair (x, y), two arrays with a row for each sample, got a {type(pair).__name__}"
            ) from None
        x, y = (
            self._rows(x, self._chain.sizes[0], f"{name}x"),
            self._rows(y, self._chain.sizes[-1], f"{name}y", labels=True),
        )
        check_pairs(x, y, name)
        return x, y


def _descend(layer: Layer) -> None:
    """w <- w - g for each parameter of the layer."""
    for parameter in layer.parameters():
        weight, gradient = along_rows(parameter.writable(), parameter.take_gradient())
        array_module(weight).subtract(weight, gradient, out=weight)


_BACKPROP, _EVALUATE = Network.backprop, Network.evaluate  # npnet's own, whatever is put in their places
