"""The peak that is measured is what was alive together: all of it, nothing else, and nobody else's."""

import sys
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import npnet
from npnet.memory import MemoryReport, format_bytes, measure_peak
from tests.scenarios import fresh_registry as fresh_registry

MB = 1_000_000
SLACK = 4000  # bytes that Python's own objects may take


def ones(count: int) -> np.ndarray:
    return np.ones(count, np.uint8)


def keep_one(count: int) -> np.ndarray:
    return ones(count)


def free_one(count: int) -> None:
    ones(count)


def one_after_another(count: int) -> None:
    for _ in range(5):
        ones(count)


def two_together(count: int) -> int:
    a, b = ones(count), ones(count)
    return len(a) + len(b)


def temporary_within(count: int) -> np.ndarray:
    ones(3 * count)
    return ones(count)


def by_hand(count: int) -> bytes:
    return bytes(count)  # not NumPy's


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1234, "1.23 kB"),
        (12_345, "12.3 kB"),
        (123_456, "123 kB"),
        (999_999, "1.00 MB"),
        (1_000_000, "1.00 MB"),
        (15_600_000, "15.6 MB"),
        (439_000_000, "439 MB"),
        (2_500_000_000, "2.50 GB"),
        (123_456_000_000, "123 GB"),
        (-565_072, "-565 kB"),
        (0.4, "0 B"),
    ],
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert format_bytes(count) == text


# Counting allocations.


@pytest.mark.parametrize("count", [0, 100_000, 10 * MB])
@pytest.mark.parametrize(
    ("function", "times"),
    [(keep_one, 1), (free_one, 1), (one_after_another, 1), (two_together, 2), (temporary_within, 3), (by_hand, 1)],
)
def test_peak_is_what_was_alive_together(function: Callable[[int], Any], times: int, count: int) -> None:
    report = measure_peak(function, count)
    assert times * count <= report.increase_bytes <= times * count + SLACK
    assert report.method == "tracemalloc"


def test_a_report_says_result_baseline_and_increase() -> None:
    report = measure_peak(keep_one, 10)
    np.testing.assert_array_equal(report.result, np.ones(10))
    assert report.increase_bytes == report.peak_bytes - report.baseline_bytes
    report = MemoryReport("result", 1_000_000, 3_500_000, "rss")
    assert report.increase_bytes == 2_500_000
    assert str(report) == "peak 2.50 MB above 1.00 MB (rss)"


def test_arguments_are_passed_on() -> None:
    def function(*args: int, **kwargs: int) -> tuple[Any, Any]:
        return args, kwargs

    assert measure_peak(function, 1, 2, a=3, b=4).result == ((1, 2), {"a": 3, "b": 4})
    assert measure_peak(function, 1, backend="numpy", a=3).result == ((1,), {"a": 3})
    assert measure_peak(function).result == ((), {})


def test_two_measurements_of_the_same_agree() -> None:
    first, *others = (measure_peak(two_together, MB).increase_bytes for _ in range(4))
    assert all(abs(other - first) < SLACK for other in others)


def test_what_was_allocated_before_counts_only_in_the_baseline() -> None:
    """And tracing that somebody else started goes on, with their figures."""
    tracemalloc.start()
    try:
        free_one(9 * MB)  # a peak of before
        held = ones(5 * MB)
        report = measure_peak(keep_one, MB)
        assert tracemalloc.is_tracing()
        assert report.baseline_bytes >= 5 * MB
        assert MB <= report.increase_bytes <= MB + SLACK
        del held, report
        assert tracemalloc.get_traced_memory()[0] < MB
    finally:
        tracemalloc.stop()


def test_what_the_function_frees_lowers_no_peak() -> None:
    held = [ones(5 * MB)]
    assert measure_peak(held.clear).increase_bytes <= SLACK


def test_tracing_ends_with_the_call_also_by_an_exception() -> None:
    measure_peak(keep_one, 10)
    assert not tracemalloc.is_tracing()
    with pytest.raises(ZeroDivisionError):
        measure_peak(lambda: 1 / 0)
    assert not tracemalloc.is_tracing()
    with pytest.raises(KeyboardInterrupt):
        measure_peak(interrupt)
    assert not tracemalloc.is_tracing()
    assert measure_peak(keep_one, MB).increase_bytes >= MB


def interrupt() -> None:
    raise KeyboardInterrupt


def test_one_measurement_at_a_time_in_this_thread() -> None:
    with pytest.raises(RuntimeError, match="another measurement is running; measure one call at a time"):
        measure_peak(measure_peak, keep_one, 10)
    assert measure_peak(keep_one, MB).increase_bytes >= MB


def test_one_measurement_at_a_time_in_any_thread() -> None:
    inside, done = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert done.wait(60)

    thread = threading.Thread(target=measure_peak, args=(wait,))
    thread.start()
    assert inside.wait(60)
    try:
        with pytest.raises(RuntimeError, match="another measurement is running"):
            measure_peak(keep_one, 10)
        assert tracemalloc.is_tracing()  # the other measurement's, not disturbed
    finally:
        done.set()
        thread.join()
    assert measure_peak(keep_one, MB).increase_bytes >= MB


def test_a_bad_backend_is_refused_and_the_meter_free_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(npnet.BackendUnavailable, match="backend 'cupy': the package is missing"):
        measure_peak(keep_one, 10, backend="cupy")
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        measure_peak(keep_one, 10, backend="tpu")
    monkeypatch.setenv("NPNET_BACKEND", "cupy")  # the current backend is what counts
    with pytest.raises(npnet.BackendUnavailable):
        measure_peak(keep_one, 10)
    assert measure_peak(keep_one, MB, backend="numpy").increase_bytes >= MB
