"""Training steps, the loop, and the exercise's networks, called with arguments that are right."""

import contextlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np

import npnet
from tests.api_calls import BATCH, DY, EVERY, LOSS, MODEL, NETWORK, PAIR, SGD, X64, Y64, X, call, values


def backpropagated(layers: Any, schedule: Any, x: Any, output_gradient: Any, **options: Any) -> Any:
    """The gradient at x, and all others."""
    dx = npnet.backpropagate(layers, schedule, x, output_gradient, **options)
    return [dx, *(parameter.gradient for layer in layers for parameter in layer.parameters())]


def after(step: Callable[..., Any]) -> Callable[..., Any]:
    """What it returns, and the parameters afterwards."""

    def wrapped(model: Any, **options: Any) -> Any:
        return [step(model, **options), *values(model)]

    return wrapped


def fitted(model: Any, **options: Any) -> Any:
    """Losses and parameters after training."""
    with contextlib.redirect_stderr(io.StringIO()):
        history = npnet.fit(model, **options)
    return [[(epoch.loss, epoch.accuracy or 0.0) for epoch in history.epochs], *values(model)]


PASS = {"layers": MODEL.layers, "schedule": EVERY, "x": X, "output_gradient": lambda output: np.ones_like(output)}
call(
    "backpropagate",
    backpropagated,
    **PASS,
    needs_dx=True,
    determinism_check=True,
)
call(
    "backpropagate [callbacks]",
    backpropagated,
    **PASS,
    after_backward=None,
    restore=None,
)
call(
    "backpropagate [gradient]",
    lambda dy: backpropagated(_copied().layers, EVERY, X, lambda _: np.copy(dy) if isinstance(dy, np.ndarray) else dy),
    dy=DY,
)
STEP = {"model": MODEL, "loss": LOSS}
call("add_gradients", npnet.add_gradients, **STEP, **BATCH, weight=0.5, schedule=EVERY, after_backward=None)
call("value_and_grad", npnet.value_and_grad, **STEP, **BATCH, schedule="sqrt", determinism_check=False)
call("train_step", after(npnet.train_step), **STEP, optimizer=SGD, schedule=EVERY, **BATCH, clip_norm=1.0)
call(
    "CapturedStep",
    after(lambda model, x, y, **options: npnet.CapturedStep(model, **options)(x, y)),
    **STEP,
    optimizer=SGD,
    schedule=EVERY,
    **BATCH,
)
call(
    "CapturedStep.listing",
    lambda x, y: npnet.CapturedStep(_copied(), LOSS, SGD, EVERY).listing(x, y).count("dot"),
    **BATCH,
)
call("train_step [float64 targets]", after(npnet.train_step), **STEP, optimizer=SGD, schedule=EVERY, x=X, y=Y64)
call(
    "accumulated_step",
    after(npnet.accumulated_step),
    **STEP,
    optimizer=npnet.Adam(),
    schedule=EVERY,
    micro_batches=[PAIR, PAIR],
    samples=12,
    clip_norm=None,
    scaler=npnet.GradScaler(2.0),
    determinism_check=False,
)
call(
    "accumulated_step [pair]",
    lambda pair: after(npnet.accumulated_step)(
        _copied(), loss=LOSS, optimizer=SGD, schedule=EVERY, micro_batches=[PAIR, pair], samples=12
    ),
    pair=PAIR,
)
call(
    "lazy_gradient",
    npnet.lazy_gradient,
    before=npnet.mlp([3, 4], "tanh", rng=0),
    after=npnet.mlp([4, 2], rng=0),
    loss=LOSS,
    **BATCH,
    after_backward=None,
)
FIT = {"model": MODEL, "training_data": PAIR, "loss": LOSS, "epochs": 1, "batch_size": 2}
call(
    "fit",
    fitted,
    **FIT,
    optimizer=npnet.SGD(0.1),
    schedule="sqrt",
    test_data=PAIR,
    rng=0,
    shuffle=True,
    decay=True,
    accumulation_steps=2,
    clip_norm=1.0,
    scaler=None,
    log=False,
)
call(
    "fit [budget]",
    fitted,
    **FIT,
    optimizer=npnet.SGD(0.1),
    memory_budget="1 MB",
    determinism_check=True,
    history=npnet.History(),
    show={"peak": "1 MB"},
    log=True,
)
call("fit [offload]", fitted, **FIT, optimizer=npnet.SGD(0.1), offload="disk", log=False)
call(
    "fit [streaming]",
    fitted,
    **FIT,
    optimizer=npnet.SGD(0.1),
    streaming=True,
    capture=True,
    saver=None,
    transform=None,
    log=False,
)


def _copied() -> Any:
    return npnet.mlp([3, 4, 4, 2], "tanh", rng=0)


# Networks.

QUIET = np.errstate(all="ignore")  # what is arithmetic alone leaves NumPy's warnings to the caller
NETWORK_OPTIONS = {"sizes": [3, 4, 2], "dtype": np.float32, "rng": 0, "backend": "numpy"}
call("Network", lambda **o: values(npnet.Network(**o)), **NETWORK_OPTIONS)
call(
    "NetworkWithCheckpointing",
    lambda **o: values(npnet.NetworkWithCheckpointing(**o)),
    checkpoint_every_nth_layer=2,
    **NETWORK_OPTIONS,
)
call(
    "NetworkWithCheckpointing [schedule]",
    lambda **o: values(npnet.NetworkWithCheckpointing([3, 4, 4, 2], rng=0, **o)),
    schedule=EVERY,
    memory_budget=None,
)


def network_call(name: str, method: Callable[..., Any], /, **good: Any) -> None:
    """A call of a method of both kinds of network."""
    for kind in (npnet.Network, npnet.NetworkWithCheckpointing):
        network = kind([3, 4, 4, 2], rng=0)
        call(f"{kind.__name__}.{name}", method, self_=network, **good)


network_call("feedforward", lambda self_, a: self_.feedforward(a), a=X64)
network_call("evaluate", lambda self_, test_data: self_.evaluate(test_data), test_data=(X64, Y64))
network_call("cost_derivative", QUIET(lambda self_, **o: self_.cost_derivative(**o)), output_activations=Y64.T, y=Y64.T)
network_call("backprop", lambda self_, x, y: self_.backprop(x, y), x=X64.T, y=Y64.T)
network_call(
    "update_mini_batch",
    lambda self_, **o: [self_.update_mini_batch(**o), *values(self_)],
    mini_batch=(X64, Y64),
    eta=0.5,
)
network_call(
    "SGD",
    lambda self_, **o: [_printing(self_.SGD, **o), *values(self_)],
    training_data=(X64, Y64),
    epochs=1,
    mini_batch_size=2,
    eta=0.5,
    test_data=(X64, Y64),
    log=True,
)


def _printing(function: Callable[..., Any], **options: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return function(**options)


def assigned(network: Any, name: str, value: Any) -> Any:
    """The parameters after an assignment."""
    setattr(network, name, value)
    return values(network)


def replaced(network: Any, name: str, index: Any, value: Any) -> Any:
    """The parameters after an assignment to one place of the list."""
    getattr(network, name)[index] = value
    return values(network)


WEIGHTS, BIASES = ([2 * array for array in getattr(NETWORK, name)] for name in ("weights", "biases"))
network_call("weights", lambda self_, value: assigned(self_, "weights", value), value=WEIGHTS)
network_call("biases", lambda self_, value: assigned(self_, "biases", value), value=BIASES)
network_call("weights [one]", lambda self_, **o: replaced(self_, "weights", **o), index=1, value=WEIGHTS[1])
network_call("biases [one]", lambda self_, **o: replaced(self_, "biases", **o), index=1, value=BIASES[1])
for name, good in (("memory_budget", "1 MB"), ("checkpoint_every_nth_layer", 2)):
    call(
        f"NetworkWithCheckpointing.{name}",
        lambda self_, value, name=name: assigned(self_, name, value),
        self_=NETWORK,
        value=good,
    )
call(
    "NetworkWithCheckpointing.forward_between_checkpoints",
    QUIET(lambda self_, **o: self_.forward_between_checkpoints(**o)),
    self_=NETWORK,
    a=X64.T,
    checkpoint_idx_start=0,
    layer_idx_end=2,
)
