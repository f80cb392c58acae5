"""Layers for which memory runs out at a call of one's choice, and ways to take the first step of a training."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

import npnet
from npnet import Adam, Dense, Dropout, GradScaler, Optimizer, Sequential, SoftmaxCrossEntropy, accumulated_step
from npnet.schedules import as_schedule

rng = np.random.default_rng(0)
X = rng.standard_normal((48, 20)).astype(np.float32)
Y = npnet.one_hot(rng.integers(3, size=48), 3).astype(np.float32)


class DeviceMemoryError(MemoryError):
    """As CuPy's OutOfMemoryError, which is a MemoryError."""


class Exhausting(Dense):
    """Memory runs out at one call of all these layers' passes."""

    left = -1
    calls: list[str]

    def forward(self, x: Any) -> Any:
        if self.training:  # not when the data are checked
            Exhausting.count("forward")
        return super().forward(x)

    def backward_(self, *given: Any) -> Any:
        Exhausting.count("backward")
        return super().backward_(*given)

    @classmethod
    def count(cls, name: str) -> None:
        cls.calls.append(name)
        if len(cls.calls) == cls.left:
            raise DeviceMemoryError("Out of memory allocating 1,024 bytes")

    @classmethod
    def at(cls, call: int) -> None:
        Exhausting.left, Exhausting.calls = call, []


def deep(depth: int = 9) -> Sequential:
    sizes = [20, *[16] * (depth - 1), 3]
    layers = [Exhausting(n, m, "tanh", rng=i) for i, (n, m) in enumerate(pairwise(sizes))]
    return Sequential(*layers[:4], Dropout(0.1, key=1), *layers[4:])


def state(model: Any, optimizer: Optimizer | None = None, *others: Any) -> list[Any]:
    """All numbers, bit for bit."""
    parameters = model.named_parameters()
    kept = {} if optimizer is None else optimizer.state_dict(parameters)
    arrays = [(name, each.value.tobytes()) for name, each in parameters.items()]
    assert all(each.gradient is None for each in parameters.values())
    return [arrays, [(name, np.asarray(each).tobytes()) for name, each in kept.items()], *map(str, others)]


def steps_of(**options: Any) -> dict[str, Callable[[Sequential, Optimizer, GradScaler], object]]:
    """Ways to take the first step of a training."""
    common: dict[str, Any] = {"epochs": 1, "batch_size": 16, "rng": 0, "log": False} | options

    def fit(**more: Any) -> Callable[..., object]:
        return lambda model, optimizer, scaler: npnet.fit(
            model, (X[:16], Y[:16]), loss=SoftmaxCrossEntropy(), optimizer=optimizer,
            **common | more | ({"scaler": scaler} if "scaler" in more else {}),
        )  # fmt: skip

    def accumulated(model: Sequential, optimizer: Optimizer, scaler: GradScaler) -> object:
        pairs = [(X[i : i + 16], Y[i : i + 16]) for i in (0, 16, 32)]
        schedule = as_schedule("none", len(model.layers), npnet.layer.needs_saved(model.layers))
        return accumulated_step(
            model, SoftmaxCrossEntropy(), optimizer, schedule, pairs, 48, streaming=False, clip_norm=1.0
        )

    return {
        "fit": fit(),
        "fit, checkpointed": fit(schedule="sqrt"),
        "fit, not streaming": fit(streaming=False),
        "fit, clipped": fit(clip_norm=1.0),
        "fit, scaled": fit(scaler=True),
        "fit, accumulated": fit(batch_size=4, accumulation_steps=4),
        "accumulated_step": accumulated,
    }


STEPS = steps_of()


def first_update(name: str) -> int:
    """How many calls there are until something is updated."""
    Exhausting.at(-1)
    model, optimizer, updates = deep(), Adam(), []
    update = optimizer._update
    optimizer._update = lambda *given: updates.append(len(Exhausting.calls)) or update(*given)  # type: ignore
    STEPS[name](model, optimizer, GradScaler())
    return updates[0]
