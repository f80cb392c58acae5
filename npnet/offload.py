"""Where activations go that a schedule sends out of memory: the host's memory, from a GPU, or a file.

A checkpoint is written once and read once, in reverse order, long after: what disks are good at. It goes into a
temporary file without a name, which is gone with the process whatever becomes of it; the operating system writes
behind, and reads ahead of need, since the store says what comes next. The file is in the folder that TMPDIR names:
where that is a disk in memory, as ``/tmp`` may be, nothing is saved. It is written and read, and not mapped into
memory, since a full disk then is an error, and not the signal that ends the process.

Into the host's memory activations of a GPU come and go while it computes: see `npnet.transfers`. For those that go
into a file it waits.

Aupy, Herrmann, Hovland & Robert, "Optimal multistage algorithm for adjoint computation", 2016, is about schedules for
two such levels of memory; `npnet.schedules.offloaded` makes the plain ones.
"""

import os
import tempfile
import threading
from contextlib import suppress
from typing import IO, Any, NamedTuple

import numpy as np

from npnet.backend import Array, backend_of, get_backend, to_backend, to_host
from npnet.schedule import Place
from npnet.transfers import Moved, OffloadError, Transfers


def check_elsewhere(to: Place | None, array: Array) -> None:
    """Refuse to send ``array``, or others of its kind, to where they are.

    Raises:
        ValueError: that is the host, and the array is not on a GPU.
    """
    if to == "host" and not hasattr(backend_of(array).xp, "cuda"):
        raise ValueError("offload: activations are in the host's memory already; 'disk' moves them out of it")


class _InFile(NamedTuple):
    """An array in the file."""

    begin: int  # bytes
    size: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    transposed: bool  # it was in Fortran order
    backend: str


class Store:
    """Activations out of memory, by the numbers of their layers.

    Attributes:
        to: where they go; None is from a GPU the host, else the disk.
    """

    to: Place | None = None

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._end = 0  # of what is in the file, in bytes
        self._kept: dict[int, _InFile | Moved] = {}
        self._transfers: dict[int, Transfers] = {}  # by the numbers of the GPUs

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, number: int, array: Array) -> None:
        """Move ``array`` out of memory. The store lets it go at once; from a GPU to the host, with the next call.

        Raises:
            OffloadError: the file cannot be written, or the host has no pinned memory left.
            TypeError: the array is not of NumPy, nor of a device.
            ValueError: it is to go to the host, and is not on a GPU.
        """
        try:
            backend = get_backend(backend_of(array).name)
        except ValueError:
            raise TypeError(f"a {type(array).__name__} cannot be offloaded: take a schedule that does not") from None
        check_elsewhere(self.to, array)
        if self.to == "disk" or not hasattr(backend.xp, "cuda"):
            self._kept[number] = self._write(array, backend.name)
        else:
            gpu = backend.xp.cuda.runtime.getDevice()
            if gpu not in self._transfers:
                self._transfers[gpu] = Transfers(backend.xp)
            self._kept[number] = self._transfers[gpu].send(array)

    def get(self, number: int) -> Array:
        """The array again, in the layout that it had; the store forgets it.

        Raises:
            OffloadError: the file cannot be read.
        """
        kept = self._kept.pop(number)
        if isinstance(kept, Moved):
            return kept.transfers.fetch(kept)
        straight = np.empty(kept.shape[::-1] if kept.transposed else kept.shape, kept.dtype)
        self._read(kept, straight.reshape(-1).view(np.uint8).data)
        if self._kept:
            self._advise(self._kept[next(reversed(self._kept))])
        array = to_backend(straight, kept.backend)
        return array.T if kept.transposed else array

    def clear(self) -> None:
        """Forget all; what comes next overwrites the file."""
        for transfers in self._transfers.values():
            transfers.clear()
        self._kept, self._end = {}, 0

    def _write(self, array: Array, backend: str) -> _InFile:
        transposed = bool(array.flags.f_contiguous and not array.flags.c_contiguous)
        straight = np.ascontiguousarray(to_host(array.T if transposed else array))  # a copy, if it is neither
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="npnet-", buffering=0)  # noqa: SIM115 - kept for all steps
            self._file.seek(self._end)
            rest = straight.reshape(-1).view(np.uint8).data
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OffloadError(
                error.errno,
                f"an activation of {array.nbytes} bytes cannot be offloaded to {tempfile.gettempdir()} "
                f"({error.strerror}); let TMPDIR name a folder with room",
            ) from error
        begin, self._end = self._end, self._end + array.nbytes
        return _InFile(begin, array.nbytes, array.shape, array.dtype, transposed, backend)

    def _read(self, kept: _InFile, target: memoryview) -> None:
        assert self._file is not None, "it was written"
        try:
            self._file.seek(kept.begin)
            done = 0
            while done < kept.size:
                count = self._file.readinto(target[done:])  # type: ignore[attr-defined]
                if not count:
                    raise OSError(0, "the file has become shorter")
                done += count
        except OSError as error:
            raise OffloadError(error.errno, f"an offloaded activation cannot be read: {error.strerror}") from error

    def _advise(self, kept: _InFile | Moved) -> None:
        """The system may begin to read it: what went out last comes back first."""
        if isinstance(kept, _InFile) and self._file is not None and hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._file.fileno(), kept.begin, kept.size, os.POSIX_FADV_WILLNEED)


class _Stores(threading.local):
    def __init__(self) -> None:
        self.free: list[Store] = []


_stores = _Stores()


class borrowed_store:  # noqa: N801 - used as a function
    """A store for one pass, empty; its file is used again by later passes of this thread."""

    def __init__(self, to: Place | None = None) -> None:
        self._to = to

    def __enter__(self) -> Store:
        self._store = _stores.free.pop() if _stores.free else Store()
        self._store.to = self._to
        return self._store

    def __exit__(self, *_: object) -> None:
        self._store.clear()
        _stores.free.append(self._store)
