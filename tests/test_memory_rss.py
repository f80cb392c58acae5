"""The peak of a process: its own, whatever the parent did, and a clear word when the call does not come back."""

import os
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest

from npnet.memory import measure_rss_peak

MB = 1_000_000


def touch(count: int, *, step: int = 1) -> int:
    """Fill an array of ``count`` bytes; the process that did it."""
    np.ones(count, np.uint8)[::step] = 2
    return os.getpid()


def first(array: np.ndarray) -> float:
    return float(array[0])


def die() -> None:
    os._exit(7)


def divide(a: int, b: int) -> float:
    return a / b


def give_a_lambda() -> Callable[[], int]:
    return lambda: 1


class Awkward(Exception):
    """Cannot be unpickled: it wants two arguments, and pickle knows of one."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


def fail_awkwardly() -> None:
    raise Awkward("an error", "the child")


class Unpicklable(Exception):
    """Holds what cannot be sent."""

    def __init__(self) -> None:
        super().__init__("cannot be sent")
        self.handle = lambda: 1


def fail_unpicklably() -> None:
    raise Unpicklable


def test_increase_is_what_was_touched_in_a_process_of_its_own() -> None:
    parents = np.ones(300 * MB, np.uint8)  # of which the child must know nothing
    report = measure_rss_peak(touch, 50 * MB, step=1)
    assert 49.5 * MB <= report.increase_bytes <= 80 * MB  # Linux counts pages in batches, so some may be missing
    assert report.baseline_bytes < 200 * MB
    assert report.peak_bytes == report.baseline_bytes + report.increase_bytes
    assert report.result != os.getpid()
    assert report.method == "rss"
    assert parents[-1] == 1


def test_a_peak_of_the_past_does_not_count() -> None:
    np.ones(300 * MB, np.uint8)
    assert measure_rss_peak(touch, 1).peak_bytes < 200 * MB


def test_arguments_are_part_of_the_baseline() -> None:
    report = measure_rss_peak(first, np.full(5 * MB, 3.0))
    assert report.result == 3.0
    assert report.baseline_bytes > 60 * MB
    assert report.increase_bytes < 10 * MB


def test_an_exception_passes_through() -> None:
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        measure_rss_peak(divide, 1, b=0)
    with pytest.raises(SystemExit):
        measure_rss_peak(sys.exit, 3)


def test_a_process_that_dies_is_said_to_have_died() -> None:
    with pytest.raises(RuntimeError, match=r"measure_rss_peak: the process died \(exit code 7\)"):
        measure_rss_peak(die)


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(TypeError, match=r"first.* or its arguments cannot be sent to a fresh process"):
        measure_rss_peak(first, threading.Lock())


def test_a_result_that_cannot_be_sent_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="result"):
        measure_rss_peak(give_a_lambda)


@pytest.mark.parametrize(
    ("function", "text"), [(fail_awkwardly, "an error in the child"), (fail_unpicklably, "cannot be sent")]
)
def test_an_exception_that_cannot_be_sent_is_told(function: Callable[[], None], text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        measure_rss_peak(function)


def test_functions_of_a_notebook_need_cloudpickle(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cloudpickle")
    offset = 2
    assert measure_rss_peak(lambda x: x + offset, 1).result == 3
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(TypeError, match=r"define the function in a module, or pip install 'npnet\[notebook\]'"):
        measure_rss_peak(lambda x: x + offset, 1)
    assert measure_rss_peak(divide, 1, 2).result == 0.5
