"""Measuring peak memory: exactly, by counting allocations, or as the operating system sees it; and limiting it.

`measure_peak` counts every byte that arrays take (tracemalloc on NumPy, the memory pool on CuPy); tracing slows
Python down, so never time what it measures. `measure_rss_peak` runs a function in a fresh process, untraced, and
asks the operating system: coarser (pages, the interpreter, the allocator's habits), but the truth about a process.
"""

import gc
import math
import numbers
import re
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from npnet.backend import get_backend
from npnet.checks import check_callable, shown
from npnet.pools import OwnPool, peak_of_pools

_measuring = threading.Lock()


@dataclass(frozen=True)
class MemoryReport:
    """What a call returned, and the memory it took.

    ``baseline_bytes`` were in use before the call, ``peak_bytes`` at its highest point, and ``increase_bytes`` is
    the difference. ``method`` says what was counted: "tracemalloc", "cupy pool" or "rss". On a GPU, apart from that,
    ``pool_bytes`` are what the measurement's pool took from the device (what lies free in pieces, too), and
    ``outside_bytes`` what was taken by others meanwhile: CUDA's context and kernels, the libraries' workspace, and
    other processes; the driver counts that in pages, 2 MB mostly.
    """

    result: Any
    baseline_bytes: int
    peak_bytes: int
    method: str
    pool_bytes: int | None = None
    outside_bytes: int | None = None

    @property
    def increase_bytes(self) -> int:
        """peak_bytes - baseline_bytes."""
        return self.peak_bytes - self.baseline_bytes

    def __str__(self) -> str:
        text = f"peak {format_bytes(self.increase_bytes)} above {format_bytes(self.baseline_bytes)} ({self.method})"
        if self.pool_bytes is None or self.outside_bytes is None:
            return text
        return f"{text}, {format_bytes(self.pool_bytes)} in the pool, {format_bytes(self.outside_bytes)} outside it"


def measure_peak(function: Callable[..., Any], *args: Any, backend: str | None = None, **kwargs: Any) -> MemoryReport:
    """Call ``function(*args, **kwargs)`` and report the peak of the bytes allocated meanwhile.

    All of the process counts: what other threads allocate meanwhile cannot be told apart, so let none of them work.
    If tracemalloc is tracing already, it goes on afterwards with what it knows, but the peak it has seen starts anew.

    Args:
        backend: "numpy" counts allocations on the host with tracemalloc, which sees NumPy's buffers exactly; "cupy"
            those of this thread on the current device, in a memory pool of its own (libraries' own workspace and the
            CUDA context are outside it: see `MemoryReport`). By default the current backend.

    Raises:
        RuntimeError: another measurement is running, in this thread or another: each would count the other's bytes.
            Or tracemalloc was stopped meanwhile.
    """
    check_callable(function, "function")
    with measuring():
        return peak_of(lambda: function(*args, **kwargs), get_backend(backend).name)


def peak_of(call: Callable[[], Any], backend: str) -> MemoryReport:
    """As `measure_peak`, for whoever is `measuring` already."""
    gc.collect()
    return _measure_cupy(call) if backend == "cupy" else _measure_tracemalloc(call)


@contextmanager
def measuring() -> Iterator[None]:
    """One measurement at a time.

    Raises:
        RuntimeError: another is running.
    """
    if not _measuring.acquire(blocking=False):
        raise RuntimeError("another measurement is running; measure one call at a time")
    try:
        yield
    finally:
        _measuring.release()


@contextmanager
def tracing() -> Iterator[None]:
    """Inside it, tracemalloc traces; what somebody else started is not stopped.

    Raises:
        RuntimeError: somebody stopped it meanwhile, and what it had counted is gone.
    """
    was_tracing = tracemalloc.is_tracing()
    if not was_tracing:
        tracemalloc.start()
    try:
        yield
        if not tracemalloc.is_tracing():
            raise RuntimeError(
                "tracemalloc was stopped during the measurement, by what is measured or by another thread; measure "
                "without that"
            )
    finally:
        if not was_tracing:
            tracemalloc.stop()


def _measure_tracemalloc(call: Callable[[], Any]) -> MemoryReport:
    with tracing():
        tracemalloc.reset_peak()
        baseline = tracemalloc.get_traced_memory()[0]
        result = call()
        peak = tracemalloc.get_traced_memory()[1]
    return MemoryReport(result, baseline, peak, "tracemalloc")


def _measure_cupy(call: Callable[[], Any]) -> MemoryReport:
    result, baseline, peak, pool, outside = peak_of_pools(get_backend("cupy").xp, call)
    return MemoryReport(result, baseline, peak, "cupy pool", pool, outside)


@contextmanager
def limit_memory(size: float | str, backend: str | None = None) -> Iterator[None]:
    """Inside it, what this thread allocates on the GPU may take ``size`` at most, in blocks of 512 bytes.

    With more, an allocation fails as it does where the device is full; in a training step that becomes
    `npnet.OutOfMemory`. What was there before does not count, nor what libraries take for themselves.

    Args:
        size: bytes, or "200 MB".
        backend: by default the current one.

    Raises:
        TypeError, ValueError: not a size. Or the backend is NumPy, whose memory comes from the operating system.
        MemoryError: (within) there is no more.

    >>> with limit_memory("200 MB", "numpy"):
    ...     pass
    Traceback (most recent call last):
        ...
    ValueError: limit_memory: memory can be limited on a GPU alone. On 'numpy' keep to a budget by planning ...
    """
    limit, chosen = parse_bytes(size, "size"), get_backend(backend)
    if not hasattr(chosen.xp, "cuda"):
        raise ValueError(
            f"limit_memory: memory can be limited on a GPU alone. On {chosen.name!r} keep to a budget by planning "
            "(memory_budget=), and look at what is taken with npnet.measure_peak; a whole process is limited by the "
            "system (ulimit -v)"
        )
    with OwnPool(chosen.xp, limit):
        yield


def measure_rss_peak(function: Callable[..., Any], *args: Any, **kwargs: Any) -> MemoryReport:
    """Call ``function(*args, **kwargs)`` in a fresh process and report the peak of that process's resident memory.

    The baseline is the process's memory after Python, NumPy and the function's module are loaded and the arguments
    have arrived.

    Raises:
        TypeError: function, arguments or result cannot be sent to another process. Functions written in a notebook
            need the package cloudpickle: pip install 'npnet[notebook]'.
        Exception: whatever the function raised.
        RuntimeError: the process died.
    """
    check_callable(function, "function")
    import multiprocessing
    import pickle

    try:
        import cloudpickle as pickler
    except ImportError:
        pickler = pickle
    try:
        task = pickler.dumps((function, args, kwargs))
    except Exception as error:
        raise TypeError(
            f"measure_rss_peak: {function!r} or its arguments cannot be sent to a fresh process ({error}); define the "
            "function in a module, or pip install 'npnet[notebook]'"
        ) from error
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_measured, args=(sender, task))
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"measure_rss_peak: the process died (exit code {process.exitcode}); a script that calls this must do so "
            'under `if __name__ == "__main__":`, since the fresh process imports it'
        ) from None
    finally:
        receiver.close()
    process.join()
    if isinstance(outcome, BaseException):
        raise outcome
    result, baseline, peak = pickle.loads(outcome)
    return MemoryReport(result, baseline, peak, "rss")


def _run_measured(sender: Any, task: bytes) -> None:
    """In the fresh process: run the task, send back (result, baseline, peak), pickled, or the exception."""
    import pickle

    import psutil

    try:
        function, args, kwargs = pickle.loads(task)
        gc.collect()
        baseline = int(psutil.Process().memory_info().rss)
        result = function(*args, **kwargs)
        peak = max(_rss_high_water(), baseline)
        try:
            outcome: Any = pickle.dumps((result, baseline, peak))
        except Exception as error:
            outcome = TypeError(f"measure_rss_peak: the result cannot be sent back ({error})")
    except BaseException as error:
        outcome = error
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an exception with an __init__ of its own
            outcome = RuntimeError(f"measure_rss_peak: {type(error).__name__}: {error}")
    sender.send(outcome)


def _rss_high_water() -> int:
    """The most resident memory that this process ever had, in bytes, as the operating system recorded it."""
    import psutil

    if sys.platform == "linux":  # getrusage's figure survives exec, and so includes the parent's peak; VmHWM does not
        with open("/proc/self/status") as status:  # noqa: PTH123
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def format_bytes(count: float) -> str:
    """Bytes for people, in decimal units.

    >>> format_bytes(1234567)
    '1.23 MB'
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= 0.9995 * size:  # where three digits round up to it
            return f"{count / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{count:.0f} B"


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(size: float | str, name: str = "memory_budget") -> int:
    """A number of bytes, or a text such as "20 MB" (decimal) or "20 MiB" (binary), as a number of bytes.

    Raises:
        TypeError: neither a number nor a text.
        ValueError: not a size, or less than a byte, or infinite.

    >>> parse_bytes("1.5 MiB")
    1572864
    """
    expected = f'{name}: expected bytes, or a size such as "20 MB" or "20 MiB"'
    if isinstance(size, bool) or not isinstance(size, (str, numbers.Real)):
        raise TypeError(f"{expected}, got {shown(size)}")
    text = size if isinstance(size, str) else shown(int(size) if isinstance(size, numbers.Integral) else float(size))
    parts = re.fullmatch(r"\s*(\S*?)\s*([a-zA-Z]*)\s*", text[:200])  # its time grows with the square of the length
    try:
        count = float(parts[1]) * _UNITS[parts[2].lower()] if parts else 0.0
    except (KeyError, ValueError):
        count = 0.0
    if not 1 <= count < math.inf:
        raise ValueError(f"{expected}, at least one byte, got {shown(size)}")
    return int(count)
