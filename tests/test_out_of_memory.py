"""Memory that runs out in a step, in whatever pass of whatever layer: nothing was updated."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import (
    SGD,
    Adam,
    GradScaler,
    Network,
    NetworkWithCheckpointing,
    Optimizer,
    OutOfMemory,
)
from tests.exhausting import STEPS, Exhausting, X, Y, deep, first_update, state


@pytest.mark.parametrize("make", [lambda: Adam(weight_decay=0.1), lambda: SGD(0.1, momentum=0.9)])
@pytest.mark.parametrize("name", STEPS)
def test_in_each_pass_of_each_layer(name: str, make: Callable[[], Optimizer]) -> None:
    calls = first_update(name)
    assert calls >= 18
    if name in ("fit", "fit, checkpointed", "fit, accumulated"):
        assert calls > 27  # each layer's backward pass of the rehearsal, and the forward pass of the step
    npnet.set_seed(0)
    for call in range(1, calls):
        model, optimizer, scaler = deep(), make(), GradScaler()
        before = state(model, optimizer, scaler.state_dict(), optimizer.learning_rate)
        Exhausting.at(call)
        with pytest.raises(OutOfMemory, match=r"memory ran out in a step .*Out of memory allocating 1,024 bytes\)"):
            STEPS[name](model, optimizer, scaler)
        assert len(Exhausting.calls) == call
        assert state(model, optimizer, scaler.state_dict(), optimizer.learning_rate) == before, call
        assert model.training


@pytest.mark.parametrize("name", ["fit", "fit, not streaming", "fit, clipped", "fit, scaled"])
def test_in_what_the_optimizer_allocates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the last of the layers that it comes to."""
    Exhausting.at(-1)
    zeros, made = np.zeros_like, []
    for at in range(1, 21, 4):
        model, optimizer, scaler = deep(), Adam(), GradScaler()
        parameters = {each.value.shape for each in model.parameters()}
        before, made = state(model, optimizer, scaler.state_dict()), []

        def exhausted(array: Any, *given: Any, made: Any = made, parameters: Any = parameters, at: int = at) -> Any:
            if array.shape in parameters:
                made.append(None)
                if len(made) == at:
                    raise MemoryError
            return zeros(array, *given)

        monkeypatch.setattr(np, "zeros_like", exhausted)
        with pytest.raises(OutOfMemory):
            STEPS[name](model, optimizer, scaler)
        assert state(model, optimizer, scaler.state_dict()) == before


def test_without_a_rehearsal_layers_are_updated_and_others_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr("npnet.training.rehearse", lambda *_, **__: None)
    model, optimizer = deep(), Adam()
    before = state(model, optimizer)
    Exhausting.at(15)
    with pytest.raises(OutOfMemory):
        STEPS["fit"](model, optimizer, GradScaler())
    assert state(model, optimizer) != before


def test_after_it_a_training_gives_what_it_gives_without() -> None:
    results = []
    for calls in ([-1], [3, 12, 25, -1]):
        npnet.set_seed(0)
        npnet.random.set_next_step(0)
        model, optimizer = deep(), Adam()
        for call in calls:
            npnet.random.set_next_step(0)
            Exhausting.at(call)
            if call > 0:
                with pytest.raises(OutOfMemory):
                    STEPS["fit"](model, optimizer, GradScaler())
            else:
                STEPS["fit"](model, optimizer, GradScaler())
        results.append(state(model, optimizer))
    assert results[0] == results[1]


# The lab's networks.


def networks(rng: int = 0) -> list[Network]:
    sizes = [20, *[16] * 8, 3]
    found: list[Network] = [Network(sizes, rng=rng), NetworkWithCheckpointing(sizes, 3, rng=rng)]
    for network in found:
        for layer in network.layers:
            layer.__class__ = Exhausting
    return found


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("lent", [False, True])
def test_update_mini_batch_in_each_pass_of_each_layer(which: int, lent: bool) -> None:
    batch = X.astype(np.float64), Y.astype(np.float64)
    for call in range(1, 27 + 6 * which):
        network = networks()[which]
        weights = network.weights if lent else []
        before, held = state(network), [weight.copy() for weight in weights]
        Exhausting.at(call)
        with pytest.raises(OutOfMemory, match=r"npnet\.plan finds|take a smaller batch"):
            network.update_mini_batch(batch, 0.5)
        assert state(network) == before
        assert all(map(np.array_equal, weights, held))
        Exhausting.at(-1)
        reference = networks()[which]
        for each in (network, reference):
            each.update_mini_batch(batch, 0.5)
        assert state(network) == state(reference)
        assert all(map(np.array_equal, weights, held))


class Uncopiable(np.ndarray):
    """Weights that there is no room to copy."""

    refused = False

    def copy(self, order: Any = "C") -> Any:
        if Uncopiable.refused:
            raise MemoryError
        return np.array(self, order=order)


@pytest.mark.parametrize("used_before", [False, True])
def test_lent_weights_that_cannot_be_copied(used_before: bool) -> None:
    """Lent before the first batch, or after many: the copy that the update of the first layer needs comes last."""
    batch = X.astype(np.float64), Y.astype(np.float64)
    network = Network([20, 16, 16, 3], rng=0)
    if used_before:
        network.update_mini_batch(batch, 0.5)
    first = network.layers[0].weight
    weights = network.weights
    first.value = first.value.view(Uncopiable)
    before = state(network)
    Uncopiable.refused = True
    try:
        with pytest.raises(OutOfMemory):
            network.update_mini_batch(batch, 0.5)
        assert state(network) == before
    finally:
        Uncopiable.refused = False
    network.update_mini_batch(batch, 0.5)
    assert state(network) != before
    assert np.array_equal(weights[2].tobytes(), before[0][4][1])
