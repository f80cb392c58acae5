"""One training step: gradients of one batch, or of several added up, and the update."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from npnet.backend import Array
from npnet.checkpoint import backpropagate, clear_gradients
from npnet.checks import check_kind, check_number, check_whole, shown
from npnet.layer import Layer, Pair, needs_saved
from npnet.layers import Sequential
from npnet.losses import Loss, check_finite
from npnet.optimizers import Optimizer, clip_grad_norm
from npnet.precision import GradScaler
from npnet.random import one_step
from npnet.schedule import Schedule
from npnet.schedules import ScheduleLike, as_schedule


def chain(model: Layer) -> Sequence[Layer]:
    """The layers that a schedule runs over: those of a `Sequential`, else the model as a single one.

    Raises:
        TypeError: not a layer.
    """
    if isinstance(model, Sequential):
        return model.layers
    return [check_kind(model, Layer, "model", "mlp([784, 30, 10])")]


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
    """
    layers, weight = chain(model), check_number(weight, "weight", least=-math.inf)
    check_kind(loss, Loss, "loss", "SoftmaxCrossEntropy()")
    value = 0.0

    def output_gradient(output: Array) -> Array:
        nonlocal value
        loss_value, gradient = loss.value_and_gradient(output, y)
        value = check_finite(loss_value) * weight
        if weight != 1:
            gradient *= weight
        return gradient

    backpropagate(
        layers,
        as_schedule(schedule, len(layers), needs_saved(layers)),
        x,
        output_gradient,
        after_backward=after_backward,
        determinism_check=determinism_check,
    )
    return value


def value_and_grad(
    model: Layer, loss: Loss, x: Array, y: Array, *, schedule: ScheduleLike = "none", determinism_check: bool = False
) -> tuple[float, dict[str, Array]]:
    """The loss and all its gradients, by the parameters' paths (see `Layer.named_parameters`); nothing is updated.

    Args, raises: as for `add_gradients`.
    """
    clear_gradients(chain(model))
    value = add_gradients(model, loss, x, y, schedule=schedule, determinism_check=determinism_check)
    return value, {name: parameter.take_gradient() for name, parameter in model.named_parameters().items()}


def train_step(
    model: Layer,
    loss: Loss,
    optimizer: Optimizer,
    schedule: Schedule,
    x: Array,
    y: Array,
    *,
    clip_norm: float | None = None,
) -> float:
    """Forward, backward and update on one batch: `accumulated_step` with a single micro-batch."""
    return accumulated_step(model, loss, optimizer, schedule, [(x, y)], rows_of(x, "x"), clip_norm=clip_norm)


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
    schedule: Schedule,
    micro_batches: Iterable[Pair],
    samples: int,
    *,
    clip_norm: float | None = None,
    scaler: GradScaler | None = None,
    determinism_check: bool = False,
) -> float:
    """One update from the gradients of several micro-batches: that of the one large batch that they make up.

    Each counts by its number of samples. With the last one each layer is updated, and its gradient freed, on the way
    back.

    Args:
        micro_batches: pairs (x, y), (batch, features) and (batch, outputs).
        samples: how many rows they have together; nothing is read beyond these.
        clip_norm: scale the gradient to this norm at most (see `clip_grad_norm`). Then all gradients are alive
            together, and the update comes after the backward pass.
        scaler: scale the loss, and skip the update if a gradient overflows. Then all gradients are alive together, too.

    Returns:
        The loss before the update.

    Raises:
        TrainingDiverged: the loss is not finite; nothing was updated.
        ValueError: the micro-batches end before, or in the middle of one; nothing was updated.
    """
    clear_gradients(chain(model))
    check_kind(optimizer, Optimizer, "optimizer", "Adam(1e-3)")
    samples = check_whole(samples, "samples")
    value, seen = 0.0, 0
    scale = 1.0 if scaler is None else check_kind(scaler, GradScaler, "scaler", "GradScaler()").get_scale()
    try:
        for x, y in _pairs(micro_batches):
            seen += rows_of(x, "micro_batches: x")
            last = seen == samples and clip_norm is None and scaler is None
            if seen > samples or not samples:
                break
            value += add_gradients(
                model,
                loss,
                x,
                y,
                weight=len(x) / samples * scale,
                schedule=schedule,
                after_backward=(lambda layer: optimizer.step(layer.parameters())) if last else None,
                determinism_check=determinism_check,
            )
            if seen == samples:
                break
        if seen != samples or not samples:
            raise ValueError(f"samples: the micro-batches have {seen} rows or more, expected {samples}")
        if scaler is not None or clip_norm is not None:
            parameters = model.parameters()
            finite = scaler is None or scaler.unscale(parameters)
            if clip_norm is not None and finite:
                clip_grad_norm(parameters, clip_norm)
            if scaler is not None:
                scaler.step(optimizer, parameters)
            else:
                optimizer.step(parameters)
    except BaseException:
        clear_gradients([model])
        raise
    finally:
        if scaler is not None:
            scaler.update()
    return value / scale


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
    check_kind(loss, Loss, "loss", "SoftmaxCrossEntropy()")
    value = 0.0

    def output_gradient(output: Array) -> Array:
        nonlocal value
        loss_value, gradient = loss.value_and_gradient(output, y)
        value = check_finite(loss_value)
        return gradient

    plain = [as_schedule("none", len(half.layers), needs_saved(half.layers)) for half in (before, after)]
    try:
        with one_step():  # the first half draws the same random numbers again
            gradient = backpropagate(
                after.layers, plain[1], before.predict(x), output_gradient, after_backward=after_backward, needs_dx=True
            )
            assert gradient is not None
            backpropagate(before.layers, plain[0], x, lambda _: gradient, after_backward=after_backward)
    except BaseException:
        clear_gradients([before, after])
        raise
    return value
