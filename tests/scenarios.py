"""What npnet does with arrays, each as a function of the backend's name that returns all numbers it came to."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import backend as registry
from npnet import schedules
from npnet.activations import ACTIVATIONS
from npnet.checkpoint import checkpoint
from npnet.layer import needs_saved
from npnet.losses import LOSSES
from npnet.random import one_step
from tests.guard import GuardModule, install_guard

SIZES = [5, 4, 6, 4, 3, 4, 3]
OPTIMIZERS: dict[str, Callable[[], npnet.Optimizer]] = {
    "sgd": lambda: npnet.SGD(0.5),
    "momentum": lambda: npnet.SGD(0.1, momentum=0.9),
    "adam": lambda: npnet.Adam(0.01),
}


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test of a file that imports this sees, or leaves behind, a backend loaded or chosen by another."""
    for name in ("_loaders", "_loaded", "_by_type"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    monkeypatch.setattr(registry, "_current", None)
    monkeypatch.delenv("NPNET_BACKEND", raising=False)


@pytest.fixture(name="xp")
def guard_module() -> Iterator[GuardModule]:
    """The guard, installed as a backend."""
    with install_guard() as module:
        yield module


def batch(backend: str, samples: int = 8, dtype: Any = np.float64) -> tuple[Any, Any]:
    """Rows x, and one-hot rows y, on ``backend``."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((samples, SIZES[0])).astype(dtype)
    y = np.eye(SIZES[-1], dtype=dtype)[rng.integers(SIZES[-1], size=samples)]
    return npnet.to_backend(x, backend), npnet.to_backend(y, backend)


def network(backend: str | None, *args: Any, **options: Any) -> npnet.NetworkWithCheckpointing:
    return npnet.NetworkWithCheckpointing(SIZES, *args, rng=0, backend=backend, **options)


def parameters(net: npnet.Network) -> list[Any]:
    return [*net.weights, *net.biases]


def steps(backend: str, *args: Any, **options: Any) -> list[Any]:
    net = network(backend, *args, **options)
    for _ in range(3):
        net.update_mini_batch(batch(backend, dtype=net.dtype), 3.0)
    return parameters(net)


def finite_differences(backend: str) -> list[Any]:
    """A weight lent out, changed in place, kept while the network goes on, and handed to another network."""
    net, other = network(backend), network(backend)
    net.weights[0][0, 0] += 0.25
    net.biases[1][2, 0] -= 0.5
    before = net.weights
    net.update_mini_batch(batch(backend), 3.0)
    other.weights, other.biases = before, net.biases
    other.biases[0] = other.biases[0] * 2.0
    other.update_mini_batch(batch(backend), 3.0)
    return [*before, *parameters(net), *parameters(other)]


def predictions(backend: str) -> list[Any]:
    net, (x, y) = network(backend), batch(backend, 1030)  # more than evaluate runs at a time
    return [net.feedforward(x), net.evaluate((x, y)), *net.forward_between_checkpoints(x.T, 0, 3)]


def gradients(backend: str) -> list[Any]:
    x, y = batch(backend)
    nabla_b, nabla_w = network(backend, 2).backprop(x.T, y.T)
    return [*nabla_b, *nabla_w]


def sgd(backend: str) -> list[Any]:
    net, data = network(backend, 3), batch(backend, 20)
    net.SGD(data, 2, 6, 3.0, test_data=data)
    return parameters(net)


class CrossEntropy(npnet.NetworkWithCheckpointing):
    """What students write: another cost, and the gradient taken in their own hands."""

    def cost_derivative(self, output_activations: Any, y: Any) -> Any:
        return (output_activations - y) / (output_activations * (1 - output_activations))

    def backprop(self, x: Any, y: Any) -> Any:
        nabla_b, nabla_w = super().backprop(x, y)
        return [2.0 * nabla for nabla in nabla_b], nabla_w


def subclass(backend: str) -> list[Any]:
    net = CrossEntropy(SIZES, 2, rng=0, backend=backend)
    net.update_mini_batch(batch(backend), 0.5)
    return parameters(net)


def chain(backend: str, activation: str, loss: str, optimizer: str) -> list[Any]:
    """Three steps of an MLP on two batches each: losses and parameters."""
    model = npnet.mlp([5, 4, 4, 3], activation, activation, rng=0, backend=backend)
    x, y = batch(backend, dtype=np.float32)
    criterion, descent, values = LOSSES[loss](), OPTIMIZERS[optimizer](), []

    def output_gradient(output: Any) -> Any:
        value, gradient = criterion.value_and_gradient(output, y)
        values.append(value)
        return gradient

    run = partial(npnet.backpropagate, model.layers, schedules.every_nth(3, 2), x, output_gradient)
    for _ in range(3):
        run()
        run(after_backward=lambda layer: descent.step(layer.parameters()))
    return [*values, *(parameter.value for parameter in model.parameters())]


def layers_alone(backend: str) -> list[Any]:
    """The layers as functions: forward, backward and predict, each activation also outside a dense layer."""
    x, y = batch(backend, dtype=np.float32)
    model = npnet.Sequential(*(cls() for cls in ACTIVATIONS.values()), npnet.Dense(5, 3, rng=0, backend=backend))
    output, saved = model.forward(x)
    loss = npnet.SoftmaxCrossEntropy()
    loss.check_targets(y, 3)
    dx = model.backward(loss.value_and_gradient(output, y)[1], saved)
    return [x, output, dx, loss(output, y), model.predict(x), *(p.gradient for p in model.parameters())]


def blocks(backend: str, half: bool) -> list[Any]:
    """A composed model, partly checkpointed, trained with accumulation, clipping, and a scaler where it is half."""
    inner = npnet.Sequential(npnet.Linear(4, 4, rng=1, backend=backend), npnet.GELU("tanh"), npnet.Dropout(0.3, rng=2))
    model = npnet.Sequential(
        npnet.Linear(5, 4, rng=0, backend=backend),
        npnet.LayerNorm(4, backend=backend),
        checkpoint(npnet.Residual(inner), determinism_check=True),
        npnet.Dense(4, 3, "softmax" if half else "tanh", rng=3, backend=backend),
    )
    if half:
        model = npnet.mixed_precision(model, half_products=False)
    x, y = batch(backend, dtype=np.float32)
    scaler = npnet.GradScaler(2.0**10) if half else None
    schedule = schedules.every_nth(4, 2, needs_saved=needs_saved(model.layers))
    values = []
    for step in range(3):
        with one_step(step):
            value = npnet.accumulated_step(
                model,
                npnet.MeanSquaredError(),
                npnet.Adam(0.1, weight_decay=0.01),
                schedule,
                [(x[:4], y[:4]), (x[4:], y[4:])],
                len(x),
                clip_norm=0.5,
                scaler=scaler,
            )
        values.append(value)
    return [*values, model.eval().predict(x), *(parameter.value for parameter in model.parameters())]


class Center(npnet.Layer):
    """A layer of one's own with state: y = x - (the running mean of x)."""

    def __init__(self, features: int, backend: str) -> None:
        self.mean = npnet.Buffer(npnet.to_backend(np.zeros(features, np.float32), backend))
        self.steps = npnet.Buffer(0)

    def forward(self, x: Any) -> Any:
        if self.training:
            self.mean.update(lambda mean: mean * np.float32(0.9) + x.mean(axis=0) * np.float32(0.1))
            self.steps.update(lambda steps: steps + 1)
        return x - self.mean.value, None

    def backward(self, dy: Any, saved: Any) -> Any:
        return dy.copy()


def own(backend: str) -> list[Any]:
    """Layers with state, and one layer in two places, trained, saved as a state, and put back."""
    shared = npnet.Linear(4, 4, rng=1, backend=backend)
    model = npnet.Sequential(
        npnet.Linear(5, 4, rng=0, backend=backend),
        Center(4, backend),
        shared,
        checkpoint(Center(4, backend)),
        shared,
        npnet.Dense(4, 3, "tanh", rng=3, backend=backend),
    )
    x, y = batch(backend, dtype=np.float32)
    loss, optimizer = npnet.MeanSquaredError(), npnet.Adam(0.1)
    values = [npnet.train_step(model, loss, optimizer, x, y, schedule="sqrt") for _ in range(3)]
    state = model.state_dict()
    assert all(type(each) is np.ndarray for each in state.values())
    npnet.train_step(model, loss, optimizer, x, y)
    model.load_state_dict(state)
    assert int(npnet.to_host(model.named_buffers()["1.steps"].value)) == 3
    arrays = [each.value for name, each in model.named_arrays().items() if not name.endswith("steps")]
    return [*values, model.predict(x), *arrays]


def curvature(backend: str) -> list[Any]:
    model = npnet.mlp([5, 4, 3], "tanh", rng=0, dtype=np.float64, backend=backend)
    model.layers.insert(1, npnet.LayerNorm(4, dtype=np.float64, backend=backend))
    x, y = batch(backend)
    _, gradient = npnet.value_and_grad(model, npnet.SoftmaxCrossEntropy(), x, y)
    found = npnet.hessian_vector_product(model, npnet.SoftmaxCrossEntropy(), x, y, gradient)
    return [found.value, *found.gradient.values(), *found.product.values()]


def complaint(backend: str, wrong: str) -> list[str]:
    """The whole text of an error: on the way to it come computations that no correct run makes."""
    net, (x, y) = network(backend), batch(backend)
    if wrong == "nan":
        x[3, 2] = float("nan")
    elif wrong == "not one-hot":
        y[5] = 1.0
    elif wrong == "diverged":
        y[0, 0] = 1e200
    else:
        y[1, 2] = 0.25
    try:
        if wrong == "no probabilities":
            npnet.SoftmaxCrossEntropy().check_targets(y, 3)
        net.SGD((x, y), 1, 4, 3.0, test_data=(x, y) if wrong == "not one-hot" else None)
    except (ValueError, npnet.TrainingDiverged) as error:
        return [str(error)]
    raise AssertionError("nothing was refused")


STEPS: dict[str, Callable[[str], list[Any]]] = {
    "plain": steps,
    **{f"every {n}": partial(steps, checkpoint_every_nth_layer=n) for n in (1, 2, 3, 4, 5, 6, 9)},
    "sqrt": partial(steps, schedule="sqrt"),
    "float32": partial(steps, checkpoint_every_nth_layer=2, dtype=np.float32),
}
CHAINS: dict[str, Callable[[str], list[Any]]] = {
    "-".join(names): partial(chain, activation=names[0], loss=names[1], optimizer=names[2])
    for names in product(ACTIVATIONS, LOSSES, OPTIMIZERS)
}
OTHERS: dict[str, Callable[[str], list[Any]]] = {
    **{f.__name__: f for f in (finite_differences, predictions, gradients, sgd, subclass, layers_alone)},
    "blocks": partial(blocks, half=False),
    "blocks-half": partial(blocks, half=True),
    "own": own,
    "curvature": curvature,
    **{w: partial(complaint, wrong=w) for w in ("nan", "not one-hot", "diverged", "no probabilities")},
}
SCENARIOS = STEPS | CHAINS | OTHERS
