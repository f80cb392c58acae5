"""Files of named arrays and a description: .npz, or .safetensors, which PyTorch and others read.

Nothing in such a file is ever executed (no pickle), nothing in it is believed: what it claims is compared with its
length before memory is taken for it, and each array has a checksum (CRC-32 in .npz, SHA-256 over all in .safetensors).
"""

import errno
import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

import npnet
from npnet.backend import Array, to_host
from npnet.checks import is_finite, shown
from npnet.files import replacing

FORMAT = 1
"""The format of the files that this version writes; it reads older ones, too."""

_DESCRIPTION = "npnet"  # the entry with the description, as JSON


class SaveError(ValueError):
    """A file that cannot be loaded; the message names it, and says why."""


def write_archive(path: str | os.PathLike[str], description: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write ``arrays``, from any backend, and a description that is JSON: all, or nothing.

    Raises:
        ValueError: the name ends neither in .npz nor in .safetensors, or an array holds infinities or NaN.
        ImportError: .safetensors needs the package safetensors.
        OSError: it could not be written; see `npnet.files.replacing`.
    """
    write, _ = check_name(path)
    text = json.dumps({**description, "format": FORMAT, "npnet": npnet.__version__}, allow_nan=False)
    on_host = {name: to_host(array) for name, array in arrays.items()}
    for name, array in on_host.items():
        if not is_finite(array):
            raise ValueError(f"not saved: {name} holds infinities or NaN, and could not be loaded; {path} is untouched")
    with replacing(path) as file:
        write(file, text, on_host)


def read_archive(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Array]]:
    """What `write_archive` wrote: the description, and the arrays on the host.

    Raises:
        FileNotFoundError, OSError: there is no file, or it cannot be read.
        SaveError: it is truncated or damaged, from a newer version, or was not written by npnet.
        ValueError, ImportError: as for `write_archive`.
    """
    _, read = check_name(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    text, arrays = read(Path(path))
    try:
        description = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        version, writer = description["format"], description["npnet"]
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ValueError(f"format {version!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SaveError(f"{path}: damaged, its description cannot be read ({_say(error)})") from None
    if version > FORMAT:
        raise SaveError(
            f"{path}: written by npnet {writer} in format {version}; this is npnet {npnet.__version__}, which reads up "
            f"to format {FORMAT}: upgrade npnet"
        )
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise SaveError(f"{path}: {name} holds no numbers, but {array.dtype}")
        if not is_finite(array):
            raise SaveError(f"{path}: {name} holds infinities or NaN")
    return description, arrays


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse(text)


def _say(error: Exception) -> str:
    return str(error) or type(error).__name__


_Read: TypeAlias = tuple[bytes, dict[str, Array]]  # the description, and the arrays


def check_name(path: str | os.PathLike[str]) -> tuple[Callable[..., None], Callable[[Path], _Read]]:
    """The functions that write and read a file of this name.

    Raises:
        TypeError, ValueError, ImportError: as `write_archive`.
    """
    try:
        suffix = Path(path).suffix
    except TypeError:
        raise TypeError(f"path: expected the name of a file, got {shown(path)}") from None
    if suffix == ".npz":
        return _write_npz, _read_save
    if suffix == ".safetensors":
        try:
            import safetensors.numpy  # noqa: F401
        except ImportError as error:
            raise ImportError(
                ".safetensors files need the package safetensors: pip install 'npnet[safetensors]'"
            ) from error
        return _write_safetensors, _read_safetensors
    raise ValueError(f"{path}: expected a name that ends in .npz or .safetensors")


def _write_npz(file: IO[bytes], text: str, arrays: Mapping[str, Array]) -> None:
    entries = {_DESCRIPTION: np.frombuffer(text.encode(), np.uint8), **arrays}
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in entries.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), version=(1, 0), allow_pickle=False)


def _read_save(path: Path) -> _Read:
    with _members(path) as (_, members):  # before its size is judged: other programs' files may be compressed
        if _DESCRIPTION not in members:
            raise SaveError(
                f"{path}: not saved by npnet; arrays alone go into a model with model.load_state_dict(numpy.load(path))"
            )
    arrays = dict(read_npz(path, path.stat().st_size))
    return arrays.pop(_DESCRIPTION).tobytes(), arrays


def npz_headers(path: Path) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """The dtype and the shape of each array that an .npz file claims to hold, by name; no array is read.

    Raises:
        OSError, SaveError: as for `read_npz`, but of what the arrays hold nothing is known yet.
    """
    headers = {}
    with _members(path) as (archive, members):
        for name, member in members.items():
            with archive.open(member) as stream:
                headers[name] = _read_header(stream, member.file_size)[:2]
    return headers


def read_npz(path: Path, most_bytes: int) -> Iterator[tuple[str, Array]]:
    """The arrays of an .npz file, by name, one at a time.

    Args:
        most_bytes: what all of them may take together; a file that claims more is refused before memory is taken.

    Raises:
        OSError: the file cannot be read.
        SaveError: it is truncated, damaged, no .npz file, too large, or holds pickled objects.
    """
    with _members(path) as (archive, members):
        if sum(member.file_size for member in members.values()) > most_bytes:
            raise SaveError(f"{path}: damaged, it claims to hold more than the {most_bytes} bytes that it can")
        for name, member in members.items():
            with archive.open(member) as stream:
                yield name, _read_array(stream, member.file_size)


@contextmanager
def _members(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """An .npz file, open, with its entries by name; whatever goes wrong meanwhile becomes an error that names it."""
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                raise SaveError(f"{path}: not an .npz file")
            with zipfile.ZipFile(file) as archive:
                members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
                if len(members) < len(archive.infolist()):
                    raise SaveError(f"{path}: damaged, two of its arrays have the same name")
                if any(
                    each.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for each in members.values()
                ):
                    raise ValueError("compressed in an unknown way")  # LZMA's dictionary alone may take 4 GB
                yield archive, members
    except Exception as error:  # whatever zipfile and zlib say of a damaged file
        misplaced = isinstance(error, OSError) and error.errno == errno.EINVAL  # zipfile was led to before the start
        if isinstance(error, (SaveError, MemoryError)) or (isinstance(error, OSError) and not misplaced):
            raise
        raise SaveError(f"{path}: truncated or damaged ({_say(error)})") from error


_CHUNK = 2**20  # bytes that are read at a time
_HEADER = re.compile(
    r"\{'descr': '([<>|=](?:[biufcSUV]\d+|O))', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \}\s*"
)
"""What NumPy writes. NumPy itself reads it with Python's parser, which warns, and takes long, where it is damaged."""


def _read_header(stream: IO[bytes], size: int) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """The dtype and shape of an array in the .npy format, of ``size`` bytes with its header; and whether by columns."""
    start = stream.read(10)
    if start[:8] != b"\x93NUMPY\1\0":
        raise ValueError("an array in an unknown format")
    length = int.from_bytes(start[8:], "little")
    header = _HEADER.fullmatch(stream.read(length).decode("latin1"))
    if not header:
        raise ValueError("an array whose header cannot be read")
    dtype, shape = np.dtype(header[1]), tuple(int(each) for each in header[3].split(",") if each.strip())
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which could run any code; npnet never loads such files")
    if math.prod(shape) * dtype.itemsize != size - 10 - length:
        raise ValueError(f"an array claims shape {shape}, which is not what there is")
    return dtype, shape, header[2] == "True"


def _read_array(stream: IO[bytes], size: int) -> Array:
    """An array in the .npy format, of ``size`` bytes with its header."""
    dtype, shape, by_columns = _read_header(stream, size)
    array = np.empty(shape, dtype, order="F" if by_columns else "C")
    content = array.reshape(-1, order="A").view(np.uint8)  # the same memory
    for begin in range(0, len(content), _CHUNK):
        piece = content[begin : begin + _CHUNK]
        piece[:] = np.frombuffer(_exactly(stream, len(piece)), np.uint8)
    stream.read(1)  # nothing: at the end of an entry its checksum is compared
    return array


def _exactly(stream: IO[bytes], count: int) -> bytes:
    piece = stream.read(count)
    if len(piece) < count:
        raise ValueError("an array is shorter than it claims")
    return piece


def _write_safetensors(file: IO[bytes], text: str, arrays: Mapping[str, Array]) -> None:
    from safetensors.numpy import save

    # safetensors' NumPy writer corrupts arrays that are not contiguous, without a word; and np.ascontiguousarray makes
    # single numbers (how many steps an optimizer took) arrays of one.
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    # The arrays that were in Fortran order, as products like it, are named: .safetensors has rows only.
    by_columns = json.dumps([name for name, array in arrays.items() if array.flags.f_contiguous])
    text = f"{by_columns}\n{text}"
    # One entry: of several, safetensors writes now this one first, now that, and no two files would be equal.
    file.write(save(contiguous, {_DESCRIPTION: f"{_seal(text, contiguous)}\n{text}"}))


def _read_safetensors(path: Path) -> _Read:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise SaveError(f"{path}: truncated, damaged or not a .safetensors file ({_say(error)})") from error
    if _DESCRIPTION not in metadata:
        raise SaveError(f"{path}: not saved by npnet; its arrays alone go into a model with model.load_state_dict")
    seal, _, text = metadata[_DESCRIPTION].partition("\n")
    if seal != _seal(text, arrays):
        raise SaveError(f"{path}: damaged, its checksum is another")
    by_columns, _, text = text.partition("\n")
    try:
        columns = set(json.loads(by_columns))
    except (ValueError, TypeError, RecursionError) as error:
        raise SaveError(f"{path}: damaged, its description cannot be read ({_say(error)})") from None
    return text.encode(), {
        name: np.asarray(each, order="F" if name in columns else "C") for name, each in arrays.items()
    }


def _seal(text: str, arrays: Mapping[str, Array]) -> str:
    """SHA-256 of the description and all arrays."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()
