"""Gradient checkpointing: run a schedule over a chain of layers.

This is the whole of backpropagation in npnet. Which activations survive from the forward pass, which are
computed a second time, and when each is let go is said by the schedule; `backpropagate` does as it says.
Because a recomputation calls the same function with the same input, it gives the same bits: a gradient does not
depend on the schedule. (That is a promise of the layers: see `Layer.forward`.)
"""

from collections.abc import Callable, Sequence

import numpy as np

from npnet.backend import Array
from npnet.layer import KindError, Layer, Saved, ShapeError, needs_saved
from npnet.random import one_step
from npnet.schedule import DROP, FORWARD, Schedule

Restore = Callable[[Array, int, int], Sequence[Array]]
"""restore(a, first, last): the outputs of layers first, ..., last, recomputed from the input ``a`` of the first."""


@np.errstate(over="ignore", invalid="ignore")  # the sigmoid overflows rightly; NaN is found in the loss
def backpropagate(
    layers: Sequence[Layer],
    schedule: Schedule,
    x: Array,
    output_gradient: Callable[[Array], Array],
    *,
    after_backward: Callable[[Layer], None] | None = None,
    restore: Restore | None = None,
) -> None:
    """Add the gradient of a loss into every parameter of the chain, on top of what gradients are there.

    Args:
        layers: the chain, f_1 ... f_L.
        schedule: what to hold and what to recompute.
        x: the input a_0, shape (batch, features); it stays the caller's.
        output_gradient: from the chain's output a_L to a new array, the gradient dL/da_L.
        after_backward: called with each layer once its gradients are complete. An optimizer step there frees
            them at once, so the gradients of all layers are never alive together.
        restore: does the recomputing (for chains whose layers save nothing but input and output).

    Raises:
        ValueError: the schedule is for a chain of another depth, or does not name the layers that need what they
            save (see `needs_saved`).

    Whatever is raised on the way leaves no gradients behind.
    """
    if schedule.depth != len(layers):
        raise ValueError(f"a schedule for {schedule.depth} layers cannot run a chain of {len(layers)}")
    unsaved = needs_saved(layers) - schedule.needs_saved
    if unsaved:
        first = min(unsaved)
        raise ValueError(f"layer {first} ({layers[first - 1]}) needs what it saved: make the schedule with needs_saved")
    try:
        with one_step():  # whatever is run again in it draws the same random numbers again
            _run(layers, schedule, x, output_gradient, after_backward, restore)
    except BaseException:  # Ctrl-C, too: the next pass must not add to the half of this one
        clear_gradients(layers)
        raise


def clear_gradients(layers: Sequence[Layer]) -> None:
    """Forget every gradient, so that the next backward pass starts from none."""
    for layer in layers:
        for parameter in layer.parameters():
            parameter.gradient = None


def _run(
    layers: Sequence[Layer],
    schedule: Schedule,
    x: Array,
    output_gradient: Callable[[Array], Array],
    after_backward: Callable[[Layer], None] | None,
    restore: Restore | None,
) -> None:
    """Do what the schedule says, action by action."""
    held: dict[int, Array] = {0: x}  # l -> a_l
    saved: dict[int, Saved] = {}  # l -> what layer l saved, where that is more than (a_{l-1}, a_l)
    gradient: Array | None = None  # dL/da_l, for the layer l whose backward pass is next
    for kind, first, last, recompute, saves in schedule.steps:
        if kind is FORWARD:
            if recompute and restore is not None:
                held.update(enumerate(restore(held[first - 1], first, last), first))
                continue
            for number in range(first, last + 1):
                try:
                    held[number], kept = layers[number - 1].forward(held[number - 1])
                except (ShapeError, KindError) as error:
                    raise error.within(str(number - 1)) from None
                if saves:
                    saved[number] = kept
                del kept  # a name would hold the activations beyond their time
        elif kind is DROP:
            del held[first]
        else:
            layer, output = layers[first - 1], held.pop(first)
            if gradient is None:
                gradient = output_gradient(output)
                layer.check_gradient(gradient, output)
            kept = (held[first - 1], output) if layer.output_suffices else saved.pop(first)
            gradient = layer.backward_(gradient, kept, first > 1)
            del output, kept
            if after_backward is not None:
                after_backward(layer)
