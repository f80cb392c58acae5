"""Batches on their way into a model; copied ahead, where the data are on the host and the model is on a GPU.

While a step computes, the next batch is copied on a stream of its own, from pinned memory, which the device reads by
itself. Two rules of CUDA keep that right: the computing stream waits for the event behind a copy, and a copy waits for
the work that was under way when it was ordered, since its memory may have been that of a batch before.
"""

from collections.abc import Callable, Iterator
from itertools import chain, cycle, islice
from typing import Any

import numpy as np

from npnet.backend import Array, Backend, to_backend
from npnet.layer import Pair
from npnet.layer_rules import read_only
from npnet.pools import made_uncounted, pinned_bytes


class Feed:
    """What a model on ``backend`` gets of data: rows on its backend, transformed.

    Data of the host go to the device as they are (bytes, say), and are transformed there. Data of a device stay there.

    Args:
        transform: of the rows of x, or None.
    """

    def __init__(self, transform: Callable[[Array], Array] | None, backend: Backend) -> None:
        self.transform, self.backend = transform, backend
        self._ahead: _Ahead | None = None  # once there is something to copy

    def __call__(self, rows: Array) -> Array:
        """Rows of x as the model gets them."""
        moved = self._moved(rows)
        if self.transform is None or not len(rows):  # a rank may have no rows
            return moved
        try:
            return self.transform(read_only(moved))
        except ValueError as error:
            if "read-only" not in str(error):
                raise
            raise ValueError(
                "transform: it changes the rows that it is given, which are your data; compute into a new array: "
                "x * 0.5 in place of x *= 0.5"
            ) from error

    def _moved(self, array: Array) -> Array:
        return to_backend(array, self.backend.name) if isinstance(array, np.ndarray) else array

    def pairs(self, batches: Iterator[Pair]) -> Iterator[Pair]:
        """Batches (x, y) as the model gets them. They are data: no limit on the device's memory counts them."""
        first = list(islice(batches, 1))
        batches = chain(first, batches)
        if hasattr(self.backend.xp, "cuda") and any(isinstance(array, np.ndarray) for pair in first for array in pair):
            self._ahead = self._ahead or _Ahead(self.backend.xp)
            batches = self._ahead.pairs(batches)
        return made_uncounted((self(x), self._moved(y)) for x, y in batches)


class _Slot:
    """Pinned memory for one batch, and the event after which it may be written again."""

    def __init__(self, xp: Any) -> None:
        self.xp, self.free = xp, None
        self.buffers = [pinned_bytes(xp, 0)] * 2  # for x, for y

    def copy(self, pair: Pair, stream: Any) -> Pair:
        """Order the copy of a batch; arrays that are on the device stay as they are."""
        if self.free is not None:
            self.free.synchronize()  # of two batches ago: done long since
        stream.wait_event(self.xp.cuda.get_current_stream().record())
        x, y = (self._ordered(number, array, stream) for number, array in enumerate(pair))
        self.free = stream.record()
        return x, y

    def _ordered(self, number: int, array: Array, stream: Any) -> Array:
        if not isinstance(array, np.ndarray):
            return array
        if self.buffers[number].nbytes < array.nbytes:
            self.buffers[number] = pinned_bytes(self.xp, array.nbytes)
        source = self.buffers[number][: array.nbytes].view(array.dtype).reshape(array.shape)
        np.copyto(source, array)
        with stream:  # so that CuPy keeps its memory apart from that of the computing stream
            target: Array = self.xp.empty(array.shape, array.dtype)
        target.set(source, stream)  # type: ignore[attr-defined]
        return target


class _Ahead:
    """The stream of the copies, and memory for two batches: the same ones for all epochs."""

    def __init__(self, xp: Any) -> None:
        self.xp, self.stream, self.slots = xp, xp.cuda.Stream(non_blocking=True), (_Slot(xp), _Slot(xp))

    def pairs(self, batches: Iterator[Pair]) -> Iterator[Pair]:
        """The batches on the device, each ordered before the one before it is given away."""
        ordered: tuple[Pair, Any] | None = None
        try:
            for pair, slot in zip(batches, cycle(self.slots), strict=False):
                before, ordered = ordered, (slot.copy(pair, self.stream), slot.free)
                if before is not None:
                    yield _arrived(before, self.xp)
            if ordered is not None:
                yield _arrived(ordered, self.xp)
        finally:
            self.stream.synchronize()  # the memory is read until then


def _arrived(ordered: tuple[Pair, Any], xp: Any) -> Pair:
    """The batch; what is computed from now on waits for it, on the device."""
    pair, event = ordered
    xp.cuda.get_current_stream().wait_event(event)
    return pair
