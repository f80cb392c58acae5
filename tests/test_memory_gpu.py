"""Memory on a device, counted and limited: in the pools of a made-up CuPy, and of the real one where there is a GPU."""

import gc
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import pools
from npnet.memory import MemoryReport, limit_memory, measure_peak
from npnet.pools import OwnPool, uncounted
from tests.pool import BLOCK, Device, OutOfMemoryError, Pool, install_device
from tests.scenarios import fresh_registry as fresh_registry


@pytest.fixture(name="device")
def counted_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A device whose memory is counted; afterwards its hooks and allocators are as they were."""
    monkeypatch.setattr(pools, "_kept", [])
    with install_device() as device:
        yield device
        assert not device.hooks
        assert device.allocators == [device.default.malloc]
        assert not device.dangling


def zeros(size: int) -> Any:
    """An array of so many bytes on the device."""
    return npnet.get_backend("cupy").xp.zeros(size, np.uint8)


def some_arrays(size: int) -> str:
    """Arrays of size, 2 size, 4 size bytes, of which at most the last two are alive together."""
    a = zeros(size)
    del a
    b, c = zeros(2 * size), zeros(4 * size)
    del b
    zeros(size)
    del c
    return "result"


# The peak.


def test_the_peak_is_exact(device: Device) -> None:
    there = zeros(3 * BLOCK)
    for backend in ("cupy", None):
        with npnet.use_backend("cupy"):
            report = measure_peak(some_arrays, 1024, backend=backend)
        assert report.increase_bytes == 6 * 1024
        assert (report.result, report.method) == ("result", "cupy pool")
        assert (report.baseline_bytes, report.peak_bytes) == (3 * BLOCK, 3 * BLOCK + 6 * 1024)
    assert measure_peak(some_arrays, 1000, backend="cupy").increase_bytes == BLOCK * (4 + 8)
    assert measure_peak(some_arrays, 1024, backend="numpy").method == "tracemalloc"
    assert device.default.used_bytes() == there.nbytes


def test_what_is_freed_that_was_there_before_counts(device: Device) -> None:
    arrays = [zeros(2048)]
    report = measure_peak(arrays.clear, backend="cupy")
    assert (report.baseline_bytes, report.peak_bytes, report.increase_bytes) == (2048, 2048, 0)
    arrays = [zeros(2048)]
    report = measure_peak(lambda: (arrays.clear(), zeros(3072)), backend="cupy")
    assert (report.baseline_bytes, report.increase_bytes) == (2048, 1024)


def test_a_measurement_starts_with_an_empty_pool_and_gives_it_back(device: Device) -> None:
    """The default pool may be full of free blocks: what is measured does not depend on them."""
    some_arrays(4096)
    cached = device.default.total_bytes()
    assert cached > 0
    taken = device.taken
    reports = [measure_peak(some_arrays, 1024, backend="cupy") for _ in range(2)]
    assert device.default.total_bytes() == cached
    assert device.taken == taken
    assert {report.pool_bytes for report in reports} == {7 * 1024}  # the first array's block was too small for the rest
    assert reports[0].increase_bytes == 6 * 1024


def test_what_libraries_take_is_reported_apart(device: Device) -> None:
    def library(size: int) -> None:
        device.taken += size
        zeros(1024)

    report = measure_peak(library, 32_000_000, backend="cupy")
    assert (report.increase_bytes, report.pool_bytes, report.outside_bytes) == (1024, 1024, 32_000_000)
    assert str(report) == "peak 1.02 kB above 0 B (cupy pool), 1.02 kB in the pool, 32.0 MB outside it"
    report = measure_peak(some_arrays, 1024, backend="cupy")
    assert report.outside_bytes == 0
    report = measure_peak(lambda: setattr(device, "taken", device.taken - 5000), backend="cupy")
    assert report.outside_bytes == 0  # somebody gave memory back
    assert str(MemoryReport(None, 1000, 3000, "rss")) == "peak 2.00 kB above 1.00 kB (rss)"


def test_hook_and_allocator_go_also_by_an_exception(device: Device) -> None:
    def fails() -> None:
        some_arrays(1024)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure_peak(fails, backend="cupy")
    assert (device.hooks, device.taken) == ({}, 0)
    with pytest.raises(RuntimeError, match="another measurement"):
        measure_peak(measure_peak, some_arrays, 512, backend="cupy")
    assert measure_peak(some_arrays, 512, backend="cupy").increase_bytes == 6 * 512


def test_memory_that_there_was_not_is_not_counted() -> None:
    def greedy() -> None:
        zeros(1024)
        with pytest.raises(MemoryError):
            zeros(5000)

    with install_device(total=4096):
        assert measure_peak(greedy, backend="cupy").increase_bytes == 1024


def test_arrays_may_outlive_a_measurement(device: Device) -> None:
    """CuPy's blocks do not keep their pool, but the pool their memory."""
    array = measure_peak(zeros, 1024, backend="cupy").result
    gc.collect()
    assert (device.dangling, device.taken) == (0, 1024)
    del array
    measure_peak(some_arrays, 512, backend="cupy")
    gc.collect()
    assert device.taken == 0


def test_without_keeping_their_pool_arrays_would_lose_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with install_device() as device:
        monkeypatch.setattr(pools, "_keep", lambda pool: None)
        array = measure_peak(zeros, 1024, backend="cupy").result
        gc.collect()
        assert (len(array), device.dangling) == (1024, 1)


# The limit.


def test_a_limit_is_exact_and_ends(device: Device) -> None:
    there = zeros(5000)
    with limit_memory("4 KiB", "cupy"):
        a = zeros(2048)
        b = zeros(2000)  # takes 2048
        with pytest.raises(MemoryError, match=r"allocating 1 bytes \(allocated so far: 4,096 bytes, limit set to: 4"):
            zeros(1)
        del a
        c = zeros(2048)
        with uncounted():
            data = zeros(10_000)
    assert zeros(5000).nbytes == 5000
    assert len(there) + len(b) + len(c) + len(data) == 19_048


def test_limits_and_measurements_may_stand_inside_one_another(device: Device) -> None:
    with limit_memory(8192, "cupy"):
        kept = zeros(2048)
        with limit_memory(4096, "cupy"), pytest.raises(MemoryError, match="4,096"):
            zeros(4097)
        assert measure_peak(zeros, 4096, backend="cupy").increase_bytes == 4096
        with limit_memory(100_000, "cupy"), pytest.raises(MemoryError, match="8,192"):  # the outer one goes on
            zeros(8192)
        with pytest.raises(MemoryError):
            measure_peak(zeros, 8192, backend="cupy")

    def limited() -> None:
        with limit_memory(4096, "cupy"):
            zeros(3000)

    report = measure_peak(limited, backend="cupy")
    assert (report.increase_bytes, report.pool_bytes, len(kept)) == (3072, 3072, 2048)


def test_a_limit_counts_from_where_it_is_entered_again(device: Device) -> None:
    own = OwnPool(sys.modules["cupy"], 2048)
    kept = []
    for _ in range(3):
        with own:
            kept.append(zeros(2048))
            with pytest.raises(OutOfMemoryError):
                zeros(1)
    assert own.pool.used_bytes() == 3 * 2048
    kept.clear()
    with own:
        zeros(2048)
    assert own.pool.total_bytes() == 3 * 2048  # it is used again, not taken anew


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), ("much", ValueError), (None, TypeError)])
@pytest.mark.usefixtures("device")
def test_a_limit_is_a_size(size: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="size: expected bytes"), limit_memory(size, "cupy"):
        pass


def test_cupys_own_limit_would_count_what_lies_free(device: Device) -> None:
    """Why npnet does not use it: whether an array fits depends on what was cached before."""
    device.default.set_limit(8192)
    pieces = [zeros(1024) for _ in range(8)]
    pieces.clear()
    assert device.default.used_bytes() == 0
    with pytest.raises(MemoryError, match="limit set to"):
        zeros(2048)


# CuPy itself.


def public(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_") and inspect.isfunction(getattr(cls, name))}


def test_cupy_has_what_the_made_up_one_has(device: Device) -> None:
    made_up = sys.modules["cupy"]
    for name in ("cupy", "cupy.cublas", "cupyx.scipy.special"):
        del sys.modules[name]
    real = pytest.importorskip("cupy")
    spec = importlib.util.find_spec("cupy.cublas")  # importing it takes NVIDIA's library
    assert spec is not None
    assert "def dot(x, y, out=None):" in Path(str(spec.origin)).read_text(encoding="utf-8")
    assert "order" in inspect.signature(real.asnumpy).parameters
    assert public(made_up.cuda.MemoryHook) | {"__enter__", "__exit__"} <= set(dir(real.cuda.MemoryHook))
    assert {"malloc", "used_bytes", "total_bytes", "free_all_blocks", "set_limit"} <= public(Pool) - {"free"}
    assert public(Pool) - {"free"} <= set(dir(real.cuda.MemoryPool()))
    assert set(vars(made_up.cuda)) <= set(dir(real.cuda))
    assert set(vars(made_up.cuda.runtime)) <= set(dir(real.cuda.runtime))
    assert callable(real.get_default_memory_pool)
    assert issubclass(real.cuda.memory.OutOfMemoryError, MemoryError)
    assert str(real.cuda.memory.OutOfMemoryError(512, 1024, 2048)).startswith("Out of memory allocating 512 bytes")
    with real.cuda.using_allocator(lambda size: 1 / 0), pytest.raises(ZeroDivisionError):
        real.cuda.alloc(512)
    assert {"record", "wait_event", "synchronize", "__enter__", "__exit__"} <= set(dir(real.cuda.Stream))
    assert callable(real.cuda.Event.synchronize)
    for method, keywords in (
        (real.cuda.Stream.__init__, {"non_blocking"}),
        (real.ndarray.set, {"arr", "stream"}),
        (real.ndarray.get, {"out", "blocking"}),
    ):
        assert keywords <= set(re.findall(r"\w+", method.__doc__.splitlines()[0]))
    hook = type("Hook", (real.cuda.MemoryHook,), {"name": "npnet", "now": 0})()
    with hook as entered:
        assert entered is hook


@pytest.fixture
def real() -> Any:
    cupy = pytest.importorskip("cupy")
    if not cupy.is_available():
        pytest.skip("there is no GPU")
    return cupy


@pytest.mark.gpu
def test_the_peak_on_a_real_gpu(real: Any) -> None:
    assert measure_peak(some_arrays, 1024, backend="cupy").increase_bytes == 6 * 1024
    assert measure_peak(some_arrays, 1000, backend="cupy").increase_bytes == BLOCK * (4 + 8)
    array = measure_peak(zeros, 4096, backend="cupy").result
    gc.collect()
    assert not array.any()


@pytest.mark.gpu
def test_a_limit_on_a_real_gpu(real: Any) -> None:
    with limit_memory("4 KiB", "cupy"):
        a = zeros(2048)
        b = zeros(2000)
        with pytest.raises(MemoryError, match="Out of memory"):
            zeros(1)
        del a
        c = zeros(2048)
    assert len(zeros(5000)) + len(b) + len(c) == 9048
