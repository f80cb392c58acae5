"""Fixtures of several test files: the classic exercise's code, which is not part of the project, and MNIST."""

import importlib.util
import os
from pathlib import Path

# Before NumPy is loaded: on products this small two BLAS threads only wait for each other, badly so on a busy machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest

import npnet

BESIDE_THE_PROJECT = Path(__file__).parents[2] / "shared" / "peers" / "classic.py"


@pytest.fixture(scope="session")
def classic():
    """The classic exercise as a module: Network and NetworkWithCheckpointing as published, but for a warning."""
    path = Path(os.environ.get("NPNET_CLASSIC") or BESIDE_THE_PROJECT)
    if not path.is_file():
        pytest.skip(f"the classic exercise's code is not at {path}; name its place in NPNET_CLASSIC")
    spec = importlib.util.spec_from_file_location("classic", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.sigmoid = np.errstate(over="ignore")(module.sigmoid)  # so that only npnet's own warnings fail a test
    return module


@pytest.fixture(scope="session")
def mnist():
    """(x_train, y_train), (x_test, y_test), whole; slices of it are views."""
    return npnet.load_mnist()
