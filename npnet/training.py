"""The training loop."""

import platform
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

import npnet
from npnet.backend import Array, backend_of, get_backend
from npnet.capture import CapturedStep
from npnet.checks import (
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
from npnet.epochs import Loop, located, mode
from npnet.failures import explained, rehearse
from npnet.feeding import Feed
from npnet.gradient_sums import GradientSums
from npnet.interrupts import Interrupts
from npnet.layer import Layer, Pair, needs_saved
from npnet.layers import Sequential
from npnet.losses import Loss, TrainingDiverged
from npnet.memory import parse_bytes
from npnet.optimizers import Optimizer
from npnet.planner import plan
from npnet.pools import HardBudget
from npnet.precision import GradScaler
from npnet.random import RNG, as_generator
from npnet.ranks import Ranks
from npnet.run import History, TrainingRun, fingerprint, share_keys
from npnet.saver import Saver
from npnet.schedules import ScheduleLike, as_schedule
from npnet.step import accumulated_step


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
    transform: Callable[[Array], Array] | None = None,
    rng: RNG = None,
    shuffle: bool = True,
    decay: bool = False,
    accumulation_steps: int = 1,
    clip_norm: float | None = None,
    scaler: GradScaler | None = None,
    streaming: bool = True,
    capture: bool = False,
    determinism_check: bool = False,
    saver: Saver | None = None,
    history: History | None = None,
    show: Mapping[str, str] | None = None,
    communicator: Any = None,
    log: bool = True,
) -> History:
    """Train ``model``: the same numbers under every ``schedule``.

    Ctrl-C and SIGTERM are answered after the step that is under way (a second one at once), with a save if there is a
    ``saver``.

    Args:
        training_data, test_data: (x, y), rows; accuracy on the test data is measured after each epoch. With the model
            on a GPU they may stay on the host: each batch is then copied while the step before it computes.
        batch_size: samples that run at a time; the last batch of an epoch takes what is left.
        schedule: what to keep and what to recompute; see `npnet.schedules.as_schedule`.
        memory_budget: instead, bytes or "20 MB": the most that a training step may take. The cheapest schedule for it
            is planned (`npnet.plan`). The batch is data, and not counted. On a GPU it is a limit, too: a step that
            takes more, since a layer says less than it costs, say, runs out of memory.
        transform: what becomes of the rows of x, batch by batch: data may stay as they are stored, as bytes, say (see
            `npnet.datasets.scaled`).
        rng: seed or generator of the shuffling. (Dropout's masks depend on the number of the step, too, which goes on
            from training to training: `npnet.set_seed` starts anew.)
        shuffle: False takes the samples in order.
        decay: let the learning rate fall linearly to zero over these epochs (Li, Yumer & Ramanan, "Budgeted
            Training", 2020).
        accumulation_steps: update once in so many batches, with the gradient of all their samples together. A last
            window that is not full counts by its number of samples.
        clip_norm: scale the gradient down to this norm.
        scaler: scale the loss, and skip updates whose gradient overflows (see `npnet.precision`).
        streaming: update each layer during the backward pass, so that all gradients are never alive together (without
            ``clip_norm`` and ``scaler``); the first step is rehearsed, so that memory runs out before anything is
            updated, if it does. False updates after it: whatever breaks off a step then leaves the model as it was.
        capture: record the step at the first batch, and do it again from the record: the same numbers, faster on thin
            layers, and nothing is allocated from then on (see `npnet.CapturedStep`; not with the options that it does
            not know: accumulation, clipping, a scaler, the check below, ``streaming=False``).
        determinism_check: raise `npnet.checkpoint.NondeterministicLayer` if a recomputation gives other numbers; slow.
        saver: saves the run every so many steps, and goes on with one that was saved (see `npnet.Saver`).
        history: to append to, so that it is there even when training is interrupted.
        show: more to say in the progress bar.
        communicator: of mpi4py (extra ``mpi``), such as ``MPI.COMM_WORLD``: its processes, the ranks, share each batch,
            and all make the same update. All call this with the same data and arguments (``memory_budget`` apart,
            which is each rank's own), begin with the weights, the optimizer and the save of rank 0, and end together.
            Rank 0 alone logs and saves.
        log: show the progress bar.

    Raises:
        ValueError: the data do not fit the model, hold NaN, or are fewer than a batch; the save is that of another
            training; or a rank's data or arguments are unlike those of rank 0.
        RankFailed: another rank failed, where all take part in what failed. Elsewhere the one that fails says so, and
            ends them all.
        InfeasibleBudget: no schedule keeps to the budget.
        CannotCapture: with ``capture``, the step does something that cannot be recorded; nothing was updated.
        TrainingDiverged: the loss is not finite, with the epoch, the step, the layer, and the last good save.
        OutOfMemory: memory ran out in a step, with what would take less.
        FileExistsError, SaveError, OSError: see `npnet.Saver`.
        KeyboardInterrupt, SystemExit: the signals.
    """
    ranks = communicator if isinstance(communicator, Ranks) else Ranks(communicator)
    with ranks.guard():
        with ranks.together():
            check_kind(model, Sequential, "model", "mlp([784, 30, 10])")
            check_kind(loss, Loss, "loss", "SoftmaxCrossEntropy()")
            check_kind(optimizer, Optimizer, "optimizer", "Adam(1e-3)")
            flags = {"shuffle": shuffle, "decay": decay, "determinism_check": determinism_check, "log": log}
            for name, flag in {**flags, "streaming": streaming, "capture": capture}.items():
                check_flag(flag, name)
            _check_optional(scaler, saver, transform, show)
            clip_norm = None if clip_norm is None else check_number(clip_norm, "clip_norm")
            history = History() if history is None else check_kind(history, History, "history", "History()")
            epochs, batch_size = check_whole(epochs, "epochs"), check_whole(batch_size, "batch_size", least=1)
            at_once = streaming and clip_norm is None and scaler is None
            terms: dict[str, Any] = {
                "loss": loss, "optimizer": optimizer, "streaming": at_once, "accumulation_steps": accumulation_steps,
                "ranks": ranks.size
            }  # fmt: skip
            budget = None
            if memory_budget is not None:
                if not (isinstance(schedule, str) and schedule == "none"):
                    raise ValueError("give schedule or memory_budget, not both")
                with mode(model, training=True):
                    planned = plan(model, batch_size, memory_budget=memory_budget, **terms)
                schedule, budget = planned.schedule, parse_bytes(memory_budget) - planned.chain.communication
            schedule = as_schedule(schedule, len(model.layers), needs_saved(model.layers))
            parameters, generator = model.parameters(), as_generator(rng)
            backend = backend_of(parameters[0].value) if parameters else get_backend("numpy")
            prepared = Feed(transform, backend)
            with mode(model, training=False):
                _check_data(model, loss, "training data", training_data, prepared)
                if test_data is not None:
                    _check_data(model, loss, "test data", test_data, prepared)
                    check_one_hot(test_data[1], "test data: y")
            x, y = training_data
            if batch_size > len(x):
                raise ValueError(f"batch_size: {batch_size} is more than the {len(x)} training samples")
            accumulation_steps = check_whole(accumulation_steps, "accumulation_steps", least=1)
            if capture and (not at_once or accumulation_steps > 1 or determinism_check or ranks.size > 1):
                raise ValueError(
                    "capture: a step is recorded without accumulation_steps, clip_norm, scaler, determinism_check, "
                    "streaming=False and a communicator; leave these out, or capture"
                )
            conditions = {
                "loss": type(loss).__name__,
                "optimizer": {"kind": type(optimizer).__name__, **optimizer.config()},
                "batch_size": batch_size,
                "accumulation_steps": accumulation_steps,
                "clip_norm": clip_norm,
                "scaler": scaler and scaler.config(),
                "order": [type(generator.bit_generator).__name__, shuffle],
                "epochs, while the learning rate falls": epochs if decay else None,
                "training data": _fingerprints(training_data, prepared) if saver or ranks.size > 1 else None,
            }
            rate = optimizer.learning_rate
            run = TrainingRun(model, optimizer, scaler, generator, history, conditions, rate, len(history.epochs))
            sums = GradientSums(ranks, model.layers, batch_size) if ranks.size > 1 else None
        if sums is not None:
            test = None if test_data is None else _fingerprints(test_data, prepared)
            share_keys(model, ranks)
            said = {**_versions(), "model": _said(model), "epochs": epochs, "test data": test, "streaming": streaming}
            ranks.alike({**said, **conditions})
        saver = saver if ranks.rank == 0 else None
        with ranks.together():
            if saver is not None:
                saver.begin(run)
        if sums is not None:
            run.share(ranks)
        if run.epoch >= epochs:
            return history
        step: Callable[[Iterator[Pair], int], float] = partial(
            accumulated_step,
            model,
            loss,
            optimizer,
            schedule,
            clip_norm=clip_norm,
            scaler=scaler,
            streaming=streaming,
            determinism_check=determinism_check,
            sums=sums,
        )
        if capture:
            captured = CapturedStep(model, loss, optimizer, schedule)
            step = lambda micro_batches, samples: captured(*next(micro_batches))  # noqa: E731 - one of two
        limit = HardBudget(backend, budget, lambda: optimizer.held(parameters))
        step = partial(limit.call, step)
        loop = Loop(
            run,
            step,
            x,
            y,
            test_data,
            prepared,
            batch_size,
            accumulation_steps,
            shuffle,
            epochs,
            decay,
            saver,
            show,
            log and ranks.rank == 0,
            ranks,
        )
        with Interrupts() as interrupts:
            if at_once and not capture:
                few = x[ranks.share(batch_size)]
                few = prepared(few) if len(few) else few
                with ranks.together(), mode(model, training=True), explained(model, schedule, few, **terms), limit:
                    if len(few):
                        rehearse(
                            model.layers,
                            schedule,
                            few,
                            lambda layer: optimizer.prepare(layer.parameters()),
                            accumulating=accumulation_steps > 1,
                        )
            while run.epoch < epochs:
                loop.epoch(interrupts)
            if saver is not None:
                try:
                    saver.save(run)
                except TrainingDiverged as error:
                    raise located(error, run.number - 1, loop.steps, loop.steps, saver) from None
            interrupts.pending = ranks.any_signal(interrupts.pending)
    return history


def _fingerprints(pair: Pair, prepared: Callable[[Array], Array]) -> dict[str, str]:
    return {"x": fingerprint(pair[0], prepared), "y": fingerprint(pair[1])}


def _said(layer: Layer) -> Any:
    """What a layer is, as JSON; one of one's own that does not say it, as far as can be seen."""
    try:
        return layer.description()
    except TypeError:
        plain = {name: each for name, each in vars(layer).items() if isinstance(each, (bool, int, float, str))}
        shapes = {name: list(each.value.shape) for name, each in layer.named_parameters().items()}
        inside = {name: _said(child) for name, child in layer.children().items()}
        return {"kind": type(layer).__name__, **plain, "parameters": shapes, "inside": inside}


def _versions() -> dict[str, str]:
    """What has to be the same on all ranks."""
    return {"npnet": npnet.__version__, "NumPy": np.__version__, "Python": platform.python_version()}


def _check_optional(scaler: Any, saver: Any, transform: Any, show: Any) -> None:
    """Refuse what is neither None nor what it should be."""
    if scaler is not None:
        check_kind(scaler, GradScaler, "scaler", "GradScaler()")
    if saver is not None:
        check_kind(saver, Saver, "saver", "Saver('run.npz')")
    if transform is not None:
        check_callable(transform, "transform")
    if show is not None:
        for texts in check_mapping(show, "show", "{'peak': '8 MB'}").items():
            for text in texts:
                check_kind(text, str, "show", "'8 MB'")


def _check_data(model: Sequential, loss: Loss, name: str, pair: Pair, prepared: Callable[[Array], Array]) -> None:
    """Refuse data that do not fit, by running one row through the model."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name}: expected a pair (x, y), got {type(pair).__name__}")
    x, y = pair
    backend_of(x), backend_of(y)  # refuse what is not an array
    if x.ndim != 2 or not len(x):
        raise ValueError(f"{name}: expected x of shape (samples, features), got {x.shape}")
    check_pairs(x, y, f"{name}: ")
    output = model.predict(prepared(x[:1]))
    check_no_nan(y, f"{name}: y")
    loss.check_targets(y, output.shape[1])
    if y.dtype != output.dtype:
        raise TypeError(f"{name}: y has dtype {y.dtype}, the network {output.dtype}; convert with y.astype")
    check_no_nan(x, f"{name}: x")
