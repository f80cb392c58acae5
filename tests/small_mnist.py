"""MNIST files that are quick to read: a few random images, or the first of the real ones."""

from functools import cache
from pathlib import Path

import numpy as np

from npnet.datasets import read_mnist

Arrays = dict[str, np.ndarray]
real_mnist = cache(read_mnist)


def random_digits(train: int = 6, test: int = 3, seed: int = 0) -> Arrays:
    """Noise in the shape of MNIST."""
    rng = np.random.default_rng(seed)
    return {
        "x_train": rng.integers(0, 256, (train, 28, 28), np.uint8),
        "y_train": rng.integers(0, 10, train, np.uint8),
        "x_test": rng.integers(0, 256, (test, 28, 28), np.uint8),
        "y_test": rng.integers(0, 10, test, np.uint8),
    }


def first_digits(train: int, test: int) -> Arrays:
    """The first samples of the real MNIST."""
    return {name: array[: test if name.endswith("test") else train] for name, array in real_mnist().items()}


def write(path: Path, arrays: Arrays, compressed: bool = False) -> Path:
    """An .npz file of ``arrays``, or, where ``path`` is to be a folder, mnist.npz in it."""
    if path.suffix != ".npz":
        path /= "mnist.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def equal(a: Arrays, b: Arrays) -> bool:
    """The same arrays under the same names."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
