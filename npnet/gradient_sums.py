"""Sums of all ranks' gradients, under way while the backward pass goes on.

Backpropagation has the last layer's gradient first. Its sum over the ranks is begun at once, by an all-reduce that does
not block, and while it travels the gradients of the layers below are computed. Thin layers are sent together, since a
message takes microseconds however small it is: gradients are put into a buffer, and when that is full, its sum begins
and the next gradients go into a second one. When the second is full, too, the first one's sum must be there: its layers
are updated, and it is filled anew. So two buffers are all that communication takes, and of all gradients no more than
two buffers are alive, as where layers are updated on the way back without it.

Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", 2020,
arXiv:2006.15704, section 3.2 (whose buckets hold all gradients).
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from npnet.backend import Array, along_rows, array_module
from npnet.chain_costs import buffer_bytes
from npnet.layer import Layer
from npnet.layers import Sequential
from npnet.losses import TrainingDiverged
from npnet.model_tree import completed_after
from npnet.parameter import Buffer, Parameter
from npnet.random import new_step
from npnet.ranks import RankFailed, Ranks


class Part(NamedTuple):
    """Where in a buffer a parameter's gradient is."""

    parameter: Parameter
    view: Array  # of the buffer, in the parameter's shape and layout
    gradient: Array | None  # that the sum goes back to; None: the update takes it from the buffer


class Filled(NamedTuple):
    """A buffer under way: its request, and the layers in it."""

    request: Any
    layers: list[Layer]
    parts: list[Part]


class GradientSums:
    """The buffers of a training, and what is in them in the step under way.

    Args:
        ranks: that take part.
        layers: the chain; the same on all ranks.
        batch_size: rows of a micro-batch, on all ranks together.

    Raises:
        TypeError: the parameters are not all of one dtype.
    """

    def __init__(self, ranks: Ranks, layers: Sequence[Layer], batch_size: int) -> None:
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        dtypes = sorted({str(parameter.value.dtype) for parameter in parameters})
        if len(dtypes) > 1:
            raise TypeError(f"communicator: expected parameters of one dtype, got {', '.join(dtypes)}")
        self.ranks, self.batch_size = ranks, batch_size
        self._buffers = [
            array_module(parameters[0].value).empty(size // parameters[0].value.itemsize, parameters[0].value.dtype)
            for size in (buffer_bytes(layers) if parameters else [])
        ]
        self.start()

    def start(self) -> None:
        """Before an update: nothing has been summed."""
        self._loss: float | None = None  # of all ranks together, once they have agreed on it
        self._reset(None, str)

    def _reset(self, update: Callable[[Layer], object] | None, where: Callable[[], str]) -> None:
        self._update, self._where = update, where
        self._filling, self._used = 0, 0  # which buffer, and how many of its numbers
        self._waiting: list[Layer] = []  # whose gradients are in it
        self._parts: list[Part] = []
        self._under_way: Filled | None = None

    def begin(
        self,
        last: bool,
        update: Callable[[Layer], object] | None,
        value: float,
        weight: float,
        where: Callable[[], str],
    ) -> tuple[Callable[[Layer], None] | None, Callable[[Any], float]]:
        """Before the backward pass on a micro-batch.

        Args:
            last: of this update: its gradients, added to those of the others, are to be summed.
            update: to be called with each layer when its sums are there; they are freed after it. None keeps them in
                the parameters.
            value: the loss of the micro-batches before.
            weight: of this one in it.
            where: says, for a message, where numbers cease to be finite.

        Returns:
            What to do after each layer's backward, and with the loss before all of them.
        """
        self._reset(update, where)
        if not last:
            return None, float  # what is not finite is found with the last one

        def announce(loss: Any) -> float:
            self.ranks.announce(value + float(loss) * weight)
            return float(loss)

        return self.add, announce

    def idle(self, network: Sequential, last: bool, update: Callable[[Layer], object] | None, value: float) -> None:
        """In place of a pass on a micro-batch of which this rank has no row: its part of the gradients is zero.

        Args: as for `begin`.
        """
        new_step()  # as many as on the others
        self._reset(update, str)
        if not last:
            return
        self.ranks.announce(value)
        for parameter in network.parameters():
            if parameter.gradient is None:
                parameter.gradient = array_module(parameter.value).zeros_like(parameter.value)
        completed = completed_after(network.layers) or [[layer] for layer in network.layers]
        for layers in reversed(completed):
            for layer in layers:
                self.add(layer)

    def add(self, layer: Layer) -> None:
        """The layer's gradients are complete, and go on their way sooner or later."""
        ready = [parameter for parameter in layer.parameters() if parameter.gradient is not None]
        size = sum(parameter.value.size for parameter in ready)
        if ready and self._used + size > len(self._buffers[self._filling]):
            self._send()
        elif self._under_way is not None:
            self._under_way.request.Test()  # MPI makes progress when it is asked
        for parameter in ready:
            value, gradient = parameter.value, parameter.take_gradient()
            order: Any = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
            flat = self._buffers[self._filling][self._used : self._used + value.size]
            view = flat.reshape(value.shape, order=order)
            target, source = along_rows(view, gradient)
            target[...] = source
            self._parts.append(Part(parameter, view, None if self._update else gradient))
            self._used += value.size
        self._waiting.append(layer)

    def finish(self) -> float:
        """After the backward pass: when it returns, all sums are there, and all layers updated. The whole loss."""
        self._send()
        self._arrive()
        assert self._loss is not None, "agreed on before the first sum was begun"
        self._where = str  # what was given holds the batch
        return self._loss

    def average(self, buffers: Sequence[Buffer], share: float) -> None:
        """After a step: give the buffers the same values on all ranks, which each changed by its own rows.

        Args:
            buffers: the model's. Floating-point ones become the mean over the ranks, weighted by rows; whole numbers
                are the last rank's, which has a row of every batch.
            share: of the step's rows that were this rank's.
        """
        if not buffers:
            return
        last = float(self.ranks.rank == self.ranks.size - 1)
        shares = [last if each.value.dtype.kind in "iub" else share for each in buffers]
        xp, parts = array_module(buffers[0].value), zip(buffers, shares, strict=True)
        flat = xp.concatenate([each.value.ravel().astype(np.float64) * part for each, part in parts])
        self.ranks.wait(self.ranks.start_sum(flat))
        begin = 0
        for each in buffers:
            size = each.value.size
            each.value = flat[begin : begin + size].reshape(each.value.shape).astype(each.value.dtype)
            begin += size

    def failed(self, error: BaseException) -> None:
        """This rank's step has failed: tell the others, if they still listen. (Else `Ranks.guard` ends them.)"""
        if self._loss is not None:
            self.ranks.ending = isinstance(error, TrainingDiverged)  # found in what is the same on all ranks
        elif not self.ranks.ending:
            with suppress(RankFailed):
                if not self.ranks.announced:
                    self.ranks.announce(0.0, error)
                    self.ranks.agree(self._where)

    def _send(self) -> None:
        """Begin the sum of the buffer that was filled, and have the other one free."""
        if self._loss is None:  # the first one of the step: nothing has been updated yet
            self._loss = self.ranks.agree(self._where)
        if not self._used:
            return
        request = self.ranks.start_sum(self._buffers[self._filling][: self._used])
        filled = Filled(request, self._waiting, self._parts)
        self._arrive()
        self._under_way, self._waiting, self._parts = filled, [], []
        self._filling, self._used = (self._filling + 1) % len(self._buffers), 0

    def _arrive(self) -> None:
        """Wait for the sum that is under way, and update its layers."""
        if self._under_way is None:
            return
        request, layers, parts = self._under_way
        self.ranks.wait(request)
        for parameter, view, gradient in parts:
            if gradient is None:
                parameter.gradient = view
            else:
                target, source = along_rows(gradient, view)
                target[...] = source
                parameter.gradient = gradient
        if self._update is not None:
            for layer in layers:
                self._update(layer)
        self._under_way = None
