"""What each layer of a network costs for one batch, asked of the layers (`npnet.layer.Layer.cost`): a `Chain`."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from npnet.checks import check_flag, check_kind, check_whole, shown
from npnet.layer import Layer, LayerCost, costs_of, needs_saved
from npnet.losses import Loss
from npnet.model_tree import completed_after
from npnet.optimizers import Optimizer
from npnet.parameter import Parameter
from npnet.pools import block_bytes, in_blocks
from npnet.pricing import Chain

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
    network = chain_in(network)
    layers, features, dtype = input_of(network, features)
    if loss is not None:
        check_kind(loss, Loss, "loss", "npnet.SoftmaxCrossEntropy()")
    if optimizer is not None:
        check_kind(optimizer, Optimizer, "optimizer", "npnet.Adam(1e-3)")
    streaming = check_flag(streaming, "streaming")
    accumulating = check_whole(accumulation_steps, "accumulation_steps", least=1) > 1
    held = [each.value for each in dict.fromkeys(each for layer in layers for each in layer.parameters())]
    buffers = [each.value for each in dict.fromkeys(each for layer in layers for each in layer.buffers())]
    block = block_bytes(held[0]) if held else 1
    asked = zip(layers, costs_of(layers, (batch_size, features), dtype, needs_dx=False), strict=True)
    costs = [_in_blocks(cost, layer, block) for layer, cost in asked]
    flops = sum(cost.forward_flops + cost.backward_flops for cost in costs)
    if flops > MOST_FLOPS:
        raise ValueError(f"batch_size: {batch_size} samples take {flops:.3g} flops a step; plan for a smaller batch")
    loss_arrays = getattr(network, "loss_arrays", 1) if loss is None else loss.loss_arrays
    outputs, gradients = [0, *(cost.output_bytes for cost in costs)], [0, *(cost.dy_bytes for cost in costs)]
    parameters, in_buffers = (sum(in_blocks(array.nbytes, block) for array in arrays) for arrays in (held, buffers))
    saved = [0, *(0 if layer.output_suffices else cost.saved_bytes for layer, cost in zip(layers, costs, strict=True))]
    backward = [0, *(cost.backward_bytes for cost in costs)]
    sizes = [max((in_blocks(each.value.nbytes, block) for each in layer.parameters()), default=0) for layer in layers]
    decays = optimizer is not None and optimizer.weight_decay > 0  # that takes an array of the parameter's size
    waiting = _waiting(layers, costs, streaming, block) if not accumulating else None
    for number, cost in enumerate(costs, 1):
        if streaming or number == 1:  # the update, when a_l, what was saved, and the gradient at a_l are gone
            update = 0 if not decays else sizes[number - 1] if streaming and waiting is None else max(sizes)
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
        parameters=parameters + 2 * in_buffers,  # a buffer's new value waits for the end of the step
        optimizer=len(optimizer.state_names) * parameters if optimizer else 0,
        accumulated=parameters if accumulating else 0,
        communication=sum(in_blocks(size, block) for size in buffer_bytes(layers)) if communicating else 0,
        small=0 if block == 1 else _small_bytes(batch_size, max(cost.output_shape[1] for cost in costs), dtype),
        overlapping=block > 1,
        waiting=waiting,
    )


def _waiting(layers: Sequence[Layer], costs: Sequence[LayerCost], streaming: bool, block: int) -> list[int] | None:
    """`Chain.kept` of a chain whose layers share parameters; None if they do not."""
    completed = completed_after(layers)
    if completed is None:
        return None
    alive: dict[Parameter, int] = {}
    kept = [0] * (len(layers) + 1)
    for number in reversed(range(len(layers))):
        if costs[number].gradient_bytes:
            alive |= {each: in_blocks(each.value.nbytes, block) for each in layers[number].parameters()}
        for layer in completed[number] if streaming else ():
            for each in layer.parameters():
                alive.pop(each, None)
        kept[number + 1] = sum(alive.values())
    return kept


def chain_in(network: HasLayers) -> HasLayers:
    """What is planned of ``network``: of a lab's network, whose attributes are the student's, the chain inside."""
    chain = getattr(network, "_npnet", None)
    return network if chain is None else chain.ready(network)


def input_of(network: HasLayers, features: int | None = None) -> tuple[Sequence[Layer], int, np.dtype[Any]]:
    """The chain of ``network``, how many features its input has, and its dtype.

    Raises:
        TypeError: not a network.
        ValueError: no layer tells the number of features, and ``features`` does not either.
    """
    layers = getattr(chain_in(network), "layers", None)
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
