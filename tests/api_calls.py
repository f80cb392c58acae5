"""What the tables of public calls (`tests.api_layers`, `api_training`, `api_saving`, `api_rest`) are made of.

A name is that of a class, a function or a method, with a remark in brackets where there are several calls.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import npnet
from npnet import schedules


class Call(NamedTuple):
    """``function(**good)`` works."""

    function: Callable[..., Any]
    good: dict[str, Any]
    also: tuple[type[Exception], ...] = ()  # errors documented for it, besides the usual ones
    patient: tuple[str, ...] = ()  # arguments where a huge number is a wish that would take for ever


CALLS: dict[str, Call] = {}
PATIENT = ("epochs", "rounds", "iterations", "growth_interval")


def call(name: str, function: Callable[..., Any], /, *also: type[Exception], **good: Any) -> None:
    """Enter a call."""
    assert name not in CALLS
    CALLS[name] = Call(function, good, also, PATIENT)


X = np.linspace(-1.5, 2, 18, dtype=np.float32).reshape(6, 3)
Y = npnet.one_hot([0, 1, 1, 0, 1, 0], 2, np.float32)
X64, Y64 = X.astype(np.float64), Y.astype(np.float64)
DY = np.linspace(1, -2, 12, dtype=np.float32).reshape(6, 2)
DX = np.linspace(1, -2, 18, dtype=np.float32).reshape(6, 3)
LOSS, PAIR = npnet.SoftmaxCrossEntropy(), (X, Y)
MODEL = npnet.mlp([3, 4, 4, 2], "tanh", rng=0)
DROPPING = npnet.Sequential(npnet.Linear(3, 3, rng=0), npnet.Dropout(0.5, rng=0), npnet.Linear(3, 2, rng=1))
EVERY = schedules.every_nth(3, 2)
NETWORK = npnet.NetworkWithCheckpointing([3, 4, 4, 2], 2, rng=0)
BATCH = {"x": X, "y": Y}
SGD = npnet.SGD(0.1)


def values(model: Any) -> list[Any]:
    """All parameters."""
    return [parameter.value for layer in getattr(model, "layers", [model]) for parameter in layer.parameters()]


def gradients(model: Any) -> list[Any]:
    """All gradients."""
    return [parameter.gradient for parameter in model.parameters()]


def with_gradients() -> list[Any]:
    """Parameters of a model after a backward pass."""
    model = npnet.mlp([3, 2], rng=0)
    npnet.add_gradients(model, LOSS, X, Y)
    return model.parameters()


def plots_axes() -> Any:
    """Two axes of a new figure."""
    from matplotlib.figure import Figure

    return list(Figure().subplots(1, 2))
