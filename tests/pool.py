"""A device whose memory is counted, on a machine without a GPU: the guard's arrays in CuPy's memory pools.

`Pool` hands out blocks as ``cupy.cuda.MemoryPool`` does (cupy/cuda/memory.pyx, version 14): sizes rounded up to 512
bytes; the smallest free block that is large enough, split; joined again with its neighbours when it is freed. What is
taken from the device stays in the pool, the limit is on that, and a pool that is gone takes its memory along, whoever
still has arrays there. `install_device` makes the guard a backend called "cupy", of which every array takes its bytes
from the current allocator, and gives them back when NumPy frees it.
"""

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from npnet import backend as registry
from npnet import blocks, offload, pools
from npnet.backend import ones
from npnet.fusing import FUSED
from tests.guard import DeviceArray, GuardModule
from tests.streams import Streams, transfers

BLOCK = 512
GIB = 2**30


class OutOfMemoryError(MemoryError):
    """cupy.cuda.memory.OutOfMemoryError."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        limited = f", limit set to: {limit:,} bytes" if limit else ""
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes{limited}).")


class Device:
    """The GPU: what is taken of its memory, by pools and by libraries."""

    def __init__(self, total: int = 8 * GIB) -> None:
        self.total, self.taken, self.dangling = total, 0, 0
        self.hooks: dict[str, Any] = {}
        self.default = Pool(self)
        self.allocators: list[Callable[[int], Any]] = [self.default.malloc]
        self.next = BLOCK
        self.streams = Streams(DeviceArray.syncs)

    def take(self, size: int) -> int:
        """cudaMalloc: where it is."""
        if self.taken + size > self.total:
            raise OutOfMemoryError(size, self.taken)
        self.taken += size
        self.next += size
        return self.next - size


class Chunk:
    """A piece of what was taken from the device at once."""

    def __init__(self, begin: int, size: int) -> None:
        self.begin, self.size = begin, size
        self.prev: Chunk | None = None
        self.next: Chunk | None = None

    def split(self, size: int) -> "Chunk | None":
        """Keep ``size`` bytes of it; the rest."""
        if size == self.size:
            return None
        rest = Chunk(self.begin + size, self.size - size)
        self.size, rest.prev, rest.next = size, self, self.next
        if self.next is not None:
            self.next.prev = rest
        self.next = rest
        return rest

    def merge(self, after: "Chunk") -> None:
        """Take the next one back."""
        self.size += after.size
        self.next = after.next
        if self.next is not None:
            self.next.prev = self


class Memory:
    """cupy.cuda.MemoryPointer: gives its block back when it goes."""

    def __init__(self, pool: "Pool", chunk: Chunk) -> None:
        self.pool, self.ptr, self.size = weakref.ref(pool), chunk.begin, chunk.size

    def free(self) -> None:
        """As the destructor of CuPy's."""
        pool = self.pool()
        if pool is None:
            return
        if not pool.device.hooks:
            pool.free(self.ptr)
            return
        facts = {"device_id": 0, "mem_size": self.size, "mem_ptr": self.ptr, "pmem_id": id(self)}
        for hook in [*pool.device.hooks.values()]:
            hook.free_preprocess(**facts)
        pool.free(self.ptr)
        for hook in [*pool.device.hooks.values()]:
            hook.free_postprocess(**facts)


class Pool:
    """cupy.cuda.MemoryPool, for one device and one stream."""

    def __init__(self, device: Device) -> None:
        self.device, self.limit, self.total = device, 0, 0
        self.in_use: dict[int, Chunk] = {}
        self.bins: defaultdict[int, set[Chunk]] = defaultdict(set)

    def __del__(self) -> None:
        self.device.dangling += len(self.in_use)  # whoever uses these arrays reads what belongs to others
        self.device.taken -= self.total

    def malloc(self, size: int) -> Memory:
        """A block, as an allocator is asked for it."""
        rounded, memory = -(-size // BLOCK) * BLOCK, None
        if not self.device.hooks:
            return self._malloc(rounded)
        facts = {"device_id": 0, "size": size, "mem_size": rounded}
        for hook in [*self.device.hooks.values()]:
            hook.malloc_preprocess(**facts)
        try:
            memory = self._malloc(rounded)
        finally:
            for hook in [*self.device.hooks.values()]:
                hook.malloc_postprocess(**facts, mem_ptr=memory.ptr if memory else 0, pmem_id=id(memory))
        return memory

    def _malloc(self, size: int) -> Memory:
        if not size:
            return Memory(self, Chunk(0, 0))
        chunk = self._free_chunk(size)
        if chunk is None:
            if self.limit and self.total + size > self.limit:  # what is free, but does not fit, counts
                raise OutOfMemoryError(size, self.total, self.limit)
            chunk = Chunk(self._take(size), size)
            self.total += size
        self.in_use[chunk.begin] = chunk
        return Memory(self, chunk)

    def _take(self, size: int) -> int:
        begin = 0
        for hook in [*self.device.hooks.values()]:
            hook.alloc_preprocess(device_id=0, mem_size=size)
        try:
            begin = self.device.take(size)
        except OutOfMemoryError:
            self.free_all_blocks()
            begin = self.device.take(size)
        finally:
            for hook in [*self.device.hooks.values()]:
                hook.alloc_postprocess(device_id=0, mem_size=size, mem_ptr=begin)
        return begin

    def _free_chunk(self, size: int) -> Chunk | None:
        fitting = min((number for number, chunks in self.bins.items() if chunks and number >= size), default=None)
        if fitting is None:
            return None
        chunk = self.bins[fitting].pop()
        rest = chunk.split(size)
        if rest is not None:
            self.bins[rest.size].add(rest)
        return chunk

    def free(self, begin: int) -> None:
        """The block is free again."""
        if not begin:
            return
        chunk = self.in_use.pop(begin)
        after, before = chunk.next, chunk.prev
        if after is not None and after in self.bins[after.size]:
            self.bins[after.size].remove(after)
            chunk.merge(after)
        if before is not None and before in self.bins[before.size]:
            self.bins[before.size].remove(before)
            before.merge(chunk)
            chunk = before
        self.bins[chunk.size].add(chunk)

    def free_all_blocks(self) -> None:
        """Give the device back what is whole and free."""
        for chunks in self.bins.values():
            for chunk in [*chunks]:
                if chunk.prev is None and chunk.next is None:
                    chunks.remove(chunk)
                    self.total -= chunk.size
                    self.device.taken -= chunk.size

    def used_bytes(self) -> int:
        """In blocks that are in use."""
        return sum(chunk.size for chunk in self.in_use.values())

    def total_bytes(self) -> int:
        """Taken from the device."""
        return self.total

    def set_limit(self, size: int | None = None) -> None:
        """Of `total_bytes`."""
        self.limit = size or 0

    def get_limit(self) -> int:
        """0 is none."""
        return self.limit


def hook_class(device: Device) -> type:
    """cupy.cuda.MemoryHook."""

    class MemoryHook:
        name = "MemoryHook"

        def __enter__(self) -> Any:
            if self.name in device.hooks:
                raise KeyError(f"memory hook {self.name} already exists")
            device.hooks[self.name] = self
            return self

        def __exit__(self, *_: object) -> None:
            del device.hooks[self.name]

        def malloc_preprocess(self, **kwargs: Any) -> None: ...
        def malloc_postprocess(self, **kwargs: Any) -> None: ...
        def alloc_preprocess(self, **kwargs: Any) -> None: ...
        def alloc_postprocess(self, **kwargs: Any) -> None: ...
        def free_preprocess(self, **kwargs: Any) -> None: ...
        def free_postprocess(self, **kwargs: Any) -> None: ...

    return MemoryHook


class DeviceModule(GuardModule):
    """The guard with what npnet asks of CuPy besides arithmetic."""

    __name__ = "cupy"

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.RawKernel: Any
        self.random = SimpleNamespace(seed=lambda seed: None)

        @contextmanager
        def using_allocator(allocator: Callable[[int], Any]) -> Iterator[None]:
            device.allocators.append(allocator)
            try:
                yield
            finally:
                device.allocators.pop()

        runtime = SimpleNamespace(
            driverGetVersion=lambda: 12040,
            getDeviceCount=lambda: 1,
            runtimeGetVersion=lambda: 12040,
            getDevice=lambda: 0,
            getDeviceProperties=lambda number: {"name": b"made up"},
            deviceSynchronize=lambda: None,
            memGetInfo=lambda: (device.total - device.taken, device.total),
        )
        self.cuda = SimpleNamespace(
            MemoryHook=hook_class(device),
            MemoryPool=lambda: Pool(device),
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            runtime=runtime,
            Stream=device.streams.make,
            PinnedMemory=bytearray,
            PinnedMemoryPointer=lambda memory, offset: memory[offset:],
            get_current_stream=lambda: device.streams.current[-1],
            get_allocator=lambda: device.allocators[-1],
            using_allocator=using_allocator,
        )

    def _call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.device.streams.compute()
        return super()._call(name, function, *args, **kwargs)

    def get_default_memory_pool(self) -> Pool:
        """Where arrays go by default."""
        return self.device.default


def accounting(device: Device) -> Callable[[np.ndarray], None]:
    """Takes the bytes of each array from the current allocator, once, and gives them back when it is gone."""
    known: dict[int, weakref.ref[np.ndarray]] = {}  # weakref.finalize would take twice the time

    def gone(key: int, memory: Memory, _: Any) -> None:
        del known[key]
        memory.free()

    def account(data: np.ndarray) -> None:
        while isinstance(data.base, np.ndarray):
            data = data.base
        if id(data) not in known:
            memory = device.allocators[-1](data.nbytes)
            known[id(data)] = weakref.ref(data, partial(gone, id(data), memory))

    return account


def _erf(x: DeviceArray) -> DeviceArray:
    """cupyx.scipy.special.erf."""
    return DeviceArray(blocks.erf(x._data))


def _dot(x: DeviceArray, y: DeviceArray) -> DeviceArray:
    """cupy.cublas.dot, which takes every next number, whatever the strides."""
    if x.dtype.char not in "fd" or y.dtype != x.dtype:
        raise TypeError("invalid dtype")
    assert x.flags.c_contiguous and y.flags.c_contiguous  # noqa: PT018 - it would read others
    return DeviceArray(np.asarray(np.dot(x._data, y._data)))


CUBLAS: Any = SimpleNamespace(dot=_dot)
SPECIAL: Any = SimpleNamespace(erf=_erf)


@contextmanager
def install_device(total: int = 8 * GIB, raw_kernel: Any = None) -> Iterator[Device]:
    """Make "cupy" the guard on such a device, for a while; with a ``raw_kernel`` (tests/kernels.py) npnet fuses."""
    device = Device(total)
    module = DeviceModule(device)
    if raw_kernel is not None:
        module.RawKernel = raw_kernel
    module.syncs.clear()
    with ExitStack() as undo:
        for cls, name, _ in FUSED:
            undo.enter_context(patch.object(cls, name, vars(cls)[name]))
        undo.enter_context(_installed(device, module))
        yield device


@contextmanager
def _modules(stand_ins: dict[str, Any]) -> Iterator[None]:
    """Put these modules in place. (patch.dict would forget others imported meanwhile: then PyTorch crashes.)"""
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in before.items():
            if sys.modules.get(name) is not stand_ins[name]:
                continue  # a test has loaded the real one
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@contextmanager
def _installed(device: Device, module: DeviceModule) -> Iterator[None]:
    with (
        _modules({"cupy": module, "cupy.cublas": CUBLAS, "cupyx.scipy.special": SPECIAL}),
        patch.dict(registry._loaders),
        patch.dict(registry._loaded),
        patch.dict(registry._by_type),
        patch.object(registry, "_current", registry._current),
        patch.object(offload._stores, "free", []),  # streams and pinned memory are this device's
        patch.object(DeviceArray, "account", staticmethod(accounting(device))),
        patch.multiple(DeviceArray, create=True, **transfers(device.streams)),
    ):
        to_host = partial(module.asnumpy, order="A")
        registry.register_backend("cupy", lambda: registry.Backend("cupy", module, DeviceArray, to_host))
        registry.get_backend("cupy")
        yield


@contextmanager
def counted_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """The device with nothing on it that earlier tests have left."""
    monkeypatch.setattr(pools, "_kept", [])
    ones.cache_clear()  # these arrays live on, and would not be allocated again
    with install_device() as device:
        yield device
