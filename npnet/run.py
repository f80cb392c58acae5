"""A training run: all that changes from step to step, so that it can be saved and resumed."""

import math
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

from npnet.attributes import Settings
from npnet.backend import Array, to_host
from npnet.blocks import Dropout
from npnet.checks import check_number, check_whole
from npnet.layers import Sequential
from npnet.model_tree import all_layers
from npnet.optimizers import Optimizer
from npnet.precision import GradScaler
from npnet.random import next_step, set_next_step
from npnet.ranks import Ranks
from npnet.savable import as_json
from npnet.storage import put


@dataclass(frozen=True)
class Epoch:
    """One pass over the data: its mean loss over the samples, its time, and the accuracy on the test data after it."""

    epoch: int
    steps: int
    loss: float
    accuracy: float | None
    seconds: float


@dataclass
class History(Settings):
    """What happened in training, epoch by epoch. An epoch that was broken off is there, without accuracy."""

    epochs: list[Epoch] = field(default_factory=list)
    _synonyms: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("history", "losses", "loss"), "[each.loss for each in history.epochs]"),
        "accuracies": "[each.accuracy for each in history.epochs]",
    }

    @property
    def seconds(self) -> float:
        """Time spent in training steps."""
        return sum(epoch.seconds for epoch in self.epochs)

    @property
    def accuracy(self) -> float | None:
        """The last accuracy measured."""
        return next((epoch.accuracy for epoch in reversed(self.epochs) if epoch.accuracy is not None), None)

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per epoch, for tables and files."""
        return [asdict(epoch) for epoch in self.epochs]


@dataclass
class TrainingRun:
    """Where a training stands, between two steps."""

    model: Sequential
    optimizer: Optimizer
    scaler: GradScaler | None
    generator: np.random.Generator  # of the order of the samples
    history: History
    conditions: dict[str, Any]
    """What else decides the numbers, as JSON: to go on, all of it must be as it was."""
    epochs_before: int  # in the history when the run began
    samples: int = 1  # of an epoch
    window: int = 1  # samples to a step; the last one of an epoch takes what is left
    losses: list[float] = field(default_factory=list)  # of this epoch's steps
    seconds: float = 0.0  # in these
    stream: Any = None  # the generator's state when this epoch began

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return len(self.history.epochs) - self.epochs_before

    @property
    def number(self) -> int:
        """The number that the epoch under way will have in the history, from 1."""
        return len(self.history.epochs) + 1

    def mean_loss(self, last: int = 0) -> float:
        """The mean loss over the samples of this epoch's steps, or of the ``last`` so many steps."""
        losses = self.losses[-last:]
        steps = range(len(self.losses) - len(losses), len(self.losses))
        return statistics.fmean(losses, [min(self.window, self.samples - step * self.window) for step in steps])

    def end_epoch(self, accuracy: float | None) -> None:
        """Put this epoch into the history."""
        if self.losses:
            loss = self.mean_loss()
            self.history.epochs.append(Epoch(self.number, len(self.losses), loss, accuracy, self.seconds))
        self.losses, self.seconds = [], 0.0

    def state(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """The run as JSON, and its arrays by name, not copied."""
        parameters = self.model.named_parameters()
        said = {
            "history": self.history.rows(),
            "epochs_before": self.epochs_before,
            "seconds": self.seconds,
            "stream": as_json(self.stream if self.losses else self.generator.bit_generator.state, "generator"),
            "next_step": next_step(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }
        arrays = {name: each.value for name, each in self.model.named_arrays().items()}
        arrays |= {f"optimizer/{name}": array for name, array in self.optimizer.state_dict(parameters).items()}
        return said, arrays | {"run/losses": np.array(self.losses)}

    def load(self, said: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Go on from what `state` gave.

        Raises:
            ValueError, TypeError, KeyError: it does not fit.
        """
        parameters, bits = self.model.named_parameters(), self.generator.bit_generator
        history, before = [_epoch(row) for row in said["history"]], check_whole(said["epochs_before"], "epochs_before")
        losses, seconds = arrays["run/losses"], check_number(said["seconds"], "seconds", below=1e18)
        if before > len(history) or losses.ndim != 1 or losses.dtype != np.float64:
            raise ValueError("the history contradicts itself")
        if len(losses) * self.window >= self.samples + self.window:  # more steps than an epoch has
            raise ValueError("the history contradicts itself")
        own = self.model.named_arrays()
        if any(arrays[name].dtype != each.value.dtype for name, each in own.items()):
            raise ValueError("the arrays are of another dtype")
        remembered = {name.removeprefix("optimizer/"): each for name, each in arrays.items() if name.startswith("opt")}
        with ExitStack() as undo:  # all of it, or nothing
            undo.callback(setattr, bits, "state", bits.state)
            bits.state = said["stream"]
            undo.callback(set_next_step, next_step())
            set_next_step(said["next_step"])
            if self.scaler is not None:
                undo.callback(self.scaler.load_state_dict, self.scaler.state_dict())
                self.scaler.load_state_dict(said["scaler"])
            undo.callback(self.optimizer.load_state_dict, self.optimizer.state_dict(parameters), parameters)
            self.optimizer.load_state_dict(remembered, parameters)
            put(own, {name: each for name, each in arrays.items() if "/" not in name})
            undo.pop_all()
        self.history.epochs[:], self.epochs_before = history, before
        self.losses, self.seconds, self.stream = losses.tolist(), seconds, said["stream"]

    def share(self, ranks: Ranks) -> None:
        """On all ranks: what rank 0 has, as if each went on with a save of it; array by array, to save memory."""
        share_keys(self.model, ranks)
        said, arrays = self.state()
        said, names, losses = ranks.broadcast((said, [name for name in arrays if name != "run/losses"], self.losses))
        parameters, own = self.model.named_parameters(), self.model.named_arrays()
        if ranks.rank:
            arrays = {}
            self.optimizer._forget(parameters.values())
        for name in names:
            array = ranks.broadcast(None if ranks.rank else to_host(arrays[name]))
            if not ranks.rank:
                continue
            if name.startswith("optimizer/"):
                self.optimizer._adopt(name.removeprefix("optimizer/"), array, parameters)
            else:
                put({name: own[name]}, {name: array})
        if ranks.rank:
            self.generator.bit_generator.state = said["stream"]
            set_next_step(said["next_step"])
            if self.scaler is not None:
                self.scaler.load_state_dict(said["scaler"])
            self.history.epochs[:] = [_epoch(row) for row in said["history"]]
            self.epochs_before, self.seconds = said["epochs_before"], said["seconds"]
            self.losses, self.stream = losses, said["stream"]


def share_keys(model: Sequential, ranks: Ranks) -> None:
    """On all ranks: the keys that rank 0's dropout layers draw their masks with."""
    own = [layer for _, layer in all_layers(model) if isinstance(layer, Dropout)]
    keys = ranks.broadcast([layer.key for layer in own])
    if len(keys) == len(own):
        for layer, key in zip(own, keys, strict=True):
            layer.key = key


def _epoch(row: Mapping[str, Any]) -> Epoch:
    """A row of `History.rows`, checked."""
    score = row["accuracy"]
    return Epoch(
        check_whole(row["epoch"], "epoch"),
        check_whole(row["steps"], "steps"),
        check_number(row["loss"], "loss", least=-math.inf),
        None if score is None else check_number(score, "accuracy"),
        check_number(row["seconds"], "seconds"),
    )
