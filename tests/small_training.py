"""A training that takes milliseconds and has everything in it that a save has to hold; and ways to break it off."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import npnet
from npnet import SGD, Adam, Dense, Dropout, GradScaler, History, Saver, Sequential, SoftmaxCrossEntropy, random

EPOCHS, SAMPLES, BATCH = 3, 23, 4
data = np.random.default_rng(0)
X = data.standard_normal((SAMPLES, 5)).astype(np.float32)
Y = npnet.one_hot(data.integers(3, size=SAMPLES), 3).astype(np.float32)


class Broken(Exception):
    """The training was broken off."""


def small_model(seed: int = 0, p: float = 0.2) -> Sequential:
    layers = [Dense(5, 8, "tanh", rng=seed), Dropout(p, key=11), Dense(8, 8, rng=seed + 1), Dropout(p, key=12)]
    return Sequential(*layers, Dense(8, 3, "identity", rng=seed + 2))


@dataclass
class Training:
    """How to train; `run` makes all of it anew, as a script does that is started again."""

    optimizer: Callable[[], npnet.Optimizer] = Adam
    options: dict[str, Any] = field(default_factory=dict)
    model: Callable[[int], Sequential] = small_model
    scaler: Callable[[], GradScaler] | None = None
    bits: type[np.random.BitGenerator] | None = np.random.PCG64  # None: the stream of set_seed
    suffix: str = ".npz"

    def changed(self, **options: Any) -> "Training":
        """The same with other options of fit."""
        return replace(self, options=self.options | options)

    def steps(self) -> int:
        """Calls of the loss in an epoch."""
        return -(-SAMPLES // int(self.options.get("batch_size", BATCH)))

    def run(self, seed: int = 0, at: int = 0, saver: Saver | None = None, **options: Any) -> "Result":
        """Train.

        Args:
            seed: of the weights and the order: whatever it is, a run that is gone on with takes them from its save.
            at: break off at this call of the loss.
        """
        model, optimizer, scaler = self.model(seed), self.optimizer(), self.scaler and self.scaler()
        npnet.set_seed(seed)
        random.set_next_step(1000 * seed)
        generator = None if self.bits is None else np.random.Generator(self.bits(seed))
        result = Result(model, optimizer, scaler, generator)
        loss, calls = SoftmaxCrossEntropy(), 0

        def value_and_gradient(output: np.ndarray, target: np.ndarray) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Broken
            return SoftmaxCrossEntropy.value_and_gradient(loss, output, target)

        loss.value_and_gradient = value_and_gradient  # type: ignore[method-assign]
        result.fit(**{"loss": loss, "epochs": EPOCHS, "batch_size": BATCH} | self.options | options, saver=saver)
        return result

    def broken(self, path: Path, at: int, every: int = 3, seed: int = 0, resume: bool = False) -> None:
        """Train, and break off at the given call of the loss."""
        try:
            self.run(seed, at, Saver(path, every, resume=resume))
        except Broken:
            return
        raise AssertionError(f"it did not come to call {at}")

    def resumed(self, path: Path, **options: Any) -> "Result":
        """Go on, in other circumstances; if nothing was saved yet, begin."""
        return self.run(7 if path.exists() else 0, saver=Saver(path, 3, resume=True), **options)


@dataclass
class Result:
    """All that a training changes."""

    model: Sequential
    optimizer: npnet.Optimizer
    scaler: GradScaler | None
    generator: np.random.Generator | None
    history: History = field(default_factory=History)

    def fit(self, **options: Any) -> None:
        npnet.fit(
            self.model, (X, Y), optimizer=self.optimizer, scaler=self.scaler, rng=self.generator,
            **{"history": self.history, "test_data": (X, Y), "log": False} | options,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Every number, in a form that == compares bit for bit."""
        parameters = self.model.named_parameters()
        arrays = {name: each.value for name, each in parameters.items()} | self.optimizer.state_dict(parameters)
        return {
            **{name: (np.shape(array), np.asarray(array).tobytes()) for name, array in arrays.items()},
            "scaler": self.scaler and self.scaler.state_dict(),
            "order": str(random.as_generator(self.generator).bit_generator.state),
            "next step": random.next_step(),
            "history": [(each.epoch, each.steps, each.loss, each.accuracy) for each in self.history.epochs],
            "learning rate": self.optimizer.learning_rate,
        }


def mixed(seed: int) -> Sequential:
    return npnet.mixed_precision(small_model(seed))


def scaled(seed: int) -> Sequential:
    """The same without dropout, so that a large loss scale overflows now and then."""
    return npnet.mixed_precision(small_model(seed, p=0.0))


def by_rows(seed: int) -> Sequential:
    """With weights in C order, as a user may set them: products with them round otherwise."""
    model = small_model(seed)
    for parameter in model.parameters():
        parameter.value = np.ascontiguousarray(parameter.value)
    return model


TRAININGS = {
    "adam": Training(),
    "sgd, weight decay": Training(lambda: SGD(0.1, weight_decay=0.01)),
    "momentum, decay": Training(lambda: SGD(0.1, momentum=0.9), {"decay": True}),
    "adam, weight decay, clipped": Training(lambda: Adam(0.01, weight_decay=0.1), {"clip_norm": 0.3}),
    "scaler, mixed precision": Training(
        lambda: SGD(0.1), model=mixed, scaler=lambda: GradScaler(2.0**20, growth_interval=3)
    ),
    "scaler, clipped, accumulated": Training(
        Adam, {"clip_norm": 1.0, "accumulation_steps": 2}, scaled, lambda: GradScaler(2.0**19, growth_interval=2)
    ),
    "accumulated, last window partial": Training(options={"accumulation_steps": 4, "decay": True}),
    "accumulated, all at the end": Training(options={"accumulation_steps": 4, "streaming": False}),
    "not streaming": Training(options={"streaming": False}),
    "in order": Training(options={"shuffle": False}),
    "a schedule": Training(options={"schedule": "sqrt"}),
    "checkpointed parts": Training(model=lambda seed: Sequential(npnet.checkpoint.checkpoint(small_model(seed)))),
    "set_seed": Training(bits=None),
    **{kind.__name__: Training(bits=kind) for kind in (np.random.MT19937, np.random.Philox, np.random.SFC64)},
    "PCG64DXSM": Training(bits=np.random.PCG64DXSM),
    "safetensors": Training(lambda: Adam(0.01, weight_decay=0.1), suffix=".safetensors"),
    "weights by rows": Training(model=by_rows),
    "safetensors, weights by rows": Training(model=by_rows, suffix=".safetensors"),
    "safetensors, MT19937": Training(bits=np.random.MT19937, suffix=".safetensors"),
}
"""By name. In each an epoch's last batch is not full, and there is a layer that draws random numbers in each step."""
