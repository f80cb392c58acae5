"""Initial weights: each a function of (shape, generator) that returns a float64 array.

Shapes are those of weights, (out, in): ``fan_in`` is shape[1], ``fan_out`` shape[0].
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Initializer: TypeAlias = Callable[[tuple[int, int], np.random.Generator], npt.NDArray[np.float64]]


def normal(shape: tuple[int, int], generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Standard normal, N(0, 1): the classic exercise's choice (Nielsen, 2015, chapter 1)."""
    return generator.standard_normal(shape)


def xavier_normal(shape: tuple[int, int], generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """N(0, 2 / (fan_in + fan_out)): keeps the variance through tanh and identity layers, both ways.

    Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010, eq. 12.
    """
    return generator.standard_normal(shape) * math.sqrt(2.0 / (shape[0] + shape[1]))


def kaiming_normal(shape: tuple[int, int], generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """N(0, 2 / fan_in): keeps the variance of what ReLU layers pass forward.

    He, Zhang, Ren & Sun, "Delving Deep into Rectifiers", 2015, eq. 10.
    """
    return generator.standard_normal(shape) * math.sqrt(2.0 / shape[1])
