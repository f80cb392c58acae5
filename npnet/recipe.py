"""What a training is told: the arguments of `npnet.fit`, checked, and what of them saves and ranks must have alike."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass
from functools import partial
from typing import Any

import numpy as np

import npnet
from npnet.backend import Array, backend_of, get_backend
from npnet.checks import (
    as_array,
    check_callable,
    check_flag,
    check_kind,
    check_mapping,
    check_no_nan,
    check_number,
    check_one_hot,
    check_pairs,
    check_whole,
)
from npnet.determinism import digest
from npnet.failures import examined
from npnet.feeding import Feed
from npnet.layer import Layer, Pair, ResultError, needs_saved
from npnet.layers import Sequential
from npnet.losses import Loss
from npnet.memory import parse_bytes
from npnet.model_tree import mode
from npnet.optimizers import Optimizer
from npnet.planner import plan
from npnet.pools import HardBudget
from npnet.precision import GradScaler
from npnet.random import as_generator
from npnet.ranks import Ranks
from npnet.run import History, TrainingRun
from npnet.saver import Saver
from npnet.schedule import Place, Schedule
from npnet.schedules import as_schedule


@dataclass
class Recipe:
    """The arguments of `npnet.fit`, which says what they are; the types are those after `check`.

    Attributes:
        ranks: the processes of ``communicator``.
        feed: what the model gets of data, by way of ``transform``.
        limit: what ``memory_budget`` leaves for a step besides the buffers of communication, where it is a hard limit.
    """

    model: Sequential
    training_data: Pair
    loss: Loss
    optimizer: Optimizer
    epochs: int
    batch_size: int
    schedule: Schedule
    memory_budget: float | str | None
    offload: Place | None
    test_data: Pair | None
    transform: Callable[[Array], Array] | None
    rng: np.random.Generator
    shuffle: bool
    decay: bool
    accumulation_steps: int
    clip_norm: float | None
    scaler: GradScaler | None
    streaming: bool
    capture: bool
    determinism_check: bool
    saver: Saver | None
    history: History
    show: Mapping[str, str] | None
    communicator: InitVar[Any]
    log: bool

    def __post_init__(self, communicator: Any) -> None:
        self.ranks = communicator if isinstance(communicator, Ranks) else Ranks(communicator)

    @property
    def window(self) -> int:
        """Samples to an update."""
        return self.batch_size * self.accumulation_steps

    @property
    def steps(self) -> int:
        """Updates to an epoch."""
        return -(-len(self.training_data[0]) // self.window)

    @property
    def at_once(self) -> bool:
        """Whether each layer is updated during the backward pass."""
        return self.streaming and self.clip_norm is None and self.scaler is None

    @property
    def terms(self) -> dict[str, Any]:
        """What `npnet.plan` has to know of a step."""
        return {
            "loss": self.loss, "optimizer": self.optimizer, "streaming": self.at_once,
            "accumulation_steps": self.accumulation_steps, "ranks": self.ranks.size
        }  # fmt: skip

    def check(self) -> None:
        """Refuse what does not fit, and put in what was left open: the schedule for a budget, a history, a generator.

        Raises:
            TypeError, ValueError, InfeasibleBudget: see `npnet.fit`.
        """
        self._check_kinds()
        budget = self._choose_schedule()
        parameters, self.rng = self.model.parameters(), as_generator(self.rng)
        self.feed = Feed(self.transform, backend_of(parameters[0].value) if parameters else get_backend("numpy"))
        self.limit = HardBudget(self.feed.backend, budget, partial(self.optimizer.held, parameters))
        examined(self.model, self.model.layers).check_loss(self.loss, self.model)
        with mode(self.model, training=False):
            self.training_data = self._check_data("training data", self.training_data)
            if self.test_data is not None:
                self.test_data = self._check_data("test data", self.test_data)
                check_one_hot(self.test_data[1], "test data: y")
        samples = len(self.training_data[0])
        if self.batch_size > samples:
            raise ValueError(f"batch_size: {self.batch_size} is more than the {samples} training samples")
        self.accumulation_steps = check_whole(self.accumulation_steps, "accumulation_steps", least=1)
        several = self.accumulation_steps > 1 or self.ranks.size > 1
        if self.capture and (several or self.determinism_check or not self.at_once):
            raise ValueError(
                "capture: a step is recorded without accumulation_steps, clip_norm, scaler, determinism_check, "
                "streaming=False and a communicator; leave these out, or capture"
            )
        if self.ranks.rank:
            self.saver, self.log = None, False  # rank 0's are enough

    def _check_kinds(self) -> None:
        """Refuse what is of another kind, each argument by itself."""
        check_kind(self.model, Sequential, "model", "mlp([784, 30, 10])")
        check_kind(self.loss, Loss, "loss", "SoftmaxCrossEntropy()")
        check_kind(self.optimizer, Optimizer, "optimizer", "Adam(1e-3)")
        for name in ("shuffle", "decay", "determinism_check", "log", "streaming", "capture"):
            check_flag(getattr(self, name), name)
        if self.scaler is not None:
            check_kind(self.scaler, GradScaler, "scaler", "GradScaler()")
        if self.saver is not None:
            check_kind(self.saver, Saver, "saver", "Saver('run.npz')")
        if self.transform is not None:
            check_callable(self.transform, "transform")
        if self.show is not None:
            for texts in check_mapping(self.show, "show", "{'peak': '8 MB'}").items():
                for text in texts:
                    check_kind(text, str, "show", "'8 MB'")
        self.clip_norm = None if self.clip_norm is None else check_number(self.clip_norm, "clip_norm")
        self.history = History() if self.history is None else check_kind(self.history, History, "history", "History()")
        self.epochs = check_whole(self.epochs, "epochs")
        self.batch_size = check_whole(self.batch_size, "batch_size", least=1)

    def _choose_schedule(self) -> int | None:
        """Plan one for the budget, if there is one, else make what was asked for; returns the bytes of the budget."""
        budget = None
        for name in ("memory_budget", "offload"):
            if getattr(self, name) is not None and not (isinstance(self.schedule, str) and self.schedule == "none"):
                raise ValueError(f"give schedule or {name}, not both")
        if self.memory_budget is not None or self.offload is not None:
            with mode(self.model, training=True):
                planned = plan(
                    self.model, self.batch_size, memory_budget=self.memory_budget, offload=self.offload, **self.terms
                )
            self.schedule = planned.schedule
            if self.memory_budget is not None:
                budget = parse_bytes(self.memory_budget) - planned.chain.communication
        layers = self.model.layers
        self.schedule = as_schedule(self.schedule, len(layers), needs_saved(layers))
        return budget

    def _check_data(self, name: str, pair: Pair) -> Pair:
        """The data as arrays; those that do not fit are refused, by running one row through the model."""
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{name}: expected a pair (x, y), got {type(pair).__name__}")
        x, y = as_array(pair[0], f"{name}: x"), as_array(pair[1], f"{name}: y")
        if x.ndim < 2 or (x.ndim > 2 and self.transform is None) or not len(x):
            images = "; x.reshape(len(x), -1) makes rows of images, a transform batch by batch" if x.ndim > 2 else ""
            raise ValueError(f"{name}: expected x of shape (samples, features), got {x.shape}{images}")
        check_pairs(x, y, f"{name}: ")
        rows = self.feed(x[:1])
        if not hasattr(rows, "dtype"):
            raise TypeError(
                f"transform: expected a function that returns an array, it returned a {type(rows).__name__}"
            )
        if len(rows) != 1:
            raise ValueError(f"transform: expected a row for each row of x, of 1 it made shape {rows.shape}")
        try:
            output = self.model.predict(rows)
            check_no_nan(y, "y")
            self.loss.check_targets(y, output.shape[1])
        except ResultError:  # not the data's fault
            raise
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        if y.dtype != output.dtype:
            fitting = f"y.astype({output.dtype.name!r})"
            raise TypeError(f"{name}: y has dtype {y.dtype}, the network {output.dtype}; convert with {fitting}")
        check_no_nan(x, f"{name}: x")
        return x, y

    def begin(self) -> TrainingRun:
        """The run before its first step."""
        conditions = {
            "loss": type(self.loss).__name__,
            "optimizer": {"kind": type(self.optimizer).__name__, **self.optimizer.config()},
            "batch_size": self.batch_size,
            "accumulation_steps": self.accumulation_steps,
            "clip_norm": self.clip_norm,
            "scaler": self.scaler and self.scaler.config(),
            "order": [type(self.rng.bit_generator).__name__, self.shuffle],
            "epochs, while the learning rate falls": self.epochs if self.decay else None,
            "training data": self._hashes(self.training_data) if self.saver or self.ranks.size > 1 else None,
        }
        before = len(self.history.epochs)
        samples = len(self.training_data[0])
        return TrainingRun(
            self.model, self.optimizer, self.scaler, self.rng, self.history, conditions, before, samples, self.window
        )

    def check_alike(self, run: TrainingRun) -> None:
        """On all ranks: refuse what is unlike on some.

        Raises:
            ValueError: see `Ranks.alike`.
        """
        versions = {"npnet": npnet.__version__, "NumPy": np.__version__, "Python": platform.python_version()}
        test = None if self.test_data is None else self._hashes(self.test_data)
        said = {"model": _said(self.model), "epochs": self.epochs, "test data": test, "streaming": self.streaming}
        self.ranks.alike({**versions, **said, **run.conditions})

    def _hashes(self, pair: Pair) -> dict[str, str]:
        """What tells data from others: shapes, and hashes of a thousand rows as the model gets them."""
        x, y = (array[:: max(1, len(array) // 1000)] for array in pair)
        shapes = (" x ".join(map(str, array.shape)) for array in pair)
        hashes = (digest(rows)[:8].hex() for rows in (self.feed(x), y))
        return {name: f"{shape}, hash {each}" for name, shape, each in zip("xy", shapes, hashes, strict=True)}


def _said(layer: Layer) -> Any:
    """What a layer is, as JSON; one of one's own that does not say it, as far as can be seen."""
    try:
        return layer.description()
    except TypeError:
        plain = {name: each for name, each in vars(layer).items() if isinstance(each, (bool, int, float, str))}
        shapes = {name: list(each.value.shape) for name, each in layer.named_parameters().items()}
        inside = {name: _said(child) for name, child in layer.children().items()}
        return {"kind": type(layer).__name__, **plain, "parameters": shapes, "inside": inside}
