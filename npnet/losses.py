"""Losses: what a batch of outputs costs, and the gradient with which backpropagation starts.

Every loss is a mean over the batch, so the learning rate does not depend on the batch size. Outputs and
targets are rows of the same shape, (batch, features). Values come back as 0-d arrays: on a GPU nothing waits
for the device until somebody calls ``float()``.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from npnet.activations import Sigmoid, Softmax
from npnet.attributes import Settings
from npnet.backend import Array, array_module, backend_of, dot
from npnet.checks import (
    check_kind,
    check_one_hot,
    check_pairs,
    check_rows,
    check_whole,
    is_finite,
    rows_hint,
    warn_caller,
)
from npnet.layer import Layer
from npnet.layers import Sequential


class TrainingDiverged(ArithmeticError):
    """The loss, or what tells of it, is no longer a finite number. The step in which that is found changes nothing."""


def check_finite(value: Array | float, what: str = "the loss") -> float:
    """``value`` as a float; on a GPU this waits for the device.

    Raises:
        TrainingDiverged: it is infinite or not a number.
    """
    number = float(value)
    if not math.isfinite(number):
        raise TrainingDiverged(
            f"{what} is {number}, training has diverged and the weights are left as they were before this step; "
            "start again with a lower learning rate, or look for extreme values in the data"
        )
    return number


ACCURACY_ROWS = 1000  # rows that run at a time, so that a large test set does not set the peak


def accuracy(predict: Callable[[Array], Array], x: Array, y: Array) -> float:
    """The share of rows of which the largest output is where ``y`` has its 1, in [0, 1].

    Args:
        predict: from rows of x to rows of outputs.
        x: (samples, features).
        y: (samples, classes), one-hot.

    Raises:
        ValueError: ``y`` is not one-hot, or not as long as ``x``, or there are no samples.
        TrainingDiverged: an output is not finite.
    """
    check_pairs(x, y)
    check_one_hot(y, "y")
    if not len(x):
        raise ValueError("x: expected at least one sample, got none")
    correct = 0
    for start in range(0, len(x), ACCURACY_ROWS):
        rows = slice(start, start + ACCURACY_ROWS)
        output = predict(x[rows])
        if not is_finite(output):
            raise TrainingDiverged(
                "an output of the network is not finite; train it again with a lower learning rate, or look for "
                "extreme values in the data"
            )
        correct += int((output.argmax(axis=1) == y[rows].argmax(axis=1)).sum())
    return correct / len(x)


class Loss(Settings):
    """Calling a loss gives its value; `value_and_gradient` also its gradient with respect to the output."""

    _synonyms: ClassVar[Mapping[str, str]] = {
        "reduction": "the loss as it is: a mean over the batch",
        "weight": "add_gradients(weight=...), for a whole batch",
        "label_smoothing": "targets that are smoothed: (1 - a) * y + a / classes",
    }

    def __call__(self, output: Array, target: Array) -> Array:
        """The loss, a 0-d array."""
        return self.value_and_gradient(output, target)[0]

    def value_and_gradient(self, output: Array, target: Array) -> tuple[Array, Array]:
        """The loss, a 0-d array, and dL/d(output), a new array of the output's shape."""
        raise NotImplementedError(f"{type(self).__name__}.value_and_gradient")

    loss_arrays: ClassVar[int] = 1
    """How many arrays of the output's size `value_and_gradient` takes at its peak, the gradient included."""

    def check_targets(self, targets: Array, features: int) -> None:
        """Refuse targets that this loss cannot take; called once for a data set, not for each batch.

        Raises:
            TypeError: they are not an array of real numbers.
            ValueError: they are not rows of ``features`` numbers.
        """
        backend_of(targets)  # refuses what is no array
        if targets.dtype.kind not in "fiub":
            raise TypeError(
                f"targets: expected real numbers, got dtype {targets.dtype}; names of classes become numbers with "
                "numpy.unique(names, return_inverse=True), and these become rows with npnet.one_hot"
            )
        features = check_whole(features, "features", least=1)
        check_rows(targets, features, "targets", labels=True, classes=self._classes)

    _classes: ClassVar[bool | None] = None  # targets are classes; or numbers; or either
    _own_activation: ClassVar[type[Layer] | None] = None  # that is part of the loss

    def check_model(self, model: Layer) -> None:
        """Warn of a model that ends with the activation which this loss applies itself."""
        last: Any = check_kind(model, Layer, "model", "mlp([784, 30, 10])")
        while isinstance(last, Sequential) or type(last).__module__ in ("npnet.checkpoint", "npnet.precision"):
            last = last.inner if not isinstance(last, Sequential) else last.layers[-1] if last.layers else None
        activation = getattr(last, "activation", last)
        if self._own_activation is not None and isinstance(activation, self._own_activation):
            loss, own = type(self).__name__, self._own_activation.__name__.lower()
            warn_caller(
                f"the model ends with {activation}, but {loss} applies {own} itself, and learns badly from outputs "
                f'that are squashed: use "identity" as the last activation; the {own} of its output is a probability'
            )


def _check_pair(output: Array, target: Array, classes: bool | None) -> None:
    if backend_of(output) is not backend_of(target):
        raise TypeError(
            f"loss: the output is on backend {backend_of(output).name!r}, the target on "
            f"{backend_of(target).name!r}; move one with npnet.to_backend"
        )
    if output.ndim != 2 or output.shape != target.shape or not output.size:
        raise ValueError(
            f"loss: output and target must have the same shape, got {output.shape} and {target.shape}; "
            f"both are rows, (batch, features), at least one"
            f"{rows_hint(target, output.shape[-1], classes) if output.ndim == 2 else ''}"
        )
    if output.dtype.kind != "f" or target.dtype.kind not in "fiub":
        raise TypeError(
            f"loss: expected floating-point outputs and targets of real numbers, got {output.dtype} and {target.dtype}"
        )


class _ByFormula(Loss):
    """A loss whose value and gradient are elementwise arithmetic and sums, so that a GPU can do it as one kernel."""

    def value_and_gradient(self, output: Array, target: Array) -> tuple[Array, Array]:
        _check_pair(output, target, self._classes)
        if target.dtype != output.dtype:
            target = target.astype(output.dtype)
        return self._formula(output, target, self._scale(output))

    def _scale(self, output: Array) -> float:
        """What makes a mean of the sum."""
        raise NotImplementedError

    def _formula(self, output: Array, target: Array, scale: Any) -> tuple[Array, Array]:
        raise NotImplementedError


class _SquaredError(_ByFormula):
    """L = scale/2 * sum (output - target)^2."""

    def _formula(self, output: Array, target: Array, scale: Any) -> tuple[Array, Array]:
        xp = array_module(output)
        difference = xp.subtract(output, target)  # (batch, features)
        flat = difference.ravel()
        value = dot(flat, flat) * scale * 0.5
        xp.multiply(difference, scale, out=difference)
        return value, difference


class Quadratic(_SquaredError):
    """L = 1/(2 batch) * sum of (output - target)^2  (Nielsen, 2015, eq. 6); gradient (output - target) / batch."""

    def _scale(self, output: Array) -> float:
        return 1.0 / len(output)


class MeanSquaredError(_SquaredError):
    """L = 1/(batch * features) * sum of (output - target)^2, as ``torch.nn.MSELoss``."""

    def _scale(self, output: Array) -> float:
        return 2.0 / output.size


class SoftmaxCrossEntropy(_ByFormula):
    """L = -1/batch * sum of target * log softmax(output); gradient (softmax(output) - target) / batch.

    Takes logits, not probabilities. log softmax(z) = s - log(sum exp(s)) with s = z - max(z) never overflows.
    The gradient is the textbook one because each row of ``target`` sums to 1: one-hot, or probabilities.
    """

    loss_arrays = 2
    _classes, _own_activation = True, Softmax

    def _scale(self, output: Array) -> float:
        return 1.0 / len(output)

    def _formula(self, output: Array, target: Array, scale: Any) -> tuple[Array, Array]:
        xp = array_module(output)
        shifted = xp.subtract(output, output.max(axis=1, keepdims=True))  # (batch, classes)
        exp = xp.exp(shifted)
        total = exp.sum(axis=1, keepdims=True)  # (batch, 1)
        value = (xp.log(total).sum() - dot(target.ravel(), shifted.ravel())) * scale
        xp.divide(exp, total, out=exp)
        xp.subtract(exp, target, out=exp)
        xp.multiply(exp, scale, out=exp)
        return value, exp

    def check_targets(self, targets: Array, features: int) -> None:
        super().check_targets(targets, features)
        xp = array_module(targets)
        far = float(xp.abs(targets.sum(axis=1) - 1).max())
        if not (float(targets.min()) >= 0 and far <= 1e-3):  # written so that NaN is refused, too
            raise ValueError(
                "targets: softmax cross-entropy needs rows of probabilities (each >= 0, together 1), one-hot for "
                "class labels: npnet.one_hot(labels, classes)"
            )


class BCEWithLogits(_ByFormula):
    """L = -1/(batch * features) * sum of t log s(z) + (1 - t) log(1 - s(z)), s the sigmoid; gradient (s(z) - t) / size.

    As ``torch.nn.BCEWithLogitsLoss``: binary cross-entropy of logits, for targets in [0, 1]. Written as
    max(z, 0) - z t + log(1 + e^-|z|) it never overflows.
    """

    loss_arrays = 2
    _classes, _own_activation = False, Sigmoid

    def _scale(self, output: Array) -> float:
        return 1.0 / output.size

    def _formula(self, output: Array, target: Array, scale: Any) -> tuple[Array, Array]:
        xp = array_module(output)
        small = xp.abs(output)  # (batch, features)
        xp.negative(small, out=small)
        xp.exp(small, out=small)  # e^-|z|, in (0, 1]
        softplus = xp.log1p(small).sum() + xp.maximum(output, 0).sum()
        value = (softplus - dot(output.ravel(), target.ravel())) * scale
        gradient = xp.minimum(output, 0)
        xp.exp(gradient, out=gradient)
        xp.add(small, 1, out=small)
        xp.divide(gradient, small, out=gradient)  # s(z) = e^min(z, 0) / (1 + e^-|z|)
        xp.subtract(gradient, target, out=gradient)
        xp.multiply(gradient, scale, out=gradient)
        return value, gradient

    def check_targets(self, targets: Array, features: int) -> None:
        super().check_targets(targets, features)
        if not (float(targets.min()) >= 0 and float(targets.max()) <= 1):  # written so that NaN is refused, too
            raise ValueError("targets: binary cross-entropy needs values from 0 to 1")


LOSSES: dict[str, type[Loss]] = {
    "quadratic": Quadratic,
    "mean_squared_error": MeanSquaredError,
    "softmax_cross_entropy": SoftmaxCrossEntropy,
    "bce_with_logits": BCEWithLogits,
}
