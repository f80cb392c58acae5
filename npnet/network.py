"""The lab's network: dense sigmoid layers and the quadratic cost (with checkpointing: next file).

A thin face over the engine, with the names and conventions of the lab exercise that npnet serves: an MLP after Nielsen,
"Neural Networks and Deep Learning", 2015, chapters 1 and 2, to be given checkpointing. x and y come as rows, (samples,
features), into `Network.SGD`, `update_mini_batch` and `evaluate`, as columns into `backprop` and whatever it calls.

What npnet needs besides the exercise's names is in ``network._npnet``, a `npnet.dense_chain.DenseChain`.
"""

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from npnet.backend import Array, Backend, along_rows, array_module, backend_of, to_host
from npnet.checks import (
    check_array,
    check_flag,
    check_list,
    check_no_nan,
    check_number,
    check_one_hot,
    check_rows,
    check_whole,
)
from npnet.dense_chain import LISTS, DenseChain, as_given, is_own, two
from npnet.interrupts import Interrupts
from npnet.layer import Layer, Pair
from npnet.layers import Dense
from npnet.lending import Lent, Shown, descended
from npnet.losses import TrainingDiverged, accuracy
from npnet.parameter import Parameter
from npnet.random import RNG, as_generator
from npnet.savable import Savable


class Network(Savable):
    """A chain of dense sigmoid layers with the quadratic cost, trained by stochastic gradient descent.

    A subclass may leave out ``super().__init__`` if its own ``__init__`` sets ``weights`` and ``biases``, as in the
    exercise; they are then float64. Every method may be replaced: on the class, in a subclass, on one network. Which
    method calls which is as in the exercise.

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
        vars(self).pop("_npnet", None)  # of an __init__ before this one
        chain = self._npnet
        chain.make(sizes, dtype, backend, draw)
        self.sizes = chain.sizes.copy()
        self.num_layers = len(self.sizes)  # as the exercise counts: the input is a layer, too
        for name in LISTS:
            if type(getattr(type(self), name)) is not Lent:  # the subclass keeps the list itself
                setattr(self, name, chain.lenders[name].lend())

    @cached_property
    def _npnet(self) -> DenseChain:
        return DenseChain()

    weights: list[Array] = Lent("weights", "The weights, (out, in) each; for what may be done see `npnet.lending`.")  # type: ignore[assignment]
    biases: list[Array] = Lent("biases", "The biases, (out, 1) each; as `weights`.")  # type: ignore[assignment]

    @Shown
    def layers(self) -> list[Dense]:
        """The dense layers."""
        return self._npnet.ready(self).layers

    @Shown
    def dtype(self) -> np.dtype[Any]:
        """Of parameters and activations."""
        return self._npnet.ready(self).dtype

    @Shown
    def backend(self) -> Backend:
        """Where its arrays are."""
        return self._npnet.ready(self).backend

    def __repr__(self) -> str:
        chain = self._npnet
        return f"{type(self).__name__}({chain.sizes if chain.layers else getattr(self, 'sizes', '')})"

    def __copy__(self) -> "Network":
        """A copy that trains alone, as a copy of the exercise's network does."""
        return copy.deepcopy(self)

    def config(self) -> dict[str, Any]:
        config = super().config()
        if type(self).__init__ in OWN_INITS:  # whatever the student has made of the attribute
            config["sizes"] = self._npnet.sizes
        return config

    def named_parameters(self) -> dict[str, Parameter]:
        """All parameters: "0.weight", "0.bias" and so on."""
        layers = enumerate(self._npnet.ready(self).layers)
        return {f"{i}.{name}": each for i, layer in layers for name, each in layer.named_parameters().items()}

    @np.errstate(over="ignore", invalid="ignore")
    def feedforward(self, a: Array) -> Array:
        """The network's output.

        Args:
            a: rows, (samples, sizes[0]).

        Returns:
            Columns, (sizes[-1], samples).
        """
        chain = self._npnet.ready(self)
        a = chain.rows(a, chain.sizes[0], "a")
        for layer in chain.layers:
            a, _ = layer.forward(a)
        return a.T

    def evaluate(self, test_data: Pair) -> float:
        """The share of samples whose largest output is at the label, in [0, 1].

        Args:
            test_data: (x, y), rows; y one-hot. Where another `feedforward` stands in its place, x is what that takes.

        Raises:
            ValueError: shapes do not fit, or y is not one-hot.
        """
        if is_own(self.feedforward, self, _FEEDFORWARD):
            x, y = self._npnet.ready(self).pairs(test_data, "test_data: ")
            check_no_nan(x, "test_data: x")
            return accuracy(lambda rows: self.feedforward(rows).T, x, y)
        x, y = as_given(test_data, "test_data: ")
        output = self.feedforward(x)  # of all samples at once, as in the exercise
        if isinstance(output, (list, tuple)):
            output = to_host(output)
        y = check_array(y, backend_of(output), output.dtype, "test_data: y")
        check_rows(y, len(output), "test_data: y", labels=True)
        return accuracy(lambda rows: rows, output.T, y)

    def cost_derivative(self, output_activations: Array, y: Array) -> Array:
        """dC/da at the output for C = sum of (a - y)^2 / 2; columns. Override it for another cost.

        Raises:
            TypeError, ValueError: the two are not arrays of numbers, or have different shapes.
        """
        chain = self._npnet if self._npnet.layers else self._npnet.ready(self)  # in a step, it is ready
        output_activations, y = chain.array(output_activations, "output_activations"), chain.array(y, "y")
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
        return self._npnet.ready(self).gradients(self, x, y, checkpointed=False)

    def update_mini_batch(self, mini_batch: Pair, eta: float) -> None:
        """One step of gradient descent on a batch: w <- w - eta/batch * dC/dw.

        The step is linear in the gradient at the output, so eta/batch is multiplied in there, once. Each layer is
        updated as soon as its gradient is known, and the gradient is freed. (Where another `backprop` stands in its
        place, the update is made from what that returns.) The first batch is rehearsed, and so is each that is larger,
        so that memory runs out before anything is updated, if it does.

        Args:
            mini_batch: (x, y), rows. Where another `backprop` stands in its place, x and y are what that takes.
            eta: learning rate.

        Raises:
            TrainingDiverged: the loss is not finite; the weights are as before. (What overflows in the backward
                pass itself is found by the next step's loss.)
            OutOfMemory: memory ran out; the weights are as before.
        """
        chain = self._npnet
        checkpointed = chain.checkpointed(self, _BACKPROP)
        if checkpointed is None:
            x, y = as_given(mini_batch, "mini_batch: ")
        else:
            x, y = chain.ready(self).pairs(mini_batch, "mini_batch: ")
        rate = check_number(eta, "eta") / len(x)
        if checkpointed is not None and not chain.foreign:
            try:
                chain.run(self, x, y, rate, _descend, checkpointed)
            finally:  # after the step, in which overridden methods may have asked for the lists, too
                chain.take_back()
            return
        nabla_b, nabla_w = check_list(self.backprop(x.T, y.T), 2, "backprop")
        biases, weights = (
            descended("biases", self.biases, nabla_b, rate),
            descended("weights", self.weights, nabla_w, rate),
        )
        self.biases, self.weights = biases, weights

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
            training_data: (x, y), rows. Where another `update_mini_batch` or `backprop` stands in its place, x and y
                are what that takes.
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
        read = self._npnet.checkpointed(self, _BACKPROP) is not None and is_own(self.update_mini_batch, self, _UPDATE)
        if read:
            x, y = self._npnet.ready(self).pairs(training_data, "training_data: ")
        else:
            x, y = as_given(training_data, "training_data: ")
        epochs, batch = check_whole(epochs, "epochs"), check_whole(mini_batch_size, "mini_batch_size", least=1)
        if batch > len(x):
            raise ValueError(f"mini_batch_size: {batch} is more than the {len(x)} training samples")
        if read:
            check_no_nan(x, "training_data: x")
            check_no_nan(y, "training_data: y")
        log = check_flag(log, "log")
        if isinstance(test_data, (tuple, list)) and not test_data:
            test_data = None  # as in the exercise
        if test_data is not None:
            test_data = two(test_data, "test_data: ")
            evaluates = log and is_own(self.evaluate, self, _EVALUATE)
            if evaluates and is_own(self.feedforward, self, _FEEDFORWARD):  # refuse it before an epoch, not after
                test_data = self._npnet.ready(self).pairs(test_data, "test_data: ")
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


def _descend(layer: Layer) -> None:
    """w <- w - g for each parameter of the layer."""
    for parameter in layer.parameters():
        weight, gradient = along_rows(parameter.writable(), parameter.take_gradient())
        array_module(weight).subtract(weight, gradient, out=weight)


# npnet's own, whatever is put in their places
_FEEDFORWARD, _EVALUATE = Network.feedforward, Network.evaluate
_BACKPROP, _UPDATE = Network.backprop, Network.update_mini_batch
OWN_INITS: list[Any] = [Network.__init__]
