"""The files in which MNIST was published: idx, arrays of bytes behind a header, one file each, often gzipped.

Format: two zero bytes, 8 (for bytes), the number of axes, each axis's length in 4 bytes (big-endian), then the
numbers, row by row. Source: LeCun, Cortes & Burges, "The MNIST database of handwritten digits", 1998.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
"""Names of MNIST's four files, by names of its arrays; some have a dot before "idx", or .gz at the end."""


def idx_files(folder: Path) -> dict[str, Path]:
    """Those of the four that are in the folder, by the names of the arrays."""
    found = {}
    for name, plain in IDX_FILES.items():
        dotted = plain.replace("-idx", ".idx")
        paths = (folder / f"{each}{end}" for each in (plain, dotted) for end in ("", ".gz"))
        file = next((path for path in paths if path.is_file()), None)
        if file is not None:
            found[name] = file
    return found


def is_idx(file: Path) -> bool:
    """Whether the file is called like one of the four."""
    return file.name.removesuffix(".gz").replace(".idx", "-idx") in IDX_FILES.values()


def read_idx(file: Path, most_bytes: int) -> npt.NDArray[np.uint8]:
    """The array in an idx file.

    Args:
        most_bytes: that it may take; a file that claims more is refused before memory is taken.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is truncated, damaged, too large, or no idx file of bytes.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            start = stream.read(4)
            if len(start) < 4 or start[:3] != b"\0\0\x08" or not 1 <= start[3] <= 3:
                raise ValueError("it does not begin as an idx file of bytes does")
            header = stream.read(4 * start[3])
            shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(0, len(header), 4))
            size = math.prod(shape)
            if size > most_bytes:
                raise ValueError(f"it claims to hold more than the {most_bytes} bytes that it can")
            content = stream.read(size + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(str(error)) from None
    if len(shape) < start[3] or len(content) != size:
        raise ValueError(f"it claims shape {shape}, which is not what there is")
    return np.frombuffer(bytearray(content), np.uint8).reshape(shape)  # which can be written to


def read_idx_files(folder: Path, most_bytes: int) -> dict[str, npt.NDArray[np.uint8]]:
    """MNIST's four arrays from a folder.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: one cannot be read; the message begins with its name.
    """
    files, arrays = idx_files(folder), {}
    missing = " and no ".join(plain for name, plain in IDX_FILES.items() if name not in files)
    if missing:
        raise FileNotFoundError(f"there is no {missing} in {folder}; MNIST's idx files are four, beside each other")
    for name, file in files.items():
        try:
            arrays[name] = read_idx(file, most_bytes)
        except (ValueError, OSError) as error:
            raise ValueError(f"{file}: truncated, damaged or not an idx file ({error})") from error
    return arrays
