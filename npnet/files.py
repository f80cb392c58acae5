"""Writing files so that nothing is ever lost: all of the new file, or all of the one before."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = ".npnet-{pid}-{token}.tmp"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write, that takes the place of ``path`` when the block ends without an exception.

    It is written under another name in the same folder, forced onto the disk, and renamed; then the folder is forced
    onto the disk, too. Whatever happens on the way (an exception, a full disk, kill -9, a power cut), ``path`` holds
    what it held before, or all of the new. See Pillai et al., "All File Systems Are Not Created Equal: On the
    Complexity of Crafting Crash-Consistent Applications", OSDI 2014.

    Raises:
        OSError: something could not be written; what was at ``path`` before is untouched.
    """
    target = Path(os.path.realpath(path))  # of a link, the file that it names
    try:
        _remove_leftovers(target.parent)
        temporary = target.with_name(_TEMPORARY.format(pid=os.getpid(), token=os.urandom(4).hex()))
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)  # noqa: PTH105 - beside os.fsync
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(target.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}; nothing was changed") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text``, UTF-8, all or nothing; raises as `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def _sync_folder(folder: Path) -> None:
    """Force the names in ``folder`` onto the disk; Windows cannot, and need not."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote."""
    for file in folder.glob(_TEMPORARY.format(pid="*", token="*")):
        import psutil

        with contextlib.suppress(OSError, ValueError):
            if not psutil.pid_exists(int(file.name.split("-")[1])):
                file.unlink()
