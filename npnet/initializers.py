"""Initial weights: each a function of (shape, generator) that returns a float64 array.

Shapes are those of weights, (out, in): ``fan_in`` is shape[1], ``fan_out`` shape[0]. Options are bound with
``functools.partial``, such as ``initializer=partial(xavier_uniform, gain=calculate_gain("relu"))``.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from npnet.checks import check_kind, check_number, check_room, check_sizes, shown

Floats: TypeAlias = npt.NDArray[np.float64]
Shape: TypeAlias = tuple[int, int]
Initializer: TypeAlias = Callable[[Shape, np.random.Generator], Floats]

GAINS = {"linear": 1.0, "identity": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2)}


def calculate_gain(nonlinearity: str) -> float:
    """The factor that a nonlinearity's weights need for the variance to stay: as ``torch.nn.init.calculate_gain``.

    Raises:
        ValueError: no nonlinearity has that name.
    """
    if not isinstance(nonlinearity, str) or nonlinearity not in GAINS:
        raise ValueError(f"unknown nonlinearity {shown(nonlinearity)}; choose one of {', '.join(map(repr, GAINS))}")
    return GAINS[nonlinearity]


def _checked(shape: Shape, generator: np.random.Generator) -> Shape:
    """``shape``, if it is a weight's, and ``generator`` is one."""
    check_kind(generator, np.random.Generator, "generator", "numpy.random.default_rng(0)")
    check_kind(shape, tuple, "shape", "(30, 784)")
    out, in_ = check_sizes(shape) if len(shape) == 2 else (0, 0)
    if not out:
        raise ValueError(f"shape: expected (out, in), got {shown(shape)}")
    check_room(out * in_, "shape")
    return out, in_


def zeros(shape: Shape, generator: np.random.Generator) -> Floats:
    """All zeros: for biases. (Weights that start equal stay equal: their units learn the same.)"""
    return np.zeros(_checked(shape, generator))


def normal(shape: Shape, generator: np.random.Generator, mean: float = 0.0, std: float = 1.0) -> Floats:
    """N(mean, std^2); by default the classic exercise's choice (Nielsen, 2015, chapter 1)."""
    mean, std = check_number(mean, "mean", least=-math.inf), check_number(std, "std")
    shape = _checked(shape, generator)
    return mean + std * generator.standard_normal(shape)


def xavier_normal(shape: Shape, generator: np.random.Generator, gain: float = 1.0) -> Floats:
    """N(0, gain^2 * 2 / (fan_in + fan_out)): keeps the variance through tanh and identity layers, both ways.

    Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010, eq. 12.
    """
    shape, gain = _checked(shape, generator), check_number(gain, "gain")
    return generator.standard_normal(shape) * (gain * math.sqrt(2.0 / (shape[0] + shape[1])))


def xavier_uniform(shape: Shape, generator: np.random.Generator, gain: float = 1.0) -> Floats:
    """U(-r, r), r = gain * sqrt(6 / (fan_in + fan_out)): the same variance as `xavier_normal` (ibid., eq. 16)."""
    shape, gain = _checked(shape, generator), check_number(gain, "gain")
    reach = gain * math.sqrt(6.0 / (shape[0] + shape[1]))
    return generator.uniform(-reach, reach, shape)


def kaiming_normal(
    shape: Shape, generator: np.random.Generator, mode: str = "fan_in", nonlinearity: str = "relu"
) -> Floats:
    """N(0, gain^2 / fan): keeps the variance of what passes forward ("fan_in") or backward ("fan_out").

    He, Zhang, Ren & Sun, "Delving Deep into Rectifiers", 2015, eq. 10 and 14.
    """
    shape = _checked(shape, generator)
    return generator.standard_normal(shape) * (calculate_gain(nonlinearity) / math.sqrt(_fan(shape, mode)))


def kaiming_uniform(
    shape: Shape, generator: np.random.Generator, mode: str = "fan_in", nonlinearity: str = "relu"
) -> Floats:
    """U(-r, r), r = gain * sqrt(3 / fan): the same variance as `kaiming_normal`."""
    shape = _checked(shape, generator)
    reach = calculate_gain(nonlinearity) * math.sqrt(3.0 / _fan(shape, mode))
    return generator.uniform(-reach, reach, shape)


def _fan(shape: Shape, mode: str) -> int:
    fans = {"fan_in": shape[1], "fan_out": shape[0]}
    if not isinstance(mode, str) or mode not in fans:
        raise ValueError(f"mode: expected 'fan_in' or 'fan_out', got {shown(mode)}")
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
        raise ValueError(
            f"unknown initializer {shown(initializer)}; choose one of {', '.join(map(repr, INITIALIZERS))}"
        )
    return INITIALIZERS[initializer]
