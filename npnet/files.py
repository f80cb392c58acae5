"""Writing files so that nothing is ever lost: all of the new file, or all of the one before."""

import contextlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = ".npnet-{target:08x}-{pid}-{token}.tmp"  # target: a hash of its name, which may be as long as names can be


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write, that takes the place of ``path`` when the block ends without an exception.

    It is written under another name in the same folder, forced onto the disk, and renamed; then the folder is forced
    onto the disk, too. Whatever happens on the way (an exception, a full disk, kill -9, a power cut), ``path`` holds
    what it held before, or all of the new. See Pillai et al., "All File Systems Are Not Created Equal: On the
    Complexity of Crafting Crash-Consistent Applications", OSDI 2014.

    Raises:
        OSError: something could not be written; what was at ``path`` before is untouched. (Or all is written, but the
            folder could not be forced onto the disk: the message says so.)
    """
    target = Path(os.path.realpath(path))  # of a link, the file that it names
    temporary = target.with_name(_temporary_name(target, str(os.getpid()), os.urandom(4).hex()))
    try:
        _remove_leftovers(target)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)  # noqa: PTH105 - beside os.fsync
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"cannot write {path}: {_why(error)}; nothing was changed") from error
        raise
    try:
        _sync_folder(target.parent)
    except OSError as error:
        text = f"{path} is written, but a power cut could still undo that: {_why(error)}, of its folder"
        raise OSError(error.errno, text) from error


def _why(error: OSError) -> str:
    return error.strerror or str(error)


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


def _temporary_name(target: Path, pid: str, token: str) -> str:
    return _TEMPORARY.format(target=zlib.crc32(os.fsencode(target.name)), pid=pid, token=token)


def _remove_leftovers(target: Path) -> None:
    """Remove what processes left that were killed while they wrote ``target``.

    Not what is meant for other files: in a folder that several machines share, its writer may live on another one.
    """
    for file in target.parent.glob(_temporary_name(target, "*", "*")):
        with contextlib.suppress(OSError, ValueError):
            if not _lives(int(file.name.split("-")[2]), file.stat().st_mtime):
                file.unlink()


def _lives(pid: int, then: float) -> bool:
    """Whether the process that had this number then still runs: a number is given again, in a container very soon."""
    import psutil

    try:
        return bool(psutil.Process(pid).create_time() <= then)
    except psutil.NoSuchProcess:
        return False
