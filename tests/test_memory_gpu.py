"""The peak of CuPy's memory pool, from its own hooks: of a made-up CuPy, and of the real one where there is a GPU."""

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import npnet
from npnet.memory import measure_peak
from tests.scenarios import fresh_registry as fresh_registry


class Pool:
    """CuPy's memory pool as npnet uses it: bytes in blocks of 512, and hooks that hear of each allocation."""

    def __init__(self) -> None:
        self.used = 0
        self.hooks: dict[str, Any] = {}

    def used_bytes(self) -> int:
        return self.used

    def malloc(self, size: int) -> int:
        block = -(-size // 512) * 512
        facts = {"device_id": 0, "size": size, "mem_size": block}
        for hook in self.hooks.values():
            hook.malloc_preprocess(**facts)
        self.used += block
        for hook in self.hooks.values():
            hook.malloc_postprocess(**facts, mem_ptr=1, pmem_id=1)
        return block

    def free(self, block: int) -> None:
        for hook in self.hooks.values():
            hook.free_preprocess(device_id=0, mem_size=block, mem_ptr=1, pmem_id=1)
        self.used -= block
        for hook in self.hooks.values():
            hook.free_postprocess(device_id=0, mem_size=block, mem_ptr=1, pmem_id=1)


def hook_class(pool: Pool) -> type:
    class MemoryHook:
        """cupy.cuda.MemoryHook."""

        name = "MemoryHook"

        def __enter__(self) -> Any:
            if self.name in pool.hooks:
                raise KeyError(f"memory hook {self.name} already exists")
            pool.hooks[self.name] = self
            return self

        def __exit__(self, *_: object) -> None:
            del pool.hooks[self.name]

        def malloc_preprocess(self, **kwargs: Any) -> None: ...
        def malloc_postprocess(self, **kwargs: Any) -> None: ...
        def alloc_preprocess(self, **kwargs: Any) -> None: ...
        def alloc_postprocess(self, **kwargs: Any) -> None: ...
        def free_preprocess(self, **kwargs: Any) -> None: ...
        def free_postprocess(self, **kwargs: Any) -> None: ...

    return MemoryHook


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """The memory pool of a made-up cupy with a GPU."""
    pool, cupy = Pool(), ModuleType("cupy")
    runtime = SimpleNamespace(driverGetVersion=lambda: 12040, getDeviceCount=lambda: 1)
    cupy.__dict__.update(
        cuda=SimpleNamespace(runtime=runtime, MemoryHook=hook_class(pool)),
        get_default_memory_pool=lambda: pool,
        ndarray=type("ndarray", (), {}),
        asnumpy=np.asarray,
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    yield pool
    assert not pool.hooks


def on_the_device(pool: Pool, count: int) -> str:
    """Blocks of count, 2 count, 4 count bytes, of which at most the last two are alive together."""
    a = pool.malloc(count)
    pool.free(a)
    b = pool.malloc(2 * count)
    c = pool.malloc(4 * count)
    pool.free(b)
    pool.malloc(count)
    pool.free(c)
    return "result"


def test_peak_of_the_pool_is_exact(pool: Pool) -> None:
    pool.malloc(3 * 512)
    for backend in ("cupy", None):
        with npnet.use_backend("cupy"):
            report = measure_peak(on_the_device, pool, 1024, backend=backend)
        assert report.increase_bytes == 6 * 1024
        assert (report.result, report.method) == ("result", "cupy pool")
    assert report.baseline_bytes == 3 * 512 + 1024  # the first call left a block of 1024
    assert report.peak_bytes == report.baseline_bytes + 6 * 1024
    assert measure_peak(on_the_device, pool, 1000, backend="cupy").increase_bytes == 512 * (4 + 8)
    assert measure_peak(on_the_device, pool, 1024, backend="numpy").method == "tracemalloc"


def test_a_pool_that_only_shrinks_has_its_peak_at_the_start(pool: Pool) -> None:
    block = pool.malloc(2048)
    report = measure_peak(pool.free, block, backend="cupy")
    assert (report.baseline_bytes, report.peak_bytes, report.increase_bytes) == (2048, 2048, 0)


def test_the_hook_goes_also_by_an_exception(pool: Pool) -> None:
    with pytest.raises(ZeroDivisionError):
        measure_peak(lambda: 1 / 0, backend="cupy")
    assert not pool.hooks
    with pytest.raises(RuntimeError, match="another measurement"):
        measure_peak(measure_peak, on_the_device, pool, 512, backend="cupy")
    assert measure_peak(on_the_device, pool, 512, backend="cupy").increase_bytes == 6 * 512


def test_cupys_hooks_have_the_methods_of_the_made_up_ones(pool: Pool) -> None:
    cupy_hook = sys.modules["cupy"].cuda.MemoryHook
    sys.modules.pop("cupy")
    real = pytest.importorskip("cupy")
    names = {name for name in vars(cupy_hook) if not name.startswith("__")} | {"__enter__", "__exit__"}
    assert names <= set(dir(real.cuda.MemoryHook))
    assert callable(real.get_default_memory_pool)
    assert callable(real.cuda.MemoryPool.used_bytes)


@pytest.mark.gpu
def test_peak_on_a_real_gpu() -> None:
    cupy = pytest.importorskip("cupy")
    if not cupy.is_available():
        pytest.skip("there is no GPU")

    def function() -> None:
        a = cupy.zeros(1024, np.uint8)
        b = cupy.zeros(2048, np.uint8)
        del a
        cupy.zeros(512, np.uint8)
        del b

    function()
    assert measure_peak(function, backend="cupy").increase_bytes == 3072
