"""Streams and events of a made-up CuPy: what is ordered is done when somebody waits for it, no sooner.

The guard computes at once, on the null stream. A copy on another stream is done only when an event behind it, or the
stream, is waited for: as late as it can be. Until then its target holds garbage, and then it reads and writes what is
there: an array of the host that was written too soon arrives wrong, one of the device that was let go arrives as
garbage, and a copy into one that was let go goes `astray`. And a copy may be done as early as can be: where its stream
has not waited for all that was computed before the copy was ordered, it brings garbage. So does a copy from the device
that the host reads: only a copy back sees the numbers.

Not seen: what methods and operators of arrays compute (npnet calls functions of the module), a stream that computes
besides the null stream, and a wait that is missing where a later wait does its work before anybody looks.
"""

import ctypes
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.guard import DeviceArray


class Streams:
    """Of one device: the null stream, those made, which one is current, and what happened in which order."""

    def __init__(self, syncs: Counter[str]) -> None:
        self.syncs, self.log = syncs, list[str]()
        self.in_flight: dict[int, np.ndarray] = {}  # what came from the device, by the host's address
        self.computed = 0  # calls, on the null stream
        self.astray = 0  # copies into memory that was let go
        self.null = Stream(self)
        self.current = [self.null]

    def make(self, non_blocking: bool = False) -> "Stream":
        """cupy.cuda.Stream."""
        assert non_blocking, "the null stream would wait for it"
        return Stream(self)

    def compute(self) -> None:
        """Something is computed on the current stream."""
        self.computed += self.current[-1] is self.null


class Event:
    """cupy.cuda.Event, recorded."""

    def __init__(self, stream: "Stream", position: int) -> None:
        self.stream, self.position = stream, position
        self.computed = stream.streams.computed if stream is stream.streams.null else stream.computed

    def synchronize(self) -> None:
        """The host waits."""
        if self.stream.done < self.position:
            self.stream.streams.syncs["event"] += 1
        self.stream.run(self.position)


class Stream:
    """cupy.cuda.Stream."""

    def __init__(self, streams: Streams) -> None:
        self.streams, self.ordered, self.done = streams, list[Callable[[], None]](), 0
        self.computed = 0  # calls of the null stream that it waited for

    def __enter__(self) -> "Stream":
        self.streams.current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.streams.current.pop()

    def run(self, position: int) -> None:
        """Do what was ordered up to there."""
        while self.done < position:
            work, self.ordered[self.done] = self.ordered[self.done], _nothing  # it holds arrays
            work()
            self.done += 1

    def order(self, work: Callable[[], None]) -> None:
        """Later; at once on the null stream."""
        self.ordered.append(work)
        if self is self.streams.null:
            self.run(len(self.ordered))

    def record(self) -> Event:
        """Behind all that is ordered."""
        return Event(self, len(self.ordered))

    def wait_event(self, event: Event) -> None:
        """On the device."""
        self.streams.log.append("computing waits" if self is self.streams.null else "copying waits")
        self.computed = max(self.computed, event.computed)
        self.order(lambda: event.stream.run(event.position))

    def copy(self, said: str, work: Callable[[bool], None]) -> None:
        """Order ``work``, which is told whether it may come before something that was computed before it."""
        self.streams.log.append(said)
        early = self is not self.streams.null and self.computed < self.streams.computed
        self.order(lambda: work(early))

    def synchronize(self) -> None:
        """The host waits."""
        self.streams.syncs["stream"] += self.done < len(self.ordered)
        self.run(len(self.ordered))


def _nothing() -> None: ...


def _garbage(array: np.ndarray) -> None:
    array.reshape(-1).view(np.uint8)[:] = 0xA5


def _memory(array: np.ndarray) -> Callable[[], np.ndarray | None]:
    """Gives the array, which it does not hold, or None where its memory was let go."""
    base: Any = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    owner, address = weakref.ref(base), array.__array_interface__["data"][0]
    size, shape, dtype = array.nbytes, array.shape, array.dtype

    def again() -> np.ndarray | None:
        return None if owner() is None else np.ndarray(shape, dtype, (ctypes.c_char * size).from_address(address))

    return again


def transfers(streams: Streams) -> dict[str, Callable[..., Any]]:
    """The methods ``set`` and ``get`` of a device array."""

    def set_(self: DeviceArray, source: np.ndarray, stream: Stream | None = None) -> None:
        assert (source.shape, source.dtype) == (self.shape, self.dtype)
        assert self.flags.c_contiguous
        assert source.flags.c_contiguous
        address, memory = source.__array_interface__["data"][0], _memory(self._data)

        def copy(early: bool) -> None:
            target = memory()
            if target is None:
                streams.astray += 1
            elif not early:
                target[...] = streams.in_flight.get(address, source)

        _garbage(self._data)
        (stream or streams.current[-1]).copy("copy ordered", copy)

    def get(self: DeviceArray, out: np.ndarray, stream: Stream | None = None, blocking: bool = True) -> np.ndarray:
        assert (out.shape, out.dtype) == (self.shape, self.dtype)
        address, memory = out.__array_interface__["data"][0], _memory(self._data)

        def copy(early: bool) -> None:
            source = memory()
            streams.in_flight[address] = out.copy() if source is None or early else source.copy()

        if blocking:
            streams.syncs["get"] += 1
            out[...] = self._data
        else:
            assert self.flags.c_contiguous
            assert out.flags.c_contiguous
            _garbage(out)
            (stream or streams.current[-1]).copy("copy out ordered", copy)
        return out

    return {"set": set_, "get": get}
