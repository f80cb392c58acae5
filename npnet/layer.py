"""Layers that never remember.

A layer holds parameters; it holds no activation. ``forward(x)`` returns ``(y, saved)`` and
``backward(dy, saved)`` returns ``dx`` and adds into the parameters' gradients. Whoever calls ``forward``
decides what becomes of ``saved``: keep it until ``backward`` and you have ordinary backpropagation, drop it
and call ``forward`` again later and you have gradient checkpointing. The memory that training takes is the
sum of what somebody kept.

Batches are rows, (batch, features); weights are (out, in), as in PyTorch.
"""

from typing import Any, ClassVar, TypeAlias

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

    def check_gradient(self, dy: Array, y: Array) -> None:
        """Refuse a gradient that does not fit the output ``y``, before broadcasting can make it fit.

        Raises:
            ValueError: ``dy`` has another shape than ``y``.
        """
        if dy.shape != y.shape:
            raise ValueError(f"{self}: the gradient dy must have the output's shape {y.shape}, got {dy.shape}")
