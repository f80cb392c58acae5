"""Memory on a device: pools of our own, their peak, and a limit.

CuPy takes memory from the device once and hands it out again and again, from a pool, in blocks of 512 bytes. A pool
keeps no peak, but calls hooks at every allocation. Its own limit is on what it has taken from the device, what lies
free in pieces included: whether a step keeps to that depends on what was cached before. So npnet limits what is in use.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np

from npnet.backend import Array, Backend, backend_of

T = TypeVar("T")

BLOCK = 512
"""Bytes: each array takes a whole number of these from a device's memory pool."""


def block_bytes(array: Any) -> int:
    """To a multiple of how many bytes the backend of ``array`` rounds sizes up: `BLOCK` on a device, 1 on NumPy."""
    return BLOCK if hasattr(backend_of(array).xp, "cuda") else 1


def in_blocks(count: int, block: int = BLOCK) -> int:
    """So many bytes, rounded up.

    >>> in_blocks(1), in_blocks(1024), in_blocks(1000, 1)
    (512, 1024, 1000)
    """
    return -(-count // block) * block


class OwnPool:
    """A memory pool for what is allocated in this thread while it is entered; it may be entered again later.

    Inside another one it takes from that one's pool, whose limit goes on.

    Args:
        xp: CuPy.
        limit: bytes that may come to be in use from entering it on, or None.

    Attributes:
        pool: the ``cupy.cuda.MemoryPool``, once it was entered.
    """

    pool: Any
    outer: "OwnPool | None"

    def __init__(self, xp: Any, limit: int | None = None) -> None:
        self.xp, self.limit, self._own = xp, limit, xp.cuda.MemoryPool()

    def malloc(self, size: int) -> Any:
        """The allocator.

        Raises:
            MemoryError: CuPy's, as where the device has no more.
        """
        if self.limit is not None:
            used = self.pool.used_bytes() - self._base
            if used + in_blocks(size) > self.limit:
                raise self.xp.cuda.memory.OutOfMemoryError(size, used, self.limit)
        return (self.pool if self.outer is None else self.outer).malloc(size)

    def __enter__(self) -> "OwnPool":
        self.outer = _active.innermost
        self.pool = self._own if self.outer is None else self.outer.pool
        self._base = self.pool.used_bytes()
        self._allocator: AbstractContextManager[Any] = self.xp.cuda.using_allocator(self.malloc)
        self._allocator.__enter__()
        _active.innermost = self
        return self

    def __exit__(self, *error: Any) -> None:
        _active.innermost = self.outer
        self._allocator.__exit__(*error)
        _keep(self.pool)


class HardBudget:
    """While it is entered, no more than ``budget`` bytes may be in use on a device (see `OwnPool`); on NumPy, nothing.

    Args:
        backend: that of the arrays.
        budget: bytes, or None.
        arrays: returns the arrays that are there already when it is entered, and are part of the budget.
    """

    def __init__(self, backend: Backend, budget: int | None, arrays: Callable[[], list[Array]]) -> None:
        self.backend, self.arrays = backend, arrays
        self.budget = budget if hasattr(backend.xp, "cuda") else None
        self._pool: OwnPool | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pool": None}  # a copy takes a pool of its own

    def __enter__(self) -> None:
        if self.budget is None:
            return
        self._pool = self._pool or OwnPool(self.backend.xp)
        self._pool.limit = max(self.budget - sum(in_blocks(array.nbytes) for array in self.arrays()), 0)
        self._pool.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.budget is not None and self._pool is not None:
            self._pool.__exit__(*error)


class _Active(threading.local):
    innermost: OwnPool | None = None


_active = _Active()
_kept: list[Any] = []


def _keep(pool: Any) -> None:
    """Let no pool go while arrays are in it: it would take their memory along."""
    _kept[:] = [each for each in _kept if each is not pool and each.used_bytes()]
    if pool.used_bytes():
        _kept.append(pool)


def uncounted() -> AbstractContextManager[Any]:
    """Inside it, this thread allocates in CuPy's default pool, which no limit counts: the caller's data."""
    innermost = _active.innermost
    if innermost is None:
        return nullcontext()
    return innermost.xp.cuda.using_allocator(innermost.xp.get_default_memory_pool().malloc)


def made_uncounted(items: Iterator[T]) -> Iterator[T]:
    """The items, each of which is made `uncounted`: batches of data."""
    while True:
        with uncounted():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def pinned_bytes(xp: Any, count: int) -> Array:
    """So many bytes of the host's memory, which the device reads and writes by itself while the host goes on."""
    memory = xp.cuda.PinnedMemory(max(count, 1))  # CuPy's pool would take the next power of two
    return np.frombuffer(xp.cuda.PinnedMemoryPointer(memory, 0), np.uint8, count)


def peak_of_pools(xp: Any, call: Callable[[], Any]) -> tuple[Any, int, int, int, int]:
    """Call, in a pool of its own.

    Returns:
        (result, before, most, pool, others): what the call returned, and bytes: in use before it; the most in use
        during it; what its pool took from the device, pieces that lie free included; what others took meanwhile (CUDA,
        and libraries for their workspace).
    """
    free = xp.cuda.runtime.memGetInfo()[0]
    with OwnPool(xp) as own:
        default = xp.get_default_memory_pool()
        base = default.used_bytes() + own.pool.used_bytes()
        before, by_default = own.pool.total_bytes(), default.total_bytes()
        try:
            with _counting(xp) as count:
                result = call()
            pool = own.pool.total_bytes() - before
            others = free - xp.cuda.runtime.memGetInfo()[0] - pool - (default.total_bytes() - by_default)
        finally:
            if own.outer is None:
                own.pool.free_all_blocks()
    return result, base, base + count.most, pool, max(others, 0)


@contextmanager
def _counting(xp: Any) -> Iterator[Any]:
    """A hook that adds up what is allocated and freed in this thread, whichever pool it comes from."""

    class Count(xp.cuda.MemoryHook):  # type: ignore[misc]
        name = "npnet.measure_peak"
        now = most = 0

        def malloc_postprocess(self, mem_size: int, mem_ptr: int, **_: Any) -> None:
            if mem_ptr:  # there was memory
                self.now += mem_size
                self.most = max(self.most, self.now)

        def free_postprocess(self, mem_size: int, **_: Any) -> None:
            self.now -= mem_size

    with Count() as count:
        yield count
