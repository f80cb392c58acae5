"""When a training step fails: found out before anything is updated, and explained."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import numpy as np

from npnet.backend import Array, array_module
from npnet.chain_costs import HasLayers
from npnet.checkpoint import backpropagate, clear_gradients
from npnet.checks import check_kind, is_finite
from npnet.layer import Layer
from npnet.layer_rules import has_foreign_layers, watched
from npnet.losses import Loss, TrainingDiverged
from npnet.memory import format_bytes
from npnet.optimal import smallest_budget
from npnet.planner import plan
from npnet.plans import MOST_LAYERS
from npnet.random import next_step, one_step
from npnet.ranks import RankDiverged
from npnet.schedule import Schedule
from npnet.stand_in import StandIn


class OutOfMemory(MemoryError):
    """Memory ran out in a training step; the message says what would take less."""


def rehearse(
    layers: Sequence[Layer],
    schedule: Schedule,
    x: Array,
    prepare: Callable[[Layer], object] = lambda layer: None,
    accumulating: bool = False,
) -> None:
    """Do all that a step does but the updates, so that memory runs out here, if it does.

    Where layers are updated on the way back, a step that is broken off leaves some of them updated and others not.
    Their old values cannot be kept for that case: that would take as much as updating them early saves.
    Meanwhile layers that are not npnet's are watched: see `npnet.layer_rules`.

    Args:
        prepare: called with each layer when its gradients are there: allocates what its update takes.
        accumulating: gradients of other micro-batches are there, too.

    Raises:
        LayerRuleError: a layer does what makes gradients wrong.
    """

    def output_gradient(output: Array) -> Array:  # the loss comes before all updates, and need not be rehearsed
        zeros: Array = array_module(output).zeros_like(output)
        return zeros

    def after_backward(layer: Layer) -> None:
        prepare(layer)
        clear_gradients([layer])

    with one_step(next_step()), watched(layers):  # the number, and so the random numbers, of the step to come
        if accumulating:
            backpropagate(layers, schedule, x, output_gradient)
        backpropagate(layers, schedule, x, output_gradient, after_backward=after_backward)


class Examined:
    """What is looked up once about a model: its buffers, the schedules under which it was watched, and its losses."""

    __slots__ = ("buffers", "layers", "losses", "schedules")

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)
        self.buffers = list(dict.fromkeys(buffer for layer in layers for buffer in layer.buffers()))
        self.schedules: set[Schedule] | None = set() if has_foreign_layers(layers) else None  # None: all
        self.losses = set[type[Loss]]()

    def __reduce__(self) -> tuple[Any, ...]:
        return Examined, ([],)  # a copy of the model is looked at anew

    def check_loss(self, loss: Loss, model: Layer) -> None:
        """The first time a model is trained with a loss: see `Loss.check_model`."""
        if type(loss) not in self.losses:
            check_kind(loss, Loss, "loss", "SoftmaxCrossEntropy()").check_model(model)
            self.losses.add(type(loss))


def watched_first(seen: Examined, schedule: Schedule, x: Array) -> AbstractContextManager[None]:
    """For a model's first step under a schedule: watch its layers, if some are not npnet's (see `npnet.layer_rules`).

    Args:
        seen: what is known of the model; it remembers the schedules.
        x: the step's input.
    """
    if seen.schedules is None or schedule in seen.schedules or isinstance(x, StandIn):
        return _UNWATCHED
    return _watched_once(seen, schedule)


_UNWATCHED = nullcontext()


@contextmanager
def _watched_once(seen: Examined, schedule: Schedule) -> Iterator[None]:
    with watched(seen.layers):
        yield
    if seen.schedules is not None:
        seen.schedules.add(schedule)


def note_examined(model: Layer, layers: Sequence[Layer], schedule: Schedule) -> None:
    """The model was rehearsed under this schedule: `watched_first` need not watch it again."""
    seen = examined(model, layers)
    if seen.schedules is not None:
        seen.schedules.add(schedule)


def examined(model: Layer, layers: Sequence[Layer]) -> Examined:
    """What is known of the model as it is now; it keeps that in an attribute, which is no part of it."""
    seen: Examined | None = vars(model).get("_examined")
    if seen is None or seen.layers != layers:
        seen = vars(model)["_examined"] = Examined(layers)
    return seen


class explained:  # noqa: N801 - used as a function; a class, since every step enters it
    """Add to what a step on ``x`` raises: the layer where the numbers diverged, or what would take less memory.

    Args:
        terms: what else `npnet.plan` has to know of the step.
    """

    def __init__(self, network: HasLayers, schedule: Schedule, x: Array, **terms: Any) -> None:
        self.network, self.schedule, self.x, self.terms = network, schedule, x, terms

    def __enter__(self) -> None:
        self.step = next_step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, TrainingDiverged) and not isinstance(error, RankDiverged):
            raise TrainingDiverged(f"{error}; {first_not_finite(self.network.layers, self.x, self.step)}") from None
        if isinstance(error, MemoryError) and not isinstance(error, OutOfMemory):
            traceback.clear_frames(trace)  # else the error holds the activations, while a way out is sought
            raise OutOfMemory(_advice(error, self.network, self.schedule, self.x, self.terms)) from error


def _advice(error: MemoryError, network: HasLayers, schedule: Schedule, x: Array, terms: dict[str, Any]) -> str:
    text = f"memory ran out in a step on a batch of {len(x)} under the schedule {schedule.name!r}"
    text += f" ({error})" if str(error) else ""
    try:
        batch = len(x) * terms.get("ranks", 1)
        used = plan(network, batch, strategy=schedule, features=x.shape[1], **terms)
        text += f": it takes {format_bytes(used.peak_bytes)}"
        text += "" if "optimizer" in terms else ", and what an optimizer keeps"
        if used.chain.depth <= MOST_LAYERS:
            least = smallest_budget(used.chain)[0] + used.chain.fixed
            if least < 0.95 * used.peak_bytes:
                text += f"; npnet.plan finds schedules for memory_budget={least} ({format_bytes(least)}) and more"
        return f"{text}; or take a smaller batch"
    except (NotImplementedError, TypeError, ValueError, MemoryError):  # it cannot be planned, or not with what is left
        return f"{text}; take a smaller batch"


def first_not_finite(layers: Sequence[Layer], x: Array, step: int | None = None) -> str:
    """Where the numbers of a step cease to be finite, for a message."""
    with np.errstate(over="ignore", invalid="ignore"), one_step(step, counts=False):
        for number, layer in enumerate(layers):
            for name, parameter in layer.named_parameters().items():
                if not is_finite(parameter.value):
                    return f"{name} of layer {number}, {layer}, is the first that is not finite"
            x = layer(x)
            if not is_finite(x):
                return f"the output of layer {number}, {layer}, is the first that is not finite"
    for number, layer in reversed(list(enumerate(layers))):
        for name, parameter in layer.named_parameters().items():
            if parameter.gradient is not None and not is_finite(parameter.gradient):
                return f"the gradient of {name} of layer {number}, {layer}, is the first that is not finite"
    return "the outputs of all layers are finite"
