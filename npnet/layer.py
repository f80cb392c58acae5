"""Layers that never remember.

A layer holds parameters; it holds no activation. ``forward(x)`` returns ``(y, saved)`` and
``backward(dy, saved)`` returns ``dx`` and adds into the parameters' gradients. Whoever calls ``forward``
decides what becomes of ``saved``: keep it until ``backward`` and you have ordinary backpropagation, drop it
and call ``forward`` again later and you have gradient checkpointing. The memory that training takes is the
sum of what somebody kept.

Batches are rows, (batch, features); weights are (out, in), as in PyTorch.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np

from npnet.backend import Array

Pair: TypeAlias = tuple[Array, Array]
"""Data to learn from, (x, y), a row per sample each: (samples, features) and (samples, outputs)."""

Saved: TypeAlias = Any
"""What backward needs of a forward pass; only the layer that made it looks inside."""


class Parameter:
    """An array that is trained, and its gradient (None until a backward pass adds one).

    ``lent`` says that somebody outside holds the array: the next update then goes to a fresh copy, so that
    an array once handed out is never changed by training.
    """

    __slots__ = ("gradient", "lent", "value")

    def __init__(self, value: Array) -> None:
        self.value = value
        self.gradient: Array | None = None
        self.lent = False

    def accumulate(self, gradient: Array) -> None:
        """Add to the gradient. The first array is kept as it is: it must belong to nobody else."""
        if self.gradient is None:
            self.gradient = gradient
        else:
            self.gradient += gradient

    def take_gradient(self) -> Array:
        """The gradient, which from then on is no longer the parameter's."""
        gradient, self.gradient = self.gradient, None
        assert gradient is not None, "no backward pass has added a gradient"
        return gradient

    def writable(self) -> Array:
        """The array that an update may overwrite (in the layout that products like best)."""
        if self.lent:
            self.value = self.value.copy(order="F")
            self.lent = False
        return self.value


class LayerCost(NamedTuple):
    """What one layer takes for one batch: bytes of arrays, and flops (an elementwise operation counts as one).

    Single rows and columns (a bias on its way, a vector of ones) are not counted.
    """

    output_shape: tuple[int, int]  # (batch, features)
    output_bytes: int
    saved_bytes: int  # of what ``saved`` holds besides input and output
    forward_bytes: int  # the most that forward takes at once besides input and output, ``saved`` included
    gradient_bytes: int  # of the gradients of the parameters
    backward_bytes: int  # the most that backward_ takes at once besides what it is given: gradients and dx included
    forward_flops: int
    backward_flops: int


class Layer:
    """One link of a chain: a_l = f_l(a_{l-1}), with its derivative."""

    output_suffices: ClassVar[bool] = False
    """True where ``saved`` is just ``(x, y)``: whoever holds input and output needs nothing else for backward."""

    def forward(self, x: Array) -> tuple[Array, Saved]:
        """The output for ``x``, and what ``backward`` will need. Does not change ``x``.

        Called again with the same ``x`` in the same training step it must give the same output, or checkpointing
        computes the gradient of another function: a layer that draws random numbers has to draw the same again.
        """
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def backward(self, dy: Array, saved: Saved) -> Array:
        """The gradient at the input, dx, from that at the output, ``dy``; adds into the parameters' gradients."""
        raise NotImplementedError(f"{type(self).__name__}.backward")

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array | None:
        """As `backward`, but free to overwrite ``dy`` and, without ``needs_dx``, to skip dx.

        This is what the engine calls: the gradient that it passes down belongs to nobody else.
        """
        return self.backward(dy, saved)

    def parameters(self) -> list[Parameter]:
        """The parameters, in a fixed order."""
        return []

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

    def check_gradient(self, dy: Array, y: Array) -> None:
        """Refuse a gradient that does not fit the output ``y``, before broadcasting can make it fit.

        Raises:
            ValueError: ``dy`` has another shape than ``y``.
        """
        if dy.shape != y.shape:
            raise ValueError(f"{self}: the gradient dy must have the output's shape {y.shape}, got {dy.shape}")


def needs_saved(layers: Sequence[Layer]) -> frozenset[int]:
    """The numbers, from 1, of the layers whose backward pass needs more than their input and output."""
    return frozenset(number for number, layer in enumerate(layers, 1) if not layer.output_suffices)
