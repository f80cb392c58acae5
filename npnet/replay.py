"""Replay what was recorded: the calls of a recording, bound to one arena (see `npnet.tracing`)."""

from bisect import insort
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npnet.backend import Array
from npnet.tracing import Buffer, Recording, Traced

ALIGNMENT = 64  # bytes: a cache line


def pack(sizes: Sequence[int], lives: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Places in the arena for buffers, so that those alive together do not overlap.

    In the order of time, each buffer takes the smallest hole that it fits in, or the arena grows ("best fit": Knuth,
    "The Art of Computer Programming", volume 1, section 2.5).

    Args:
        sizes: of the buffers, bytes.
        lives: the first and the last call of each.

    Returns:
        Their offsets, and the size of the arena: bytes.

    >>> pack([64, 64, 64], [(0, 1), (1, 2), (2, 3)])
    ([0, 64, 0], 128)
    """
    offsets, total = [0] * len(sizes), 0
    holes: list[tuple[int, int]] = []  # (begin, end), in order, never touching
    ending: list[tuple[int, int]] = []  # (last call, buffer), of those alive
    for buffer in sorted(range(len(sizes)), key=lambda number: lives[number]):
        first, last = lives[buffer]
        while ending and ending[0][0] < first:
            gone = ending.pop(0)[1]
            holes = _freed(holes, offsets[gone], offsets[gone] + sizes[gone])
        fitting = [(end - begin, begin) for begin, end in holes if end - begin >= sizes[buffer]]
        if fitting:
            size, begin = min(fitting)
        else:
            begin = holes.pop()[0] if holes and holes[-1][1] == total else total
            size = sizes[buffer]
            total = begin + size
        offsets[buffer] = begin
        holes = [hole for hole in holes if hole[0] != begin]
        if size > sizes[buffer]:
            insort(holes, (begin + sizes[buffer], begin + size))
        insort(ending, (last, buffer))
    return offsets, total


def _freed(holes: list[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    """The holes with one more, joined to those that it touches."""
    apart = []
    for hole in holes:
        if hole[1] == begin:
            begin = hole[0]
        elif hole[0] == end:
            end = hole[1]
        else:
            apart.append(hole)
    insort(apart, (begin, end))
    return apart


class Program:
    """A recording, ready to run.

    Attributes:
        bytes: of the arena that it needs.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        lives: dict[Buffer, tuple[int, int]] = {}
        for number, (_, arguments) in enumerate(recording.calls):
            for argument in arguments:
                if isinstance(argument, Traced):
                    first, _ = lives.get(argument.buffer, (number, number))
                    lives[argument.buffer] = first, number
        sizes = [-(-buffer.nbytes // ALIGNMENT) * ALIGNMENT for buffer in lives]
        offsets, self.bytes = pack(sizes, list(lives.values()))
        self._offsets = dict(zip(lives, offsets, strict=True))

    def __len__(self) -> int:
        """How many calls it makes."""
        return len(self._recording.calls)

    def bind(self, arena: Array) -> None:
        """Let it run in ``arena``: `bytes` bytes or more, uint8, that begin at a multiple of `ALIGNMENT`."""
        self._calls: list[tuple[Callable[..., Any], list[Any]]] = []
        self._late: list[tuple[list[Any], int, Traced]] = []  # arguments that are of an input
        for function, arguments in self._recording.calls:
            bound = [self._bound(argument, arena) for argument in arguments]
            for place, argument in enumerate(arguments):
                if isinstance(argument, Traced) and argument.buffer.source is not None:
                    self._late.append((bound, place, argument))
            self._calls.append((function, bound))

    def _bound(self, argument: Any, arena: Array) -> Any:
        if not isinstance(argument, Traced):
            return argument
        buffer = argument.buffer
        if buffer.array is not None:
            return argument.resolve(buffer.array)
        if buffer.source is not None:
            return None
        begin = self._offsets[buffer]
        array = arena[begin : begin + buffer.nbytes].view(buffer.dtype).reshape(buffer.shape, order=buffer.order)
        return argument.resolve(array)

    def __call__(self, *inputs: Array) -> None:
        """Do what was recorded, on these inputs."""
        for bound, place, argument in self._late:
            bound[place] = argument.resolve(inputs[argument.buffer.source])  # type: ignore[index]
        for function, arguments in self._calls:
            function(*arguments)
        for bound, place, _ in self._late:  # the inputs are the caller's
            bound[place] = None


def new_arena(size: int) -> Array:
    """So many bytes, aligned."""
    block = np.empty(size + ALIGNMENT, np.uint8)
    begin = -block.ctypes.data % ALIGNMENT
    return block[begin : begin + size]
