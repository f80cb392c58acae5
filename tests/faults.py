"""A disk that fails: at any one of the calls that a save makes of the system."""

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

ERRORS: list[BaseException] = [
    *(OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EIO, errno.EROFS)),
    KeyboardInterrupt(),
    MemoryError(),
]


class Faults:
    """Counts what a save asks of the system, and fails at one of these calls."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fail_at, self.error = -1, ERRORS[0]
        self._replace, self._fsync, self._open = os.replace, os.fsync, io.open
        patch.setattr(os, "replace", self.counted("replace", os.replace))
        patch.setattr(os, "fsync", self.fsync)
        patch.setattr(io, "open", self.open)

    def call(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) - 1 == self.fail_at:
            raise self.error

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any, **named: Any) -> Any:
            self.call(name)
            return function(*given, **named)

        return counting

    def fsync(self, descriptor: int) -> None:
        self.call("fsync of the folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "fsync")  # noqa: PTH112
        self._fsync(descriptor)

    def open(self, file: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
        if mode != "xb":
            return self._open(file, mode, *given, **named)
        self.call("open")
        opened = self._open(file, mode, buffering=0)
        raw = Failing(self, opened.detach() if hasattr(opened, "detach") else opened)
        return io.BufferedWriter(raw, 64)  # type: ignore[type-var]  # a small buffer: many writes

    @contextmanager
    def at(self, number: int, error: BaseException) -> Iterator[None]:
        self.calls, self.fail_at, self.error = [], number, error
        try:
            yield
        finally:
            self.fail_at = -1


class Failing(io.RawIOBase):
    """A file of which any write may fail, and then does again: a disk that is full stays full."""

    def __init__(self, faults: Faults, file: Any) -> None:
        self.faults, self.file, self.broken = faults, file, False

    def write(self, data: Any) -> int:
        if self.broken and isinstance(self.faults.error, OSError):
            raise self.faults.error
        try:
            self.faults.call("write")
        except BaseException:
            self.broken = True
            raise
        return int(self.file.write(data))

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, *given: int) -> int:
        return int(self.file.seek(*given))

    def tell(self) -> int:
        return int(self.file.tell())

    def truncate(self, size: int | None = None) -> int:
        return int(self.file.truncate(size))

    def fileno(self) -> int:
        return int(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        super().close()
