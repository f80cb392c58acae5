"""Replay what was recorded: the calls of a recording, bound to one arena (see `npnet.tracing`)."""

from bisect import insort
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npnet.backend import Array
from npnet.tracing import Buffer, Path, Recording, Traced, view

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


def places(recording: Recording) -> tuple[dict[Buffer, int], int]:
    """Where in the arena each buffer is, and how large it must be: bytes."""
    lives: dict[Buffer, tuple[int, int]] = {}
    for number, (_, arguments) in enumerate(recording.calls):
        for argument in arguments:
            if isinstance(argument, Traced) and argument.buffer.in_arena:
                whole = argument.buffer.whole
                first, _ = lives.get(whole, (number, number))
                lives[whole] = first, number
    sizes = [-(-buffer.nbytes // ALIGNMENT) * ALIGNMENT for buffer in lives]
    offsets, total = pack(sizes, list(lives.values()))
    return dict(zip(lives, offsets, strict=True)), total


class Program:
    """A recording, bound to arrays: ready to run. It keeps nothing of the recording but the calls.

    Args:
        arena: from `new_arena`; if it is too small, a new one is taken.

    Attributes:
        arena: that it runs in.
    """

    def __init__(self, recording: Recording, arena: Array | None = None) -> None:
        offsets, size = places(recording)
        self.arena = new_arena(size) if arena is None or len(arena) < size else arena
        self._calls: list[tuple[Callable[..., Any], list[Any]]] = []
        self._late: list[tuple[list[Any], int, int, Path]] = []  # arguments that are views of an input
        arrays: dict[Traced, Array] = {}
        for function, arguments in recording.calls:
            bound = list(arguments)
            for place, argument in enumerate(arguments):
                if not isinstance(argument, Traced):
                    continue
                if argument.buffer.source is not None:
                    self._late.append((bound, place, argument.buffer.source, argument.path))
                    bound[place] = None
                    continue
                if argument not in arrays:
                    arrays[argument] = view(self._array(argument.buffer, offsets), argument.path)
                bound[place] = arrays[argument]
            self._calls.append((function, bound))

    def _array(self, buffer: Buffer, offsets: dict[Buffer, int]) -> Array:
        if buffer.array is not None:
            return buffer.array
        begin = offsets[buffer.whole] + buffer.begin
        block = self.arena[begin : begin + buffer.nbytes]
        return block.view(buffer.dtype).reshape(buffer.shape, order=buffer.order)

    def __len__(self) -> int:
        """How many calls it makes."""
        return len(self._calls)

    def __call__(self, *inputs: Array) -> None:
        """Do what was recorded, on these inputs."""
        for bound, place, source, path in self._late:
            bound[place] = view(inputs[source], path)
        for function, arguments in self._calls:
            function(*arguments)
        for bound, place, *_ in self._late:  # the inputs are the caller's
            bound[place] = None


def listing(recording: Recording) -> str:
    """The calls, a line each: function, arguments, and last what it writes to; ``@128`` is at byte 128 of the arena."""
    offsets, total = places(recording)

    def text(argument: Any) -> str:
        if not isinstance(argument, Traced):
            if isinstance(argument, np.ndarray):
                return "ones" if argument.ndim else "factor" if argument.flags.writeable else str(argument)
            return str(argument)
        buffer = argument.buffer
        place = buffer.name or f"@{offsets[buffer.whole] + buffer.begin}"
        return f"{place}[{', '.join(map(str, argument.shape))}]"

    lines = [f"{len(recording.calls)} calls in {total} bytes"]
    for function, arguments in recording.calls:
        name = getattr(function, "__qualname__", function.__name__).split(".")[-1].strip("_")
        lines.append(f"{name:12} {'  '.join(map(text, arguments))}")
    return "\n".join(lines)


def new_arena(size: int) -> Array:
    """So many bytes, aligned."""
    block = np.empty(size + ALIGNMENT, np.uint8)
    begin = -block.ctypes.data % ALIGNMENT
    return block[begin : begin + size]
