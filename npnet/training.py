"""The training loop."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from npnet.backend import Array
from npnet.capture import CapturedStep
from npnet.epochs import Step, located, train_epoch
from npnet.failures import explained, rehearse
from npnet.gradient_sums import GradientSums
from npnet.interrupts import Interrupts
from npnet.layer import Pair
from npnet.layers import Sequential
from npnet.losses import Loss, TrainingDiverged
from npnet.optimizers import Optimizer
from npnet.pools import HardBudget
from npnet.precision import GradScaler
from npnet.random import RNG
from npnet.recipe import Recipe, mode
from npnet.run import History, TrainingRun, share_keys
from npnet.saver import Saver
from npnet.schedule import Place
from npnet.schedules import ScheduleLike
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
        training_data, test_data: (x, y), rows; accuracy on the test data is measured after each epoch. With the model
            on a GPU they may stay on the host: each batch is then copied while the step before it computes.
        batch_size: samples that run at a time; the last batch of an epoch takes what is left.
        schedule: what to keep and what to recompute; see `npnet.schedules.as_schedule`.
        memory_budget: instead, bytes or "20 MB": the most that a training step may take. The cheapest schedule for it
            is planned (`npnet.plan`). The batch is data, and not counted. On a GPU it is a limit, too: a step that
            takes more, since a layer says less than it costs, say, runs out of memory.
        offload: "disk" (a temporary file), or from a GPU "host": activations go there and come back, and nothing is
            run again; with a ``memory_budget`` as few as it allows (see `npnet.offload`).
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
    held = partial(recipe.optimizer.held, recipe.model.parameters())
    limit = HardBudget(recipe.feed.backend, recipe.budget, held)
    step = partial(limit.call, _step(recipe, sums))
    with Interrupts() as interrupts:
        if recipe.at_once and not recipe.capture:
            _rehearse(recipe, limit)
        while run.epoch < recipe.epochs:
            train_epoch(recipe, run, step, interrupts)
        if recipe.saver is not None:
            try:
                recipe.saver.save(run)
            except TrainingDiverged as error:
                raise located(error, recipe, run.number - 1, recipe.steps) from None
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


def _rehearse(recipe: Recipe, limit: HardBudget) -> None:
    """All that the first step does but the updates: see `npnet.failures.rehearse`."""
    model, schedule, optimizer = recipe.model, recipe.schedule, recipe.optimizer
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
