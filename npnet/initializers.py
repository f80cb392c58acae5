"""Initial weights: each a function of (shape, generator) that returns a float64 array.

Shapes are those of weights, (out, in): ``fan_in`` is shape[1], ``fan_out`` shape[0]. Options are bound with
``functools.partial``, such as ``initializer=partial(xavier_uniform, gain=calculate_gain("relu"))``.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from npnet.checks import check_number

Floats: TypeAlias = npt.NDArray[np.float64]
Shape: TypeAlias = tuple[int, int]
Initializer: TypeAlias = Callable[[Shape, np.random.Generator], Floats]

GAINS = {"linear": 1.0, "identity": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2)}


def calculate_gain(nonlinearity: str) -> float:
    """The factor that a nonlinearity's weights need for the variance to stay: as ``torch.nn.init.calculate_gain``.

    Raises:
        ValueError: no nonlinearity has that name.
    """
    if nonlinearity not in GAINS:
        raise ValueError(f"unknown nonlinearity {nonlinearity!r}; choose one of {', '.join(map(repr, GAINS))}")
    return GAINS[nonlinearity]


def zeros(shape: Shape, generator: np.random.Generator) -> Floats:
    """All zeros: for biases. (Weights that start equal stay equal: their units learn the same.)"""
    return np.zeros(shape)


def normal(shape: Shape, generator: np.random.Generator, mean: float = 0.0, std: float = 1.0) -> Floats:
    """N(mean, std^2); by default the classic exercise's choice (Nielsen, 2015, chapter 1)."""
    return mean + check_number(std, "std") * generator.standard_normal(shape)


def xavier_normal(shape: Shape, generator: np.random.Generator, gain: float = 1.0) -> Floats:
    """N(0, gain^2 * 2 / (fan_in + fan_out)): keeps the variance through tanh and identity layers, both ways.

    Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010, eq. 12.
    """
    return generator.standard_normal(shape) * (gain * math.sqrt(2.0 / (shape[0] + shape[1])))


def xavier_uniform(shape: Shape, generator: np.random.Generator, gain: float = 1.0) -> Floats:
    """U(-r, r), r = gain * sqrt(6 / (fan_in + fan_out)): the same variance as `xavier_normal` (ibid., eq. 16)."""
    reach = gain * math.sqrt(6.0 / (shape[0] + shape[1]))
    return generator.uniform(-reach, reach, shape)


def kaiming_normal(
    shape: Shape, generator: np.random.Generator, mode: str = "fan_in", nonlinearity: str = "relu"
) -> Floats:
    """N(0, gain^2 / fan): keeps the variance of what passes forward ("fan_in") or backward ("fan_out").

    He, Zhang, Ren & Sun, "Delving Deep into Rectifiers", 2015, eq. 10 and 14.
    """
    return generator.standard_normal(shape) * (calculate_gain(nonlinearity) / math.sqrt(_fan(shape, mode)))


def kaiming_uniform(
    shape: Shape, generator: np.random.Generator, mode: str = "fan_in", nonlinearity: str = "relu"
) -> Floats:
    """U(-r, r), r = gain * sqrt(3 / fan): the same variance as `kaiming_normal`."""
    reach = calculate_gain(nonlinearity) * math.sqrt(3.0 / _fan(shape, mode))
    return generator.uniform(-reach, reach, shape)


def _fan(shape: Shape, mode: str) -> int:
    fans = {"fan_in": shape[1], "fan_out": shape[0]}
    if mode not in fans:
        raise ValueError(f"mode: expected 'fan_in' or 'fan_out', got {mode!r}")
    return fans[mode]


INITIALIZERS: dict[str, Initializer] = {
    function.__name__: function
    for function in (zeros, normal, xavier_normal, xavier_uniform, kaiming_normal, kaiming_uniform)
}


def as_initializer(initializer: str | Initializer) -> Initializer:
    """The initializer called ``initializer``, or itself.

    Raises:
        ValueError: no initializer has that name.
    """
    if callable(initializer):
        return initializer
    if not isinstance(initializer, str) or initializer not in INITIALIZERS:
        raise ValueError(f"unknown initializer {initializer!r}; choose one of {', '.join(map(repr, INITIALIZERS))}")
    return INITIALIZERS[initializer]
