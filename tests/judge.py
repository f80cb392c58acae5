"""Whether reading a file went as it must: an error of npnet's or the right result, in bounds, quietly."""

import contextlib
import faulthandler
import os
import random
import resource
import sys
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIMES = float(os.environ.get("NPNET_FUZZ", "1"))
SEED = int(os.environ.get("NPNET_FUZZ_SEED", "0"))
CONSTANT, MULTIPLE = 2_000_000, 12  # bytes that reading may take: these, and so many for each byte of the file
SECONDS = 2.0  # of the processor


class Judge:
    """Reads file after file, and notes what was wrong."""

    def __init__(self, file: Path, read: Callable[[Path], Any], errors: tuple[type[Exception], ...]) -> None:
        self.file, self.read, self.errors = file, read, errors
        self.seen: Counter[str] = Counter()
        self.wrong: list[tuple[int, str]] = []

    @contextmanager
    def judging(self) -> Iterator["Judge"]:
        """Bytes are counted, warnings are noted, and whatever hangs ends the process, with a traceback."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tracemalloc.start()
        with warnings.catch_warnings(record=True) as self.warned:
            warnings.simplefilter("always")
            try:
                yield self
            finally:
                tracemalloc.stop()
                faulthandler.cancel_dump_traceback_later()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (
            1 if sys.platform == "darwin" else 1024
        )
        if grown > 200_000_000:  # what tracemalloc does not see
            self.wrong.append((-1, f"the process grew by {grown} bytes"))

    def __call__(self, content: bytes, check: Callable[[Any], str] = lambda result: "") -> None:
        """Read ``content``; ``check`` says what is wrong with the result."""
        number = sum(self.seen.values())
        self.file.write_bytes(content)
        del self.warned[:]
        if number % 50 == 0:  # each time it starts a thread
            faulthandler.dump_traceback_later(120, exit=True)
        tracemalloc.reset_peak()
        before, start = tracemalloc.get_traced_memory()[0], time.process_time()
        problem, result = "", None
        try:
            result = self.read(self.file)
            outcome = "read"
        except self.errors as error:
            outcome = type(error).__name__
            if self.file.name not in str(error):
                problem = f"an error that does not name the file: {error!r}"
        except BaseException as error:
            outcome = "another error"
            problem = f"{type(error).__name__}: {error}"
            if isinstance(error, KeyboardInterrupt):
                raise
        taken, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1] - before
        if outcome == "read":
            try:
                problem = check(result)
            except Exception as error:
                problem = f"{type(error).__name__} when it was used: {error}"
        if peak > CONSTANT + MULTIPLE * len(content):
            peak = min(peak, self.peak_again())  # another thread's bytes are there once
        if peak > CONSTANT + MULTIPLE * len(content):
            problem += f"; {peak} bytes for a file of {len(content)}"
        if taken > SECONDS:
            problem += f"; {taken:.1f} s"
        if self.warned:
            problem += f"; {self.warned[0].message!r}"
        self.seen[outcome] += 1
        if problem:
            self.wrong.append((number, problem[:500]))

    def peak_again(self) -> int:
        """Bytes that reading the file takes."""
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with contextlib.suppress(*self.errors):
            self.read(self.file)
        return tracemalloc.get_traced_memory()[1] - before


def cases(count: int, name: str) -> list[random.Random]:
    """A generator for each case, so that each can be repeated alone."""
    return [random.Random(f"{SEED} {name} {number}") for number in range(int(count * TIMES))]


def finish(judge: Judge, *expected: str) -> None:
    print(f"{sum(judge.seen.values())} files: {dict(judge.seen)}")
    assert not judge.wrong, f"{len(judge.wrong)} of {dict(judge.seen)}: {judge.wrong[:5]}"
    assert judge.seen.keys() >= set(expected)
