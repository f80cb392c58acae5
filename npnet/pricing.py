"""What a training step takes, in bytes and flops, before it runs: the price of a schedule.

`Chain` holds what each layer costs, as plain integers, read from the layers (`npnet.layer.Layer.cost`) by `chain_of`.
`timeline` goes through a schedule action by action, as the engine does, and adds up what is alive.

Notation, as in Beaumont et al., "Optimal checkpointing for heterogeneous chains", 2019, arXiv:1911.13214: layer l makes
a_l, of A_l bytes, from a_{l-1}, and saves S_l more; D_l is the gradient at a_l; f_l and b_l are the flops of its two
passes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple, Protocol

import numpy as np

from npnet.checks import check_flag, check_kind, check_whole, shown
from npnet.layer import Layer, LayerCost, costs_of, needs_saved
from npnet.losses import Loss
from npnet.optimizers import Optimizer
from npnet.pools import block_bytes, in_blocks
from npnet.schedule import BACKWARD, DROP, FETCH, FORWARD, OFFLOAD, Action, Schedule

MESSAGE_BYTES = 2**16
"""Gradients of thin layers are sent together, up to so many bytes: a message takes microseconds however small it is."""

SMALL_BYTES = 8192
"""Sixteen blocks of a device's memory pool: arrays of a number each, and the partial sums of a reduction."""

MOST_FLOPS = 10**18
"""The most flops of a step that is planned: with more, bytes would not fit into 64 bits."""


class HasLayers(Protocol):
    """What can be planned: `npnet.Sequential`, `npnet.Network`."""

    @property
    def layers(self) -> Sequence[Layer]:
        """The chain."""


@dataclass(frozen=True)
class Chain:
    """The costs of a chain of L layers for one batch. Sequences have L + 1 entries; entry l belongs to layer l, entry 0
    to the input. All in bytes but the flops.
    """

    activation: Sequence[int]  # A_l; A_0 = 0, the input is the caller's
    saved: Sequence[int]  # S_l, for layers whose output does not suffice, else 0
    gradient: Sequence[int]  # D_l
    forward_bytes: Sequence[int]  # the most that forward takes besides input and output, S_l included
    backward_bytes: Sequence[int]  # the most that backward takes besides a_{l-1}, a_l, S_l, D_l: D_{l-1} included
    parameter_gradients: Sequence[int]  # made by backward
    streaming: bool  # ... and freed right after it by the update of the layer; else they stay until the step ends
    forward_flops: Sequence[int]  # f_l
    backward_flops: Sequence[int]  # b_l
    needs_saved: frozenset[int] = frozenset()
    saves_input: frozenset[int] = frozenset()  # those of them whose input is among what they save
    loss_bytes: int = 0  # the most that the loss takes besides the output: D_L included
    parameters: int = 0
    optimizer: int = 0
    accumulated: int = 0  # gradients of the micro-batches before
    communication: int = 0  # buffers in which gradients are summed over several processes
    small: int = 0  # on a device: for single rows and columns, and for what reductions take
    overlapping: bool = False  # on a device: activations travel to the host while it computes (`npnet.transfers`)
    gradient_given: bool = False  # D_L is there from the start (a model of the literature; in npnet the loss makes it)

    @property
    def depth(self) -> int:
        """L."""
        return len(self.activation) - 1

    @property
    def fixed(self) -> int:
        """Bytes that are alive throughout, whatever the schedule."""
        return self.parameters + self.optimizer + self.accumulated + self.communication + self.small

    @property
    def step_flops(self) -> int:
        """Flops of a plain training step: each layer forward and backward once."""
        return sum(self.forward_flops) + sum(self.backward_flops)

    def recompute_flops(self, schedule: Schedule) -> int:
        """Flops of all forwards of ``schedule`` but the first of each layer."""
        return sum((count - 1) * self.forward_flops[layer] for layer, count in schedule.forwards.items())

    def moved_bytes(self, schedule: Schedule) -> int:
        """What ``schedule`` moves out of memory; as much comes back."""
        return sum(self.activation[action.layer] for action in schedule if action.kind is OFFLOAD)

    def peak_bytes(self, schedule: Schedule) -> int:
        """The most bytes alive at once under ``schedule``."""
        return max(moment.peak_bytes for moment in timeline(schedule, self))


def chain_of(
    network: HasLayers,
    batch_size: int,
    *,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
    streaming: bool = True,
    accumulation_steps: int = 1,
    communicating: bool = False,
    features: int | None = None,
) -> Chain:
    """Ask each layer what it costs.

    Args: as for `npnet.plan`; communicating: gradients are summed over several processes.

    On a device arrays take whole blocks of its pool, and what is small is counted, too (`Chain.small`).

    Raises:
        NotImplementedError: a layer does not say what it costs.
        TypeError, ValueError: a layer does not fit the one before, or an argument is of another kind.
    """
    layers, features, dtype = input_of(network, features)
    if loss is not None:
        check_kind(loss, Loss, "loss", "npnet.SoftmaxCrossEntropy()")
    if optimizer is not None:
        check_kind(optimizer, Optimizer, "optimizer", "npnet.Adam(1e-3)")
    streaming = check_flag(streaming, "streaming")
    accumulating = check_whole(accumulation_steps, "accumulation_steps", least=1) > 1
    held = [parameter.value for layer in layers for parameter in layer.parameters()]
    block = block_bytes(held[0]) if held else 1
    asked = zip(layers, costs_of(layers, (batch_size, features), dtype, needs_dx=False), strict=True)
    costs = [_in_blocks(cost, layer, block) for layer, cost in asked]
    flops = sum(cost.forward_flops + cost.backward_flops for cost in costs)
    if flops > MOST_FLOPS:
        raise ValueError(f"batch_size: {batch_size} samples take {flops:.3g} flops a step; plan for a smaller batch")
    loss_arrays = getattr(network, "loss_arrays", 1) if loss is None else loss.loss_arrays
    outputs, gradients = [0, *(cost.output_bytes for cost in costs)], [0, *(cost.dy_bytes for cost in costs)]
    parameters = sum(in_blocks(array.nbytes, block) for array in held)
    saved = [0, *(0 if layer.output_suffices else cost.saved_bytes for layer, cost in zip(layers, costs, strict=True))]
    backward = [0, *(cost.backward_bytes for cost in costs)]
    sizes = [max((in_blocks(each.value.nbytes, block) for each in layer.parameters()), default=0) for layer in layers]
    decays = optimizer is not None and optimizer.weight_decay > 0  # that takes an array of the parameter's size
    for number, cost in enumerate(costs, 1):
        if streaming or number == 1:  # the update, when a_l, what was saved, and the gradient at a_l are gone
            update = 0 if not decays else sizes[number - 1] if streaming else max(sizes)
            gone = outputs[number] + gradients[number] + saved[number]
            backward[number] = max(backward[number], cost.gradient_bytes + gradients[number - 1] + update - gone)
    return Chain(
        activation=outputs,
        saved=saved,
        gradient=gradients,
        forward_bytes=[0, *(cost.forward_bytes for cost in costs)],
        backward_bytes=backward,
        parameter_gradients=[0, *(cost.gradient_bytes for cost in costs)],
        streaming=streaming or accumulating,  # added to what is there, a new gradient is gone at once, too
        forward_flops=[0, *(cost.forward_flops for cost in costs)],
        backward_flops=[0, *(cost.backward_flops for cost in costs)],
        needs_saved=needs_saved(layers),
        saves_input=frozenset(number for number in needs_saved(layers) if costs[number - 1].keeps_input),
        loss_bytes=loss_arrays * outputs[-1],
        parameters=parameters,
        optimizer=len(optimizer.state_names) * parameters if optimizer else 0,
        accumulated=parameters if accumulating else 0,
        communication=sum(in_blocks(size, block) for size in buffer_bytes(layers)) if communicating else 0,
        small=0 if block == 1 else _small_bytes(batch_size, max(cost.output_shape[1] for cost in costs), dtype),
        overlapping=block > 1,
    )


def input_of(network: HasLayers, features: int | None = None) -> tuple[Sequence[Layer], int, np.dtype[Any]]:
    """The chain of ``network``, how many features its input has, and its dtype.

    Raises:
        TypeError: not a network.
        ValueError: no layer tells the number of features, and ``features`` does not either.
    """
    layers = getattr(network, "layers", None)
    if not layers or not all(isinstance(layer, Layer) for layer in layers):
        raise TypeError(f"network: expected a Network or a Sequential, got {shown(network)}")
    if features is None:
        features = next(_features(layers), None)
    if features is None:
        raise ValueError("features: no layer tells how many features a row of the input has; give features=")
    dtype = next((parameter.value.dtype for layer in layers for parameter in layer.parameters()), np.dtype(np.float32))
    return layers, check_whole(features, "features", least=1), dtype


def _features(layers: Iterable[Layer]) -> Iterator[int]:
    """How many features a row has where a layer tells; the first is the input's, if no layer before changes it."""
    for layer in layers:
        if hasattr(layer, "in_features"):
            yield layer.in_features
        yield from _features(layer.children().values())


def buffer_bytes(layers: Sequence[Layer]) -> list[int]:
    """Sizes of the buffers in which gradients are summed over several processes (see `npnet.gradient_sums`).

    One for all gradients, where these are few; else two, each large enough for any layer.
    """
    sizes = [sum(parameter.value.nbytes for parameter in layer.parameters()) for layer in layers]
    buffer = max(MESSAGE_BYTES, *sizes)
    return [sum(sizes)] if sum(sizes) <= buffer else [buffer, buffer]


def _in_blocks(cost: LayerCost, layer: Layer, block: int) -> LayerCost:
    """The cost with every array rounded up to blocks; arrays that the layer gives one figure for, together."""
    if block == 1:
        return cost
    given = cost.output_gradient_bytes
    gradients = sum(in_blocks(each.value.nbytes, block) for each in layer.parameters()) if cost.gradient_bytes else 0
    return cost._replace(
        output_bytes=in_blocks(cost.output_bytes, block),
        saved_bytes=in_blocks(cost.saved_bytes, block),
        forward_bytes=in_blocks(cost.forward_bytes, block),
        gradient_bytes=gradients,
        backward_bytes=in_blocks(cost.backward_bytes + max(gradients - cost.gradient_bytes, 0), block),
        output_gradient_bytes=None if given is None else in_blocks(given, block),
    )


def _small_bytes(batch: int, features: int, dtype: np.dtype[Any]) -> int:
    """On a device, what costs do not say: two columns, two rows, and a few kB for numbers and partial sums."""
    return 2 * in_blocks(batch * dtype.itemsize) + 2 * in_blocks(features * dtype.itemsize) + SMALL_BYTES


class Moment(NamedTuple):
    """Bytes alive after an action, by what they are, and ``workspace``: how many more there were at its worst."""

    action: Action
    parameters: int
    optimizer: int
    gradients: int  # of the parameters, with buffers that sum them, and the one that is passed down
    checkpoints: int  # activations from which others are computed again
    segment: int  # activations, and what layers saved, that wait for their own backward pass (or move: up, out, back)
    workspace: int

    @property
    def peak_bytes(self) -> int:
        """The most that is alive during the action."""
        return sum(self[1:])


def timeline(schedule: Schedule, chain: Chain) -> list[Moment]:
    """What is alive during and after each action of ``schedule``."""
    restarted = _restarted(schedule)
    last_forward = {action.layer: i for i, action in enumerate(schedule) if action.kind is FORWARD}
    held: dict[int, int] = {}  # layer -> bytes of its activation and of what it saved
    checkpoints = segment = kept = 0
    passed = chain.gradient[chain.depth] if chain.gradient_given else 0
    moments = []
    saving = set[int]()  # layers that hold what they saved, their input among it
    saved_inputs: dict[int, int] = {}  # such a layer -> bytes of its input, which the schedule has let go
    made: dict[int, int] = {}  # layer -> index of the action that made the activation held
    overlapping = chain.overlapping and schedule.offload_to != "disk"
    on_the_way = _moving(schedule, chain.activation) if overlapping else repeat(0, len(schedule))
    for i, (action, moving) in enumerate(zip(schedule, on_the_way, strict=True)):
        kind, layer = action
        before = checkpoints + segment + kept + passed + moving
        if kind is FORWARD:
            saved = chain.saved[layer] if last_forward[layer] == i else 0
            held[layer], made[layer] = chain.activation[layer] + saved, i
            if last_forward[layer] == i and layer in chain.saves_input:
                saving.add(layer)
            peak = before + chain.activation[layer] + max(saved, chain.forward_bytes[layer])
            change = held[layer]
        elif kind is FETCH:
            change = held[layer] = chain.activation[layer]
            peak = 0  # no more than is there afterwards
        else:
            change = -held.pop(layer)
            peak = 0  # to drop or to offload takes nothing; backward: below
        if made[layer] in restarted:
            checkpoints += change
        else:
            segment += change
        if kind in (DROP, OFFLOAD) and layer + 1 in saving:  # no more than a name is let go
            saved_inputs[layer + 1] = chain.activation[layer]
            segment += chain.activation[layer]
        if kind is BACKWARD:
            peak = before + chain.backward_bytes[layer]
            if layer == chain.depth and not chain.gradient_given:  # the loss makes the first gradient
                peak = before + max(chain.loss_bytes, chain.gradient[layer] + chain.backward_bytes[layer])
            kept += 0 if chain.streaming else chain.parameter_gradients[layer]
            passed = chain.gradient[layer - 1] if layer > 1 else 0
            saving.discard(layer)
            segment -= saved_inputs.pop(layer, 0)
        alive = checkpoints + segment + kept + passed + moving
        moments.append(
            Moment(
                action,
                chain.parameters,
                chain.optimizer,
                chain.accumulated + chain.communication + kept + passed,
                checkpoints,
                segment + moving,
                max(peak - alive, 0) + chain.small,
            )
        )
    return moments


def _moving(schedule: Iterable[Action], activation: Sequence[int]) -> Iterator[int]:
    """Bytes that are on their way out of memory, or back ahead of need, after each action: see `npnet.transfers`."""
    out: list[int] = []
    leaving = ahead = 0  # layers; 0 is none, and A_0 = 0
    for kind, layer in schedule:
        if kind is OFFLOAD:
            out.append(layer)
            leaving = layer
        elif kind is FETCH:
            out.remove(layer)
            leaving, ahead = 0, 0 if ahead == layer else ahead
            if out and not ahead:
                ahead = out[-1]
        yield activation[leaving] + activation[ahead]


def _restarted(schedule: Schedule) -> set[int]:
    """The indices of forward actions whose activation is a checkpoint: the next layer is run from it more than once."""
    made: dict[int, int] = {}
    runs: dict[int, int] = {}
    restarted = set()
    for i, (kind, layer) in enumerate(schedule):
        if kind is not FORWARD:
            continue
        made[layer], runs[layer] = i, 0
        if layer > 1:
            runs[layer - 1] += 1
            if runs[layer - 1] > 1:
                restarted.add(made[layer - 1])
    return restarted


def check_saves(layers: Sequence[Layer], schedule: Schedule) -> None:
    """Refuse a schedule that does not name the layers that need what they save (see `npnet.layer.needs_saved`).

    Raises:
        ValueError: it does not.
    """
    unsaved = needs_saved(layers) - schedule.needs_saved
    if unsaved:
        first = min(unsaved)
        raise ValueError(f"layer {first} ({layers[first - 1]}) needs what it saved: make the schedule with needs_saved")
