"""The training loop."""

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from npnet.backend import backend_of
from npnet.checks import check_flag, check_kind, check_no_nan, check_number, check_one_hot, check_pairs, check_whole
from npnet.datasets import batches
from npnet.layer import Pair, needs_saved
from npnet.layers import Sequential
from npnet.losses import Loss, TrainingDiverged, accuracy
from npnet.optimizers import Optimizer
from npnet.planner import plan
from npnet.precision import GradScaler
from npnet.random import RNG, as_generator
from npnet.schedules import ScheduleLike, as_schedule
from npnet.step import accumulated_step


@dataclass(frozen=True)
class Epoch:
    """One pass over the data: its steps' mean loss and time, and the accuracy on the test data after it."""

    epoch: int
    steps: int
    loss: float
    accuracy: float | None
    seconds: float


@dataclass
class History:
    """What happened in training, epoch by epoch. An epoch that was broken off is there, without accuracy."""

    epochs: list[Epoch] = field(default_factory=list)

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


def fit(
    model: Sequential,
    training_data: Pair,
    *,
    loss: Loss,
    optimizer: Optimizer,
    epochs: int,
    batch_size: int,
    schedule: ScheduleLike = "none",
    memory_budget: float | str | None = None,
    test_data: Pair | None = None,
    rng: RNG = None,
    shuffle: bool = True,
    decay: bool = False,
    accumulation_steps: int = 1,
    clip_norm: float | None = None,
    scaler: GradScaler | None = None,
    determinism_check: bool = False,
    history: History | None = None,
    show: Mapping[str, str] | None = None,
    log: bool = True,
) -> History:
    """Train ``model``: the same numbers under every ``schedule``.

    Args:
        training_data, test_data: (x, y), rows; accuracy on the test data is measured after each epoch.
        batch_size: samples that run at a time; the last batch of an epoch takes what is left.
        schedule: what to keep and what to recompute; see `npnet.schedules.as_schedule`.
        memory_budget: instead, bytes or "20 MB": the most that a training step may take. The cheapest schedule for it
            is planned (`npnet.plan`). The batch is data, and not counted.
        rng: seed or generator of the shuffling.
        shuffle: False takes the samples in order.
        decay: let the learning rate fall linearly to zero over these epochs (Li, Yumer & Ramanan, "Budgeted
            Training", 2020).
        accumulation_steps: update once in so many batches, with the gradient of all their samples together. A last
            window that is not full counts by its number of samples.
        clip_norm: scale the gradient down to this norm.
        scaler: scale the loss, and skip updates whose gradient overflows (see `npnet.precision`).
        determinism_check: raise `npnet.checkpoint.NondeterministicLayer` if a recomputation gives other numbers; slow.
        history: to append to, so that it is there even when training is interrupted.
        show: more to say in the progress bar.
        log: show the progress bar.

    Raises:
        ValueError: the data do not fit the model, hold NaN, or are fewer than a batch.
        InfeasibleBudget: no schedule keeps to the budget.
        TrainingDiverged: the loss is not finite, with the epoch and the step.
    """
    from tqdm.auto import tqdm

    check_kind(model, Sequential, "model", "mlp([784, 30, 10])")
    check_kind(loss, Loss, "loss", "SoftmaxCrossEntropy()")
    check_kind(optimizer, Optimizer, "optimizer", "Adam(1e-3)")
    flags = {"shuffle": shuffle, "decay": decay, "determinism_check": determinism_check, "log": log}
    for name, flag in flags.items():
        check_flag(flag, name)
    if scaler is not None:
        check_kind(scaler, GradScaler, "scaler", "GradScaler()")
    if clip_norm is not None:
        clip_norm = check_number(clip_norm, "clip_norm")
    history = History() if history is None else check_kind(history, History, "history", "History()")
    if show is not None:
        for pair in check_kind(show, Mapping, "show", "{'peak': '8 MB'}").items():  # type: ignore[type-abstract]
            for text in pair:
                check_kind(text, str, "show", "'8 MB'")
    was_training = model.training
    epochs, batch_size = check_whole(epochs, "epochs"), check_whole(batch_size, "batch_size", least=1)
    if memory_budget is not None:
        if not (isinstance(schedule, str) and schedule == "none"):
            raise ValueError("give schedule or memory_budget, not both")
        with _mode(model, training=True):
            schedule = plan(
                model,
                batch_size,
                memory_budget=memory_budget,
                loss=loss,
                optimizer=optimizer,
                streaming=clip_norm is None and scaler is None,
                accumulation_steps=accumulation_steps,
            ).schedule
    schedule, generator = as_schedule(schedule, len(model.layers), needs_saved(model.layers)), as_generator(rng)
    with _mode(model, training=False):
        _check_data(model, loss, "training data", training_data)
        if test_data is not None:
            _check_data(model, loss, "test data", test_data)
    if test_data is not None:
        check_one_hot(test_data[1], "test data: y")
    x, y = training_data
    if batch_size > len(x):
        raise ValueError(f"batch_size: {batch_size} is more than the {len(x)} training samples")
    accumulation_steps = check_whole(accumulation_steps, "accumulation_steps", least=1)
    window = batch_size * accumulation_steps
    first, rate, steps = len(history.epochs), optimizer.learning_rate, -(-len(x) // window)
    for number in range(first, first + epochs):
        losses: list[float] = []
        seconds, score = 0.0, None
        progress = tqdm(total=steps, desc=f"epoch {number + 1}", unit="step", disable=not log, mininterval=0.5)
        try:
            model.train()
            micro_batches = batches(x, y, batch_size, generator, shuffle)
            for position in range(0, len(x), window):
                start = time.perf_counter()
                if decay:
                    optimizer.learning_rate = rate * (1 - ((number - first) * steps + len(losses)) / (epochs * steps))
                losses.append(
                    accumulated_step(
                        model,
                        loss,
                        optimizer,
                        schedule,
                        itertools.islice(micro_batches, accumulation_steps),
                        min(window, len(x) - position),
                        clip_norm=clip_norm,
                        scaler=scaler,
                        determinism_check=determinism_check,
                    )
                )
                seconds += time.perf_counter() - start
                if log:
                    progress.set_postfix(_readings(losses, history.accuracy, show), refresh=False)
                progress.update()
            model.eval()
            score = accuracy(model.predict, *test_data) if test_data is not None else None
            progress.set_postfix(_readings(losses, score, show))
        except TrainingDiverged as error:
            raise TrainingDiverged(
                f"epoch {number + 1}, step {min(len(losses) + 1, steps)} of {steps}: {error}"
            ) from None
        finally:
            optimizer.learning_rate = rate
            model.train(was_training)
            progress.close()
            if losses:
                history.epochs.append(Epoch(number + 1, len(losses), statistics.fmean(losses), score, seconds))
    return history


@contextmanager
def _mode(model: Sequential, training: bool) -> Iterator[None]:
    """The model in training, or in evaluation, and then again as it was."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def _readings(losses: list[float], score: float | None, show: Mapping[str, str] | None) -> dict[str, str]:
    """What stands behind the progress bar: the mean of the last 100 losses, and the last accuracy on the test data."""
    accuracy = "-" if score is None else f"{score:.4f}"
    return {"loss": f"{statistics.fmean(losses[-100:]):.4f}", "test accuracy": accuracy, **(show or {})}


def _check_data(model: Sequential, loss: Loss, name: str, pair: Pair) -> None:
    """Refuse data that do not fit, by running one row through the model."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name}: expected a pair (x, y), got {type(pair).__name__}")
    x, y = pair
    backend_of(x), backend_of(y)  # refuse what is not an array
    if x.ndim != 2 or not len(x):
        raise ValueError(f"{name}: expected x of shape (samples, features), got {x.shape}")
    check_pairs(x, y, f"{name}: ")
    output = model.predict(x[:1])
    check_no_nan(y, f"{name}: y")
    loss.check_targets(y, output.shape[1])
    if y.dtype != output.dtype:
        raise TypeError(f"{name}: y has dtype {y.dtype}, the network {output.dtype}; convert with y.astype")
    check_no_nan(x, f"{name}: x")
