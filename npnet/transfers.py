"""Activations between a GPU and the host's pinned memory, copied while the GPU computes.

The copies are ordered one after another, on a stream of their own. The arrays' memory is the computing stream's: CuPy's
pool hands it out there again as soon as an array is let go. Two rules keep that right:

* a copy waits for all that was computed before it was ordered: what goes out is complete by then, and nobody uses the
  memory any more into which something comes back;
* before an array is used, or let go, the computing stream waits for its copy.

It is the device that waits, never the host. At most one activation is on its way out: until the next one goes, or any
is fetched. What went out last comes back first, so with each that is fetched the copy of the next one begins; the very
first has not left yet. `npnet.pricing.timeline` counts what is on its way.
"""

from contextlib import suppress
from typing import Any

from npnet.backend import Array
from npnet.pools import pinned_bytes


class OffloadError(OSError):
    """An activation could not be moved out of memory, or back."""


class Moved:
    """An activation in pinned memory, or on its way there or back. The host itself does not read that memory."""

    array: Any  # on the device, while it is on its way
    copied: Any  # the event behind its latest copy

    def __init__(self, transfers: "Transfers", buffer: Array, array: Any, transposed: bool) -> None:
        self.transfers, self.buffer, self.array = transfers, buffer, array
        self.transposed = transposed  # it was in Fortran order
        self.on_host: Array = buffer.view(array.dtype).reshape(array.shape)


class Transfers:
    """The copies of one GPU.

    Args:
        xp: CuPy.
    """

    def __init__(self, xp: Any) -> None:
        self._xp, self._stream = xp, xp.cuda.Stream(non_blocking=True)
        self._out: dict[Moved, None] = {}  # in order; holds whatever a copy reads or writes
        self._leaving: Moved | None = None
        self._ahead: Moved | None = None
        self._free: dict[int, list[Array]] = {}  # pinned memory by its size, of steps before

    def __del__(self) -> None:
        with suppress(Exception):  # of a CUDA that is gone already
            self._stream.synchronize()  # others get the pinned memory next

    def send(self, array: Any) -> Moved:
        """Order the copy to the host; the array's memory goes with the next `send` or `fetch`.

        Raises:
            OffloadError: the host has no pinned memory left.
        """
        self._let_leave()
        transposed = bool(array.flags.f_contiguous and not array.flags.c_contiguous)
        straight = array.T if transposed else self._xp.ascontiguousarray(array)
        moved = Moved(self, self._pinned(array.nbytes), straight, transposed)
        self._out[moved], self._leaving = None, moved
        self._wait_for_computing()
        straight.get(stream=self._stream, out=moved.on_host, blocking=False)
        moved.copied = self._stream.record()
        return moved

    def fetch(self, moved: Moved) -> Array:
        """The array again, for the computing stream; and order the copy of the one that went out before it."""
        if moved is not self._leaving:
            self._let_leave()
        if moved.array is None:
            self._order_back(moved)
        array = self._arrived(moved)
        if moved is self._leaving:  # it never left
            self._leaving = None
        if moved is self._ahead:
            self._ahead = None
        del self._out[moved]
        self._free[moved.buffer.nbytes].append(moved.buffer)  # what is copied there next is ordered after this
        if self._out and self._ahead is None:
            self._ahead = next(reversed(self._out))
            self._order_back(self._ahead)
        return array.T if moved.transposed else array

    def clear(self) -> None:
        """Forget all. If a pass was broken off, the host waits for its copies: their memory is used again."""
        if self._out:
            self._stream.synchronize()
        for moved in self._out:
            self._free[moved.buffer.nbytes].append(moved.buffer)
        self._out, self._leaving, self._ahead = {}, None, None

    def _let_leave(self) -> None:
        """What is on its way out is let go."""
        if self._leaving is not None:
            self._arrived(self._leaving)
            self._leaving = None

    def _order_back(self, moved: Moved) -> None:
        moved.array = self._xp.empty(moved.on_host.shape, moved.on_host.dtype)
        self._wait_for_computing()
        moved.array.set(moved.on_host, self._stream)
        moved.copied = self._stream.record()

    def _wait_for_computing(self) -> None:
        self._stream.wait_event(self._xp.cuda.get_current_stream().record())

    def _arrived(self, moved: Moved) -> Any:
        """The array, for the computing stream to use or to let go."""
        self._xp.cuda.get_current_stream().wait_event(moved.copied)
        array, moved.array = moved.array, None
        return array

    def _pinned(self, size: int) -> Array:
        free = self._free.setdefault(size, [])
        try:
            return free.pop() if free else pinned_bytes(self._xp, size)
        except (RuntimeError, MemoryError) as error:  # CuPy's CUDARuntimeError
            raise OffloadError(0, f"no pinned memory on the host for {size} bytes ({error})") from error
