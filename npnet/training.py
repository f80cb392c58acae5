"""The training loop: epoch by epoch, step by step."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from npnet.backend import Array, backend_of, to_backend
from npnet.batching import batches
from npnet.capture import CapturedStep
from npnet.determinism import digest
from npnet.failures import explained, first_not_finite, note_examined, rehearse
from npnet.gradient_sums import GradientSums
from npnet.interrupts import Interrupts
from npnet.layer import Pair
from npnet.layer_rules import has_foreign_layers
from npnet.layers import Sequential
from npnet.losses import Loss, TrainingDiverged, accuracy
from npnet.model_tree import mode
from npnet.optimizers import Optimizer
from npnet.precision import GradScaler
from npnet.random import RNG
from npnet.recipe import Recipe
from npnet.run import History, TrainingRun, share_keys
from npnet.saver import Saver
from npnet.schedule import Place
from npnet.schedules import ScheduleLike
from npnet.step import accumulated_step

Step = Callable[[Iterator[Pair], int], float]
"""One update: takes its micro-batches from the iterator, so many samples; returns the loss before it."""


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
    offload: Place | None = None,
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
        training_data, test_data: (x, y), rows: arrays, or tables such as pandas' that hold numbers. Accuracy on the
            test data is measured after each epoch. With the model on a GPU they may stay on the host: each batch is
            then copied while the step before it computes.
        batch_size: samples that run at a time; the last batch of an epoch takes what is left.
        schedule: what to keep and what to recompute; see `npnet.schedules.as_schedule`.
        memory_budget: instead, bytes or "20 MB": the most that a training step may take. The cheapest schedule for it
            is planned (`npnet.plan`). The batch is data, and not counted. On a GPU it is a limit, too: a step that
            takes more, since a layer says less than it costs, say, runs out of memory.
        offload: "disk" (a temporary file), or from a GPU "host": activations go there and come back, and nothing is
            run again; with a ``memory_budget`` as few as it allows (see `npnet.offload`).
        transform: what becomes of the rows of x, batch by batch: data may stay as they are stored, as bytes, say, and
            images in their own shape (see `npnet.datasets.scaled`).
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
        LayerRuleError: a layer of your own would make gradients wrong (see `npnet.layer_rules`); found in the first
            step, with the layer's path.
        CannotCapture: with ``capture``, the step does something that cannot be recorded; nothing was updated.
        TrainingDiverged: the loss is not finite, with the epoch, the step, the layer, and the last good save.
        OutOfMemory: memory ran out in a step, with what would take less.
        FileExistsError, SaveError, OSError: see `npnet.Saver`.
        KeyboardInterrupt, SystemExit: the signals.
    """
    recipe = Recipe(**locals())  # all arguments, by name
    ranks = recipe.ranks
    with ranks.guard():
        with ranks.together():
            recipe.check()
            run = recipe.begin()
            sums = GradientSums(ranks, model.layers, recipe.batch_size) if ranks.size > 1 else None
        if sums is not None:
            share_keys(model, ranks)
            recipe.check_alike(run)
        with ranks.together():
            if recipe.saver is not None:
                recipe.saver.begin(run)
        if sums is not None:
            run.share(ranks)
        if run.epoch < recipe.epochs:
            _train(recipe, run, sums)
    return run.history


def _train(recipe: Recipe, run: TrainingRun, sums: GradientSums | None) -> None:
    """Epoch by epoch, from where the run stands to its end."""
    step = _step(recipe, sums)
    with Interrupts() as interrupts:
        if (recipe.at_once and not recipe.capture) or has_foreign_layers(recipe.model.layers):
            _rehearse(recipe)
        while run.epoch < recipe.epochs:
            _train_epoch(recipe, run, step, interrupts)
        if recipe.saver is not None:
            try:
                recipe.saver.save(run)
            except TrainingDiverged as error:
                raise _located(error, recipe, run.number - 1, recipe.steps) from None
        interrupts.pending = recipe.ranks.any_signal(interrupts.pending)


def _step(recipe: Recipe, sums: GradientSums | None) -> Step:
    """What updates the model once."""
    parts = recipe.model, recipe.loss, recipe.optimizer, recipe.schedule
    if recipe.capture:
        captured = CapturedStep(*parts)
        return lambda micro_batches, samples: captured(*next(micro_batches))
    return partial(
        accumulated_step,
        *parts,
        clip_norm=recipe.clip_norm,
        scaler=recipe.scaler,
        streaming=recipe.streaming,
        determinism_check=recipe.determinism_check,
        sums=sums,
    )


def _rehearse(recipe: Recipe) -> None:
    """All that the first step does but the updates: see `npnet.failures.rehearse`."""
    model, schedule, optimizer, limit = recipe.model, recipe.schedule, recipe.optimizer, recipe.limit
    rows = recipe.feed(recipe.training_data[0][recipe.ranks.share(recipe.batch_size)])  # none, if there are many ranks
    with recipe.ranks.together(), mode(model, training=True), explained(model, schedule, rows, **recipe.terms), limit:
        if len(rows):
            rehearse(
                model.layers,
                schedule,
                rows,
                lambda layer: optimizer.prepare(layer.parameters()),
                accumulating=recipe.accumulation_steps > 1,
            )
            note_examined(model, model.layers, schedule)


def _train_epoch(recipe: Recipe, run: TrainingRun, step: Step, interrupts: Interrupts) -> None:
    """One pass over the data, from its beginning or from where it was saved, and the accuracy after it."""
    from tqdm.auto import tqdm

    (x, y), window, steps = recipe.training_data, recipe.window, recipe.steps
    model, optimizer, ranks = recipe.model, recipe.optimizer, recipe.ranks
    run.stream = run.generator.bit_generator.state  # the order is drawn from it: again, if the epoch is resumed
    done, score, rate = len(run.losses), None, optimizer.learning_rate
    number = done  # of the step under way
    what = {"desc": f"epoch {run.number}", "unit": "step", "disable": not recipe.log, "mininterval": 0.5}
    progress = tqdm(total=steps, initial=done, **what)
    try:
        part = (ranks.rank, ranks.size)
        raw = batches(x, y, recipe.batch_size, run.generator, recipe.shuffle, start=done * window, part=part)
        micro_batches = recipe.feed.pairs(raw)
        with mode(model, training=True):
            for number in range(done, steps):
                began, ranks.signal = time.perf_counter(), interrupts.pending
                if recipe.decay:
                    past = (run.epoch * steps + number) / (recipe.epochs * steps)
                    optimizer.learning_rate = rate * (1 - past)
                samples = min(window, len(x) - number * window)
                with recipe.limit:
                    run.losses.append(step(itertools.islice(micro_batches, recipe.accumulation_steps), samples))
                run.seconds += time.perf_counter() - began
                if recipe.log:
                    progress.set_postfix(_readings(run, run.history.accuracy, recipe.show), refresh=False)
                progress.update()
                # several ranks end after the same step, whenever each one's signal came
                ending = interrupts.pending if ranks.size == 1 else ranks.agreed_signal
                if recipe.saver is not None:
                    recipe.saver.step_done(run, ending=ending is not None)
                interrupts.check(ending)
        score = _evaluated(recipe)
        if ranks.size > 1:
            weights = [digest(each.value).hex()[:16] for each in model.named_arrays().values()]
            ranks.alike({f"weights after epoch {run.number}": weights})
        progress.set_postfix(_readings(run, score, recipe.show))
    except TrainingDiverged as error:
        raise _located(error, recipe, run.number, min(number + 1, steps)) from None
    finally:
        optimizer.learning_rate = rate
        progress.close()
        run.end_epoch(score)


def _evaluated(recipe: Recipe) -> float | None:
    """The accuracy on the test data, if there are some; each rank evaluates its share.

    Raises:
        TrainingDiverged: an output is not finite; with the layer where that begins.
    """
    if recipe.test_data is None:
        return None
    (x, y), model, ranks, score = recipe.test_data, recipe.model, recipe.ranks, 0.0
    share, samples = ranks.share(len(x)), len(x)
    x, y = x[share], y[share]
    with ranks.together(), mode(model, training=False):
        try:
            if len(x):
                there = backend_of(y).name
                score = accuracy(lambda rows: to_backend(model.predict(recipe.feed(rows)), there), x, y)
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{error}; {first_not_finite(model.layers, recipe.feed(x[:1000]))}") from None
    return ranks.total(round(score * len(x))) / samples


def _located(error: TrainingDiverged, recipe: Recipe, epoch: int, step: int) -> TrainingDiverged:
    """The error, with where in the training it was, and what is left of that."""
    saved = f"; {recipe.saver.last}" if recipe.saver else ""
    return TrainingDiverged(f"epoch {epoch}, step {step} of {recipe.steps}: {error}{saved}")


def _readings(run: TrainingRun, score: float | None, show: Mapping[str, str] | None) -> dict[str, str]:
    """What the progress bar shows: the mean loss of the last 100 steps, and the last accuracy on the test data."""
    accuracy = "-" if score is None else f"{score:.4f}"
    return {"loss": f"{run.mean_loss(last=100):.4f}", "test accuracy": accuracy, **(show or {})}
