"""One training step: gradients of one batch, or of several added up, and the update."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, overload

from npnet.backend import Array, array_module
from npnet.checkpoint import backpropagate, clear_gradients
from npnet.checks import check_callable, check_kind, check_number, check_whole, shown
from npnet.failures import examined, explained, first_not_finite, watched_first
from npnet.gradient_sums import GradientSums
from npnet.layer import Layer, Pair, needs_saved
from npnet.layers import Sequential
from npnet.losses import Loss, check_finite
from npnet.optimizers import Optimizer, clip_grad_norm
from npnet.parameter import Parameter
from npnet.precision import GradScaler
from npnet.random import next_step, one_step, rows_from
from npnet.schedule import Schedule
from npnet.schedules import ScheduleLike, as_schedule


def as_chain(model: Layer) -> Sequential:
    """The chain that a schedule runs over: a `Sequential` itself, else the model as a single layer.

    Raises:
        TypeError: not a layer.
    """
    if isinstance(model, Sequential):
        return model
    return Sequential(check_kind(model, Layer, "model", "mlp([784, 30, 10])"))


class _OutputGradient:
    """Where backpropagation starts: the loss's gradient at the output; ``value`` is the loss, once it was called.

    ``look`` is called with the loss before the backward pass; by default it refuses one that is not finite.
    """

    value = 0.0

    def __init__(self, loss: Loss, y: Array, weight: float = 1.0, look: Callable[[Any], float] = check_finite) -> None:
        self.loss, self.y, self.look = check_kind(loss, Loss, "loss", "SoftmaxCrossEntropy()"), y, look
        self.weight = check_number(weight, "weight", least=-math.inf)

    def __call__(self, output: Array) -> Array:
        value, gradient = self.loss.value_and_gradient(output, self.y)
        self.value = self.look(value) * self.weight
        if self.weight != 1:
            gradient *= self.weight
        return gradient


def add_gradients(
    model: Layer,
    loss: Loss,
    x: Array,
    y: Array,
    *,
    weight: float = 1.0,
    schedule: ScheduleLike = "none",
    after_backward: Callable[[Layer], None] | None = None,
    determinism_check: bool = False,
) -> float:
    """Add ``weight`` times the gradient of the loss into the parameters, on top of what is there.

    Args:
        x: (batch, features).
        y: targets, (batch, outputs).
        weight: a micro-batch's share of the batch that it is part of, if that is accumulated.
        schedule, after_backward, determinism_check: as for `npnet.checkpoint.backpropagate`.

    Returns:
        ``weight`` times the loss.

    Raises:
        TrainingDiverged: the loss is not finite; all gradients are cleared.
        OutOfMemory: memory ran out; all gradients are cleared.
    """
    network = as_chain(model)
    schedule = _schedule_of(network, schedule)
    start = _OutputGradient(loss, y, weight)
    model_facts = examined(model, network.layers)
    model_facts.check_loss(loss, network)
    with explained(network, schedule, x, loss=loss), watched_first(model_facts, schedule, x):
        backpropagate(
            network.layers, schedule, x, start, after_backward=after_backward, determinism_check=determinism_check
        )
    return start.value


def _schedule_of(network: Sequential, schedule: ScheduleLike) -> Schedule:
    """The schedule for the network's layers that ``schedule`` stands for (see `npnet.schedules.as_schedule`)."""
    if isinstance(schedule, Schedule):
        return schedule
    return as_schedule(schedule, len(network.layers), needs_saved(network.layers))


def value_and_grad(
    model: Layer, loss: Loss, x: Array, y: Array, *, schedule: ScheduleLike = "none", determinism_check: bool = False
) -> tuple[float, dict[str, Array]]:
    """The loss and all its gradients, by the parameters' paths (see `Layer.named_parameters`). No parameter is updated.

    A shared parameter's gradient is the sum over all its places. Buffers (`npnet.Buffer`) change as in every pass of a
    model that is training; `Layer.eval` keeps them.

    Args, raises: as for `add_gradients`.
    """
    clear_gradients(as_chain(model).layers)
    value = add_gradients(model, loss, x, y, schedule=schedule, determinism_check=determinism_check)
    gradients = {}
    for name, each in model.named_parameters().items():
        unused = each.gradient is None  # the loss does not depend on it
        gradients[name] = array_module(each.value).zeros_like(each.value) if unused else each.take_gradient()
    return value, gradients


@overload
def train_step(
    model: Layer,
    loss: Loss,
    optimizer: Optimizer,
    schedule: ScheduleLike,
    x: Array,
    y: Array,
    *,
    clip_norm: float | None = None,
    streaming: bool = True,
) -> float: ...


@overload
def train_step(
    model: Layer,
    loss: Loss,
    optimizer: Optimizer,
    x: Array,
    y: Array,
    *,
    schedule: ScheduleLike = "none",
    clip_norm: float | None = None,
    streaming: bool = True,
) -> float: ...


def train_step(
    model: Layer,
    loss: Loss,
    optimizer: Optimizer,
    *batch: Any,
    schedule: Any = None,
    x: Any = None,
    y: Any = None,
    clip_norm: float | None = None,
    streaming: bool = True,
) -> float:
    """Forward, backward and update on one batch: `accumulated_step` with a single micro-batch.

    Called as train_step(model, loss, optimizer, schedule, x, y), or without the schedule: plain backpropagation.
    """
    if len(batch) != 3 or not (schedule is x is y is None):
        batch = _schedule_and_batch(batch, {"schedule": schedule, "x": x, "y": y})
    schedule, x, y = batch
    return accumulated_step(
        model, loss, optimizer, schedule, [(x, y)], rows_of(x, "x"), clip_norm=clip_norm, streaming=streaming
    )


def _schedule_and_batch(given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """The schedule, x and y of `train_step`, from what was given by position and by name.

    Raises:
        TypeError: there are too many, or too few.
    """
    free = [name for name, value in named.items() if value is None]
    if len(given) > len(free):
        got = len(given) + 3
        raise TypeError(f"train_step: expected (model, loss, optimizer, schedule, x, y), got {got} arguments")
    named.update(zip(free[len(free) - len(given) :], given, strict=True))
    for name in ("x", "y"):
        if named[name] is None:
            raise TypeError(f"train_step: {name} is missing; call train_step(model, loss, optimizer, x, y)")
    return ("none" if named["schedule"] is None else named["schedule"]), named["x"], named["y"]


def rows_of(array: Array, name: str) -> int:
    """How many rows a batch has.

    Raises:
        TypeError: it is no array with rows.
    """
    try:
        return len(array)
    except TypeError:
        raise TypeError(f"{name}: expected an array, (batch, features), got {shown(array)}") from None


def accumulated_step(
    model: Layer,
    loss: Loss,
    optimizer: Optimizer,
    schedule: ScheduleLike,
    micro_batches: Iterable[Pair],
    samples: int,
    *,
    clip_norm: float | None = None,
    scaler: GradScaler | None = None,
    streaming: bool = True,
    determinism_check: bool = False,
    sums: GradientSums | None = None,
) -> float:
    """One update from the gradients of several micro-batches: that of the one large batch that they make up.

    Each counts by its number of samples. With the last one each layer is updated, and its gradient freed, on the way
    back. On a GPU the host waits once for each micro-batch, to see that the loss is finite before anything is updated;
    once more where gradients are clipped, and where they are scaled.

    Args:
        schedule: what to keep and what to recompute; see `npnet.schedules.as_schedule`.
        micro_batches: pairs (x, y), (batch, features) and (batch, outputs).
        samples: how many rows they have together; nothing is read beyond these.
        clip_norm: scale the gradient to this norm at most (see `clip_grad_norm`). Then all gradients are alive
            together, and the update comes after the backward pass.
        scaler: scale the loss, and skip the update if a gradient overflows. Then all gradients are alive together, too.
        streaming: False updates after the backward pass in any case. All gradients are alive together, and a step that
            is broken off, by whatever, leaves the model as it was; otherwise it may be half done.
        sums: the micro-batches are this process's shares of larger ones, and ``samples`` counts all ranks' rows: the
            gradients are summed over the ranks, once.

    Returns:
        The loss before the update.

    Raises:
        TrainingDiverged: the loss is not finite; nothing was updated.
        OutOfMemory: memory ran out; see ``streaming``, and `npnet.failures.rehearse`.
        ValueError: the micro-batches end before, or in the middle of one; nothing was updated.
    """
    network = as_chain(model)
    schedule = _schedule_of(network, schedule)
    check_kind(optimizer, Optimizer, "optimizer", "Adam(1e-3)")
    samples, value, seen, own_rows = check_whole(samples, "samples"), 0.0, 0, 0
    scale = 1.0 if scaler is None else check_kind(scaler, GradScaler, "scaler", "GradScaler()").get_scale()
    at_once = streaming and clip_norm is None and scaler is None
    update = (lambda layer: optimizer.step(layer.parameters())) if at_once else None
    before = None if scaler is None else scaler.state_dict()
    model_facts = examined(model, network.layers)
    model_facts.check_loss(loss, network)
    buffers = [(buffer, buffer.value) for buffer in model_facts.buffers]
    if sums is not None:
        sums.start()
        clear_gradients(network.layers)  # this rank may have no row of the first micro-batch
    try:
        for x, y in _pairs(micro_batches):
            rows = rows_of(x, "micro_batches: x") if sums is None else min(sums.batch_size, samples - seen)  # on all
            terms = {"loss": loss, "optimizer": optimizer, "streaming": at_once}
            terms["accumulation_steps"] = 1 if rows == samples else 2
            terms["ranks"] = 1 if sums is None else sums.ranks.size
            seen += rows
            if seen > samples or not samples:
                break
            last = seen == samples
            if sums is not None and not len(x):
                sums.idle(network, last, update, value)
            else:
                weight, first, after = len(x) / samples * scale, 0, update if last else None
                look: Callable[[Any], float] = check_finite
                if sums is not None:
                    first = sums.ranks.share(rows).start
                    where = partial(first_not_finite, network.layers, x, next_step())
                    after, look = sums.begin(last, update, value, weight, where)
                start = _OutputGradient(loss, y, weight, look)
                watch = watched_first(model_facts, schedule, x)
                with explained(network, schedule, x, **terms), rows_from(first), watch:
                    backpropagate(
                        network.layers, schedule, x, start, after_backward=after, determinism_check=determinism_check,
                        fresh=sums is None and seen == rows,
                    )  # fmt: skip
                value += start.value
            own_rows += len(x)
            if last:
                break
        if seen != samples or not samples:
            raise ValueError(f"samples: the micro-batches have {seen} rows or more, expected {samples}")
        if sums is not None:
            value = sums.finish()
            sums.average([buffer for buffer, _ in buffers], own_rows / samples)
        if not at_once:
            with explained(network, schedule, x, **terms):
                _update(model.parameters(), optimizer, clip_norm, scaler)
    except BaseException as error:
        if sums is not None:
            sums.failed(error)
        clear_gradients([model])
        for buffer, old in buffers:
            buffer.value = old
        if scaler is not None and before is not None:
            scaler.update()
            scaler.load_state_dict(before)
        raise
    return value / scale


def _update(
    parameters: list[Parameter], optimizer: Optimizer, clip_norm: float | None, scaler: GradScaler | None
) -> None:
    """All parameters together: no one is changed before there is memory for all."""
    finite = scaler is None or scaler.unscale(parameters)
    if clip_norm is not None and finite:
        clip_grad_norm(parameters, clip_norm, error_if_nonfinite=True)
    if scaler is None:
        optimizer.step(parameters)
    else:
        scaler.step(optimizer, parameters)
        scaler.update()


def _pairs(micro_batches: Iterable[Pair]) -> Iterator[Pair]:
    """The pairs, one by one.

    Raises:
        TypeError: they are not pairs.
    """
    try:
        given = iter(micro_batches)
    except TypeError:
        raise TypeError(f"micro_batches: expected pairs (x, y), got {shown(micro_batches)}") from None
    for pair in given:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"micro_batches: expected pairs (x, y), got {shown(pair)}")
        yield pair[0], pair[1]


def lazy_gradient(
    before: Sequential,
    after: Sequential,
    loss: Loss,
    x: Array,
    y: Array,
    *,
    after_backward: Callable[[Layer], None] | None = None,
) -> float:
    """Add the gradient of a model in two halves, that of the second half first.

    Only the bottleneck between the two is kept of the first half's forward pass. The gradient at the bottleneck is
    taken through ``after``; when all that this needed is gone, ``before`` is run again, and the gradient sent back
    through it.

    Args:
        before, after: the halves: the model's output is ``after(before(x))``.
        after_backward: called with each layer once its gradients are complete: an update there frees them.

    Returns:
        The loss.

    Raises:
        TrainingDiverged: the loss is not finite; all gradients are cleared.
    """
    for name, half in (("before", before), ("after", after)):
        check_kind(half, Sequential, name, "mlp([784, 30])")
    if after_backward is not None:
        check_callable(after_backward, "after_backward")
    output_gradient = _OutputGradient(loss, y)
    plain = [as_schedule("none", len(half.layers), needs_saved(half.layers)) for half in (before, after)]
    update: Callable[[Layer], None] = after_backward or (lambda layer: None)
    shared, waiting = set(before.parameters()), list[Layer]()

    def after_first(layer: Layer) -> None:
        """A layer that shares a parameter with the other half is complete at the end."""
        if shared.isdisjoint(layer.parameters()):
            update(layer)
        else:
            waiting.append(layer)

    try:
        with one_step() as step, watched_first(examined(before, before.layers), plain[0], x):
            bottleneck = before(x)
            with watched_first(examined(after, after.layers), plain[1], bottleneck):
                gradient = backpropagate(
                    after.layers, plain[1], bottleneck, output_gradient, after_backward=after_first, needs_dx=True
                )
            del bottleneck
            assert gradient is not None
            with one_step(step):  # the first half is run again: it draws the same random numbers
                backpropagate(before.layers, plain[0], x, lambda _: gradient, after_backward=update)
            for layer in waiting:
                update(layer)
    except BaseException:
        clear_gradients([before, after])
        raise
    return output_gradient.value
