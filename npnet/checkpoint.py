"""Gradient checkpointing: run a schedule over a chain of layers.

`backpropagate` is the whole of backpropagation in npnet. Which activations survive from the forward pass, which are
computed a second time, and when each is let go is said by the schedule; `backpropagate` does as it says.
Because a recomputation calls the same function with the same input, it gives the same bits: a gradient does not
depend on the schedule. (That is a promise of the layers: see `Layer.forward`.)
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np

from npnet.backend import Array
from npnet.checks import check_callable, check_flag, check_kind, check_whole, shown
from npnet.determinism import OTHER_NUMBERS, Checking, DeterminismCheck, NondeterministicLayer, digest
from npnet.layer import InPlaceLayer, Layer, LayerCost, LayerError, ResultError, Saved, ShapeError, both, needs_saved
from npnet.layer_rules import read_only, refuse_changed_input
from npnet.layers import Sequential
from npnet.model_tree import completed_after, parameters_of
from npnet.offload import Store, borrowed_store
from npnet.random import new_step, one_step, set_updates
from npnet.schedule import DROP, FETCH, FORWARD, OFFLOAD, Schedule

_checking = Checking()
_NO_STORE = nullcontext(Store())  # where nothing is offloaded

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
    needs_dx: bool = False,
    determinism_check: bool = False,
    fresh: bool = False,
) -> Array | None:
    """Add the gradient of a loss into every parameter of the chain, on top of the gradients that are there.

    Args:
        layers: the chain, f_1 ... f_L.
        schedule: what to hold and what to recompute.
        x: the input a_0, shape (batch, features); it stays the caller's: layers get a view that they cannot write to.
        output_gradient: from the chain's output a_L to a new array, the gradient dL/da_L.
        after_backward: called with each layer once its gradients are complete. An optimizer step there frees
            them at once, so the gradients of all layers are never alive together. A layer that shares a parameter
            with a layer below is complete when the backward pass of the lowest such layer is done.
        restore: does the recomputing, for chains whose layers save nothing but input and output.
        needs_dx: go on to the gradient at ``x``, too.
        determinism_check: compare what is recomputed with what was computed first, number by number (by a hash: slow,
            for finding mistakes).
        fresh: forget the gradients that are there first.

    Returns:
        The gradient at ``x``, or None.

    Raises:
        NondeterministicLayer: with the check, a layer gave other numbers the second time.
        OffloadError: an activation cannot be moved out of memory, or back (see `npnet.offload`).
        ValueError: the schedule is for a chain of another depth; or layers need what they save (see `needs_saved`), and
            there is a ``restore``.

    If an error is raised, no gradients are left behind, and no buffer is changed.
    """
    check_kind(schedule, Schedule, "schedule", "npnet.schedules.every_nth(depth, n)")
    check_callable(output_gradient, "output_gradient")
    if after_backward is not None:
        check_callable(after_backward, "after_backward")
    if restore is not None:
        check_callable(restore, "restore")
    needs_dx, determinism_check = check_flag(needs_dx, "needs_dx"), check_flag(determinism_check, "determinism_check")
    fresh = check_flag(fresh, "fresh")
    try:
        if schedule.depth != len(layers):
            raise ValueError(f"a schedule for {schedule.depth} layers cannot run a chain of {len(layers)}")
        schedule = schedule.for_layers(needs_saved(layers))
        if restore is not None and schedule.needs_saved:
            raise ValueError(
                f"restore: layers {sorted(schedule.needs_saved)} need what they saved, which it cannot give"
            )
        parameters = parameters_of(layers) if fresh or after_backward is not None else []
    except (AttributeError, TypeError):
        raise TypeError(f"layers: expected a list of layers, got {shown(layers)}") from None
    for parameter in parameters if fresh else ():
        parameter.gradient = None
    completed = completed_after(layers, parameters)
    before = _checking.always
    try:
        with one_step():  # whatever is run again in it draws the same random numbers again
            check = DeterminismCheck(layers) if determinism_check else None
            _checking.always = determinism_check or before  # of the parts inside, too
            with borrowed_store(schedule.offload_to) if schedule.offloads else _NO_STORE as store:
                return _run(
                    layers, schedule, x, output_gradient, after_backward, completed, restore, needs_dx, check, store
                )
    except BaseException:  # Ctrl-C, too: the next pass must not add to the half of this one
        clear_gradients(layers)
        raise
    finally:
        _checking.always = before


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
    completed: Sequence[Sequence[Layer]] | None,
    restore: Restore | None,
    needs_dx: bool,
    check: DeterminismCheck | None,
    store: Store,
) -> Array | None:
    """Do what the schedule says, action by action."""
    held: dict[int, Array] = {0: read_only(x)}  # l -> a_l
    saved: dict[int, Saved] = {}  # l -> what layer l saved, where that is more than (a_{l-1}, a_l)
    gradient: Array | None = None  # dL/da_l, for the layer l whose backward pass is next
    for kind, first, last, recompute, saves, passes in schedule.runs:
        if kind is FORWARD:
            if recompute and restore is not None:
                held.update(enumerate(restore(held[first - 1], first, last), first))
                if check is not None:
                    for number in range(first, last + 1):
                        check(number, held[number])
                continue
            output = held[first - 1]
            updates = set_updates(None) if recompute else None  # a buffer changes once a step
            for number in range(first, last + 1):
                try:
                    output, kept = layers[number - 1].forward(output)
                except LayerError as error:
                    raise error.within(str(number - 1)) from None
                except ValueError as error:
                    refuse_changed_input(error, f"layer {number - 1}, {layers[number - 1]}")
                    raise
                if not passes:
                    held[number] = output
                if saves:
                    saved[number] = kept
                if check is not None:
                    check(number, output)
                del kept  # a name would hold the activations beyond their time
            held[last] = output
            if recompute:
                set_updates(updates)
            del output
        elif kind is DROP:
            del held[first]
        elif kind is OFFLOAD:
            store.put(first, held.pop(first))
        elif kind is FETCH:
            held[first] = store.get(first)
        else:
            layer, output = layers[first - 1], held.pop(first)
            if gradient is None:
                gradient = output_gradient(output)
                layer.check_gradient(gradient, output)
            kept = (held[first - 1], output) if layer.output_suffices else saved.pop(first)
            try:
                gradient = layer.backward_(gradient, kept, first > 1 or needs_dx)
                if gradient is None and first > 1:
                    raise ResultError(f"{layer}: backward must return the gradient at the input; it returned None")
            except LayerError as error:
                raise error.within(str(first - 1)) from None
            del output, kept
            if after_backward is not None:
                if completed is None:
                    after_backward(layer)
                else:
                    for each in completed[first - 1]:
                        after_backward(each)
    return gradient


class _Input(NamedTuple):
    """What a `Checkpoint` keeps."""

    x: Array
    step: int
    digest: bytes | None


class Checkpoint(InPlaceLayer):
    """A layer (a whole model, say) of which only the input is kept: it is run again right before its backward pass.

    The checkpointing of one part, wherever it stands in a model, as ``torch.utils.checkpoint.checkpoint``; active while
    training, inert in `eval`. Parts may be nested.

    Args:
        inner: the layer.
        preserve_rng_state: run it again with the random numbers of the first time. Without, the gradient is that of
            another function wherever numbers are drawn.
        determinism_check: raise `NondeterministicLayer` when the second output differs from the first (by a hash).
    """

    def __init__(self, inner: Layer, preserve_rng_state: bool = True, determinism_check: bool = False) -> None:
        if not isinstance(inner, Layer):
            raise TypeError(f"checkpoint: expected a layer, got {shown(inner)}")
        self.inner, self.preserve_rng_state = inner, check_flag(preserve_rng_state, "preserve_rng_state")
        self.determinism_check = check_flag(determinism_check, "determinism_check")

    def __repr__(self) -> str:
        return f"checkpoint({self.inner})"

    def forward(self, x: Array) -> tuple[Array, Saved]:
        try:
            if not self.training:
                return both(self.inner, self.inner.forward(x))
            with one_step() as step:
                y, _ = both(self.inner, self.inner.forward(x))
        except LayerError as error:
            raise error.within("inner") from None
        return y, _Input(x, step, digest(y) if self.determinism_check or _checking.always else None)

    def backward(self, dy: Array, saved: Saved) -> Array:
        if not isinstance(saved, _Input):  # of a forward pass in eval
            return self.inner.backward(dy, saved)
        self.check_gradient(dy, dy)  # with the output's shape it is compared when that is there
        return super().backward(dy, saved)

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array | None:
        try:
            if not isinstance(saved, _Input):  # of a forward pass in eval
                return self.inner.backward_(dy, saved, needs_dx)
            with one_step(saved.step if self.preserve_rng_state else new_step()):
                y, kept = self.inner.forward(saved.x)
                if saved.digest is not None and digest(y) != saved.digest:
                    raise NondeterministicLayer(f"{self}: {OTHER_NUMBERS}")
                self.inner.check_gradient(dy, y)
                del y
                return self.inner.backward_(dy, kept, needs_dx)
        except LayerError as error:
            raise error.within("inner") from None

    def cost(self, shape: tuple[int, int], dtype: np.dtype[Any], needs_dx: bool = True) -> LayerCost:
        try:
            inner = self.inner.cost(shape, dtype, needs_dx)
        except ShapeError as error:
            raise error.within("inner") from None
        if not self.training:
            return inner
        held = inner.saved_bytes + (inner.output_bytes if inner.keeps_output else 0)
        again = max(inner.output_bytes + inner.forward_bytes, held + inner.backward_bytes)
        return inner._replace(
            saved_bytes=0,
            keeps_input=True,
            keeps_output=False,
            in_place=False,
            backward_bytes=again,
            backward_flops=inner.forward_flops + inner.backward_flops,
        )


def checkpoint(part: Layer, preserve_rng_state: bool = True, determinism_check: bool = False) -> Checkpoint:
    """``part``, of which only the input is kept: see `Checkpoint`."""
    return Checkpoint(part, preserve_rng_state, determinism_check)


class Tape(NamedTuple):
    """What a forward pass left for its backward pass, part by part."""

    parts: Sequence[Layer]
    saved: list[Saved]

    @np.errstate(over="ignore", invalid="ignore")
    def backward(self, dy: Array) -> Array:
        """The gradient at the input, from that at the output; adds into the parameters' gradients.

        Once: what a part saved is freed when its gradients are there.

        Raises:
            RuntimeError: the tape has been used.
        """
        if not self.saved:
            raise RuntimeError("Tape.backward: the tape has been used; run the forward pass again")
        gradient: Any = self.parts[-1].backward(dy, self.saved[-1])  # which refuses a dy that does not fit
        for part in reversed(self.parts[:-1]):
            self.saved.pop()
            gradient = part.backward_(gradient, self.saved[-1])
        self.saved.clear()
        return gradient


@np.errstate(over="ignore", invalid="ignore")
def checkpoint_sequential(
    functions: Sequential | Sequence[Layer], segments: int, x: Array, preserve_rng_state: bool = True
) -> tuple[Array, Tape]:
    """Run layers in a row in ``segments`` parts, and keep only the inputs of all parts but the last.

    As ``torch.utils.checkpoint.checkpoint_sequential``: each part has len // segments layers, the last the rest, and
    that one is not checkpointed.

    Returns:
        The output, and the tape whose ``backward(dy)`` gives the gradient at ``x``.

    Raises:
        TypeError, ValueError: ``segments`` is not a whole number from 1 to the number of layers.
    """
    try:
        layers = functions.layers if isinstance(functions, Sequential) else list(functions)
    except TypeError:
        raise TypeError(f"functions: expected a Sequential or a list of layers, got {shown(functions)}") from None
    segments = check_whole(segments, "segments", least=1)
    size = len(layers) // segments
    if not size:
        raise ValueError(f"segments: {segments} are more than the {len(layers)} layers")
    last = size * (segments - 1)
    parts = [Sequential(*layers[start : start + size]) for start in range(0, last, size)]
    model = Sequential(*(checkpoint(part, preserve_rng_state) for part in parts), Sequential(*layers[last:]))
    y, saved = model.forward(x)
    return y, Tape(model.layers, saved)
