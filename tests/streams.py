"""Streams and events of a made-up CuPy: what is ordered is done when somebody waits for it, no sooner.

The guard computes at once, on the null stream. A copy on another stream is done only when an event behind it, or the
stream, is waited for; until then its target holds garbage. It reads the host's memory when it is done, not when it is
ordered: memory that is written too soon arrives wrong. A copy from the device that nobody waits for leaves garbage in
the host's memory, which only a copy back, on the same stream, sees the numbers of.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.guard import DeviceArray


class Streams:
    """Of one device: the null stream, those made, which one is current, and what happened in which order."""

    def __init__(self, syncs: Counter[str]) -> None:
        self.syncs, self.log = syncs, list[str]()
        self.in_flight: dict[int, np.ndarray] = {}  # by the host's address
        self.null = Stream(self)
        self.current = [self.null]

    def make(self, non_blocking: bool = False) -> "Stream":
        """cupy.cuda.Stream."""
        assert non_blocking, "the null stream would wait for it"
        return Stream(self)


class Event:
    """cupy.cuda.Event, recorded."""

    def __init__(self, stream: "Stream", position: int) -> None:
        self.stream, self.position = stream, position

    def synchronize(self) -> None:
        """The host waits."""
        if self.stream.done < self.position:
            self.stream.streams.syncs["event"] += 1
        self.stream.run(self.position)


class Stream:
    """cupy.cuda.Stream."""

    def __init__(self, streams: Streams) -> None:
        self.streams, self.ordered, self.done = streams, list[Callable[[], None]](), 0
        self.before: Stream | None = None

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
        self.order(lambda: event.stream.run(event.position))

    def synchronize(self) -> None:
        """The host waits."""
        self.streams.syncs["stream"] += self.done < len(self.ordered)
        self.run(len(self.ordered))


def _nothing() -> None: ...


def _garbage(array: np.ndarray) -> None:
    array.reshape(-1).view(np.uint8)[:] = 0xA5


def transfers(streams: Streams) -> dict[str, Callable[..., Any]]:
    """The methods ``set`` and ``get`` of a device array."""

    def set_(self: DeviceArray, source: np.ndarray, stream: Stream | None = None) -> None:
        assert (source.shape, source.dtype) == (self.shape, self.dtype)
        assert self.flags.c_contiguous
        assert source.flags.c_contiguous
        stream = stream or streams.current[-1]
        address = source.__array_interface__["data"][0]

        def copy() -> None:
            self._data[...] = streams.in_flight.get(address, source)

        _garbage(self._data)
        streams.log.append("copy ordered")
        stream.order(copy)

    def get(self: DeviceArray, out: np.ndarray, blocking: bool = True) -> np.ndarray:
        assert (out.shape, out.dtype) == (self.shape, self.dtype)
        address = out.__array_interface__["data"][0]
        if blocking:
            streams.syncs["get"] += 1
            out[...] = self._data
        else:
            streams.in_flight[address] = self._data.copy()
            _garbage(out)
        return out

    return {"set": set_, "get": get}
