"""Fixtures of several test files: the classic exercise's code, which is not part of the project, and MNIST."""

import gc
import os
import tempfile
from pathlib import Path

# Before NumPy is loaded: on products this small two BLAS threads only wait for each other, badly so on a busy machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest

import npnet
from tests.classic_code import load_classic

collect_ignore = ["rank_work.py"]  # no tests in it, and it needs an MPI


@pytest.fixture(scope="session")
def classic():
    """The classic exercise as a module: Network and NetworkWithCheckpointing as published, but for a warning."""
    try:
        module = load_classic()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    module.sigmoid = np.errstate(over="ignore")(module.sigmoid)  # so that only npnet's own warnings fail a test
    return module


@pytest.fixture(scope="module")
def fast_collection():
    """`npnet.measure_peak` collects garbage first; let that not look at all that pytest has loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def mnist():
    """(x_train, y_train), (x_test, y_test), whole; slices of it are views."""
    return npnet.load_mnist()


@pytest.fixture
def folder():
    """In memory where that is possible: a disk takes longer than npnet."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)
