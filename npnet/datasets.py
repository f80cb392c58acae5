"""Data sets: where the files are, whether they are whole, and arrays ready to train on (`npnet.batching`: by parts)."""

import hashlib
import math
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npnet.archive import SaveError, npz_headers, read_npz
from npnet.backend import Array, backend_of, to_host
from npnet.checks import check_flag, check_float, check_number, check_room, check_whole, shown
from npnet.idx import idx_files, is_idx, read_idx_files
from npnet.layer import Pair
from npnet.random import RNG, as_generator

DIABETES_FILE = "diabetes.csv"
_MOST_DIABETES = 768 * 9 * 32  # bytes; no number is written in more than 32
MNIST_FILE = "mnist.npz"
MNIST_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
MNIST_URL_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
# name -> shape, SHA-256 of the raw bytes
MNIST_ARRAYS: dict[str, tuple[tuple[int, ...], str]] = {
    "x_train": ((60000, 28, 28), "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757"),
    "y_train": ((60000,), "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13"),
    "x_test": ((10000, 28, 28), "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161"),
    "y_test": ((10000,), "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5"),
}
_MOST_MNIST = 2 * sum(math.prod(shape) for shape, _ in MNIST_ARRAYS.values())  # bytes; files that hold more are refused
_HOW = "get it with `npnet data fetch`, or copy data/mnist.npz from the npnet repository"


class DataError(ValueError):
    """A data file that is truncated, damaged, or not what it should be; the message names the file."""


def cache_folder() -> Path:
    """Where fetched data sets are kept: $XDG_CACHE_HOME/npnet, by default ~/.cache/npnet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npnet"


def data_folders() -> list[Path]:
    """The folders that are searched, in order: $NPNET_DATA, the repository's data/, the user's cache, and the current
    folder and its data/, where notebooks download to.
    """
    chosen = os.environ.get("NPNET_DATA")
    folders = [*([Path(chosen)] if chosen else []), Path(__file__).parents[1] / "data", cache_folder()]
    with suppress(OSError):  # the current folder may be gone
        folders += [Path.cwd(), Path.cwd() / "data"]
    return list(dict.fromkeys(folders))


def find_mnist(path: str | os.PathLike[str] | None = None) -> Path:
    """The MNIST file: ``path`` (a file, or a folder that holds mnist.npz), else the first of `data_folders` with one.

    Where there is no mnist.npz, the four idx files will do: then this is the one of the images to train on.

    Raises:
        FileNotFoundError: there is none; the message lists where it was looked for. Or $NPNET_DATA is no folder.
    """
    return _find(MNIST_FILE, path, "MNIST", _HOW, idx=True)


def _find(name: str, path: str | os.PathLike[str] | None, what: str, how: str, idx: bool = False) -> Path:
    if not (path is None or isinstance(path, (str, os.PathLike))):
        raise TypeError(f"path: expected a file or folder, got {shown(path)}")
    chosen = os.environ.get("NPNET_DATA")
    if path is None and chosen and not os.path.isdir(chosen):  # noqa: PTH112 - which takes any text
        raise FileNotFoundError(f"NPNET_DATA={chosen}: there is no such folder; correct the variable, or unset it")
    places = [Path(path)] if path is not None else data_folders()
    files = places
    with suppress(OSError):  # a name that is too long, say, which nothing can have
        files = [place / name if place.is_dir() or path is None else place for place in places]
        for place, file in zip(places, files, strict=True):
            if file.is_file():
                return file
            if idx and "x_train" in (parts := idx_files(place)):
                return parts["x_train"]
    raise FileNotFoundError(f"no {what} file at {' or '.join(map(str, files))}; {how}")


def read_mnist(path: str | os.PathLike[str] | None = None) -> dict[str, npt.NDArray[np.uint8]]:
    """The four arrays of an MNIST file as they are stored: uint8, images (samples, 28, 28), labels (samples,).

    Raises:
        FileNotFoundError: see `find_mnist`; or an idx file lacks the three others beside it.
        DataError: the file is truncated, damaged, or does not hold these four arrays.
    """
    file = find_mnist(path)
    try:
        if is_idx(file):
            stored = read_idx_files(file.parent, _MOST_MNIST)
            _check_headers(file, {name: (array.dtype, array.shape) for name, array in stored.items()})
        else:
            _check_headers(file, npz_headers(file))
            stored = dict(read_npz(file, _MOST_MNIST))
    except (DataError, FileNotFoundError):
        raise
    except (SaveError, OSError) as error:
        cause = str(error).removeprefix(f"{file}: ")
        raise DataError(f"{file}: truncated, damaged or not an .npz file ({cause}); {_advice(file)}") from error
    except ValueError as error:  # of an idx file, which it names
        raise DataError(f"{error}; {_advice(file)}") from error
    for name in ("y_train", "y_test"):
        wrong = np.flatnonzero(stored[name] > 9)
        if len(wrong):
            label = f"{name}[{wrong[0]}] is {stored[name][wrong[0]]}"
            raise DataError(f"{file}: not an MNIST file: {label}, expected labels from 0 to 9; {_advice(file)}")
    return {name: stored[name] for name in MNIST_ARRAYS}


def _advice(file: Path) -> str:
    """What to do about a file that is not MNIST, or not any more. Only what npnet fetched itself may be deleted."""
    fetched = file.resolve().parent == cache_folder().resolve()
    return f"{'delete it, and' if fetched else 'name another file, or'} {_HOW}"


def _check_headers(file: Path, headers: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> None:
    """Refuse, before it is read, a file whose arrays are not of MNIST's kinds: see `npnet.archive.npz_headers`.

    Raises:
        DataError: an array is missing, or of another kind; or they are far larger than MNIST.
    """
    missing = [name for name in MNIST_ARRAYS if name not in headers]
    if missing:
        expected = ", ".join(MNIST_ARRAYS)
        raise DataError(f"{file}: not an MNIST file (no {', '.join(missing)}); expected {expected}; {_advice(file)}")
    for part in ("train", "test"):
        (x_type, x_shape), (y_type, y_shape) = headers[f"x_{part}"], headers[f"y_{part}"]
        fits = x_shape[1:] == (28, 28) and y_shape == x_shape[:1]
        if not (x_type == y_type == np.uint8 and fits):
            raise DataError(
                f"{file}: not an MNIST file: expected uint8 images (samples, 28, 28) and uint8 labels (samples,) in "
                f"x_{part}, y_{part}, got {x_type} {x_shape} and {y_type} {y_shape}; {_advice(file)}"
            )
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in headers.values())
    if size > _MOST_MNIST:
        raise DataError(f"{file}: not MNIST: {size} bytes of arrays, MNIST has {_MOST_MNIST // 2}; {_advice(file)}")


def load_mnist(path: str | os.PathLike[str] | None = None, dtype: npt.DTypeLike = np.float64) -> tuple[Pair, Pair]:
    """MNIST, 60,000 + 10,000 handwritten digits, ready to train on.

    Args:
        path: the file, or its folder: mnist.npz, or the four idx files that MNIST was published in (gzipped or not;
            any of them will do). By default `data_folders` are searched: $NPNET_DATA, the repository's data/, the
            user's cache, the current folder and its data/. Nothing is downloaded.
        dtype: of all four arrays.

    Returns:
        (x_train, y_train), (x_test, y_test): rows (samples, 784) scaled to [0, 1], one-hot labels (samples, 10).
        In float64 376 MB + 63 MB for x.

    Raises:
        FileNotFoundError, DataError: the file is missing, damaged, or another.
    """
    dtype, arrays = check_float(dtype), read_mnist(path)
    train, test = (
        (scaled(arrays[f"x_{part}"], dtype), one_hot(arrays[f"y_{part}"], 10, dtype)) for part in ("train", "test")
    )
    return train, test


def scaled(images: Array, dtype: npt.DTypeLike) -> Array:
    """Bytes (samples, ...) as rows of numbers in [0, 1], (samples, features)."""
    rows = images.reshape(len(images), -1).astype(dtype)
    rows /= 255
    return rows


def one_hot(labels: Any, classes: int, dtype: npt.DTypeLike = np.float64) -> Array:
    """Class numbers as rows with a single 1: shape (samples, classes).

    Raises:
        TypeError: the labels are not whole numbers.
        ValueError: they are not one-dimensional, or not all in 0 ... classes - 1.

    >>> one_hot([2, 0], 3)
    array([[0., 0., 1.],
           [1., 0., 0.]])
    """
    labels, classes = to_host(labels), check_whole(classes, "classes", least=1)
    backend_of(labels)  # refuses masks
    dtype = check_float(dtype, "fiub")
    if labels.dtype.kind not in "iu":
        how = "labels.astype(int), if that is what they are"
        if labels.dtype.kind in "OUS":
            how = "names, labels = numpy.unique(labels, return_inverse=True) numbers the names of classes"
        raise TypeError(f"labels: expected whole numbers, got dtype {labels.dtype}; {how}")
    if labels.ndim != 1 or (labels.size and not 0 <= labels.min() <= labels.max() < classes):
        raise ValueError(f"labels: expected shape (samples,) with values from 0 to {classes - 1}, got {shown(labels)}")
    check_room(labels.size * classes, "classes")
    rows = np.zeros((len(labels), classes), dtype)
    rows[np.arange(len(labels)), labels] = 1
    return rows


def verify_mnist(path: str | os.PathLike[str] | None = None) -> Path:
    """Check every byte of the MNIST file against the known hashes; returns the file's path.

    Raises:
        FileNotFoundError, DataError: it is missing, damaged, or holds other data than MNIST.
    """
    file = find_mnist(path)
    for name, array in read_mnist(path).items():
        shape, expected = MNIST_ARRAYS[name]
        found = hashlib.sha256(array.tobytes()).hexdigest()
        if array.shape != shape or found != expected:
            raise DataError(
                f"{file}: {name} is not MNIST's: shape {array.shape}, SHA-256 {found[:8]}..., expected {shape}, "
                f"{expected[:8]}...; {_advice(file)}"
            )
    return file


def fetch_mnist(folder: str | os.PathLike[str] | None = None) -> Path:
    """Download MNIST (11.5 MB) into ``folder``, by default the user's cache, unless it is there; the hash is checked.

    Whoever looks there meanwhile sees no file or all of it, and any number of processes may fetch at once. A file that
    is damaged is replaced.

    Raises:
        ImportError: the package pooch is missing.
        OSError: the download failed, or the folder cannot be written.
    """
    try:
        import pooch
    except ImportError as error:
        raise ImportError("downloading needs the package pooch: pip install 'npnet[data]'") from error
    target = Path(folder) if folder is not None else cache_folder()
    handled = sys.exception()  # the caller's, if this is called in an except clause
    try:
        if not _is_fetched(target / MNIST_FILE):
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f"{MNIST_FILE}.", dir=target) as own:
                fetched = Path(own) / MNIST_FILE
                pooch.retrieve(
                    MNIST_URL, f"sha256:{MNIST_URL_SHA256}", fname=MNIST_FILE, path=Path(own), progressbar=True
                )
                fetched.chmod(0o644)  # pooch lets its owner alone read it
                if not _is_fetched(target / MNIST_FILE):  # by another process
                    fetched.replace(target / MNIST_FILE)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
        cause = str(_unwrapped(error, handled)).rstrip(".")
        raise OSError(
            f"MNIST could not be fetched from {MNIST_URL} into {target}: {cause}. By hand: put "
            "mnist.npz there (downloaded in a browser, or data/mnist.npz of the npnet repository), or anywhere and "
            "name its folder in the environment variable NPNET_DATA"
        ) from error
    return verify_mnist(target)


def _unwrapped(error: BaseException, outermost: BaseException | None) -> BaseException:
    """What the network library wrapped again and again: "[Errno 111] Connection refused" says it all."""
    while type(error).__module__.startswith(("requests.", "urllib3.")):
        inner = error.__cause__ or error.__context__
        if inner is None or inner is outermost:
            break
        error = inner
    return error


def _is_fetched(file: Path) -> bool:
    """The file is there, every byte as it was offered."""
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == MNIST_URL_SHA256


def load_diabetes(
    path: str | os.PathLike[str] | None = None, dtype: npt.DTypeLike = np.float64, standardize: bool = False
) -> Pair:
    """The Pima Indians diabetes data: 768 patients, 8 features, and whether each has diabetes.

    Features: pregnancies, glucose, blood pressure, skin thickness, insulin, body mass index, pedigree, age. Zeros in
    features 1 to 5 (counted from 0) stand for missing values, 5, 35, 227, 374 and 11 of them; they are given as they
    are.

    Args:
        path: the file diabetes.csv, or its folder; searched as for `load_mnist`.
        dtype: of both arrays.
        standardize: give each feature mean 0 and standard deviation 1.

    Returns:
        (x, y): (768, 8), and (768, 1) of 0 and 1.

    Raises:
        FileNotFoundError, DataError: the file is missing, damaged, or another.
    """
    dtype, standardize = check_float(dtype), check_flag(standardize, "standardize")
    file = _find(DIABETES_FILE, path, "diabetes", "copy data/diabetes.csv from the npnet repository")
    if file.stat().st_size > _MOST_DIABETES:
        raise DataError(f"{file}: not the diabetes data: more than {_MOST_DIABETES} bytes")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        # Not np.loadtxt: to silence its warning of a file without rows would disturb other threads.
        table = np.array([line.split(",") for line in lines if line.strip()], np.float64)
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: damaged, or not a table of numbers ({error})") from error
    measured = table.shape == (768, 9) and (np.abs(table) < 1e4).all()  # not NaN, nor what overflows
    if not measured or not np.isin(table[:, 8], (0, 1)).all():
        raise DataError(f"{file}: expected 768 rows of 8 features and a 0 or 1, got shape {table.shape}")
    x, y = table[:, :8], table[:, 8:]
    if standardize and not x.std(axis=0).all():
        raise DataError(f"{file}: a feature is the same for all patients, and cannot be standardized")
    if standardize:
        x = (x - x.mean(axis=0)) / x.std(axis=0)
    return x.astype(dtype), y.astype(dtype)


def make_linear(
    n: int,
    noise: float = 0.1,
    *,
    low: float = -1.0,
    high: float = 1.0,
    rng: RNG = None,
    dtype: npt.DTypeLike = np.float64,
) -> Pair:
    """Points near the line y = 2 x + 3: x uniform in [low, high), y with normal noise of standard deviation ``noise``.

    Returns:
        (x, y): (n, 1) each.

    Raises:
        TypeError, ValueError: an argument is not such a number, or ``high`` is below ``low``.
    """
    n, noise, generator = check_whole(n, "n", least=1), check_number(noise, "noise"), as_generator(rng)
    low, dtype = check_number(low, "low", least=-math.inf), check_float(dtype)
    high = check_number(high, "high", least=low)
    check_number(high - low, "high - low")
    check_room(n, "n")
    x = generator.uniform(low, high, (n, 1))
    y = 2 * x + 3 + noise * generator.standard_normal((n, 1))
    with np.errstate(over="ignore"):  # infinite, in a small dtype
        return x.astype(dtype), y.astype(dtype)
