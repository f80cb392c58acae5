"""On a device, what a plan predicts is what its pool hands out: on the guard with CuPy's pool beside it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import pricing
from npnet.backend import ones
from npnet.checkpoint import checkpoint
from npnet.step import accumulated_step
from tests.pool import Device, counted_device
from tests.scenarios import fresh_registry as fresh_registry

ACTIVATIONS = ["relu", "sigmoid", "tanh", "identity"]
LOSSES = [npnet.Quadratic, npnet.SoftmaxCrossEntropy, npnet.MeanSquaredError]
OPTIMIZERS = [lambda: npnet.SGD(0.0), lambda: npnet.SGD(0.0, momentum=0.9), lambda: npnet.Adam(0.0, weight_decay=0.1)]


@pytest.fixture(name="device", autouse=True)
def clean_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with counted_device(monkeypatch) as device:
        yield device


class Case:
    """A model on the device, and all that it takes to train it for a step."""

    def __init__(self, model: npnet.Sequential, inputs: int, outputs: int, batch: int, loss: Any, optimizer: Any):
        dtype = model.parameters()[0].value.dtype
        self.model, self.loss, self.optimizer = model, loss(), optimizer()
        x = np.random.default_rng(0).standard_normal((batch, inputs)).astype(dtype)
        self.x = npnet.to_backend(x, "cupy")
        self.y = npnet.to_backend(np.full((batch, outputs), 1 / outputs, dtype), "cupy")
        self.step(self.plan().schedule)  # the optimizer makes its state

    def plan(self, **options: Any) -> npnet.Plan:
        return npnet.plan(self.model, len(self.x), loss=self.loss, optimizer=self.optimizer, **options)

    def step(self, schedule: npnet.Schedule) -> None:
        npnet.train_step(self.model, self.loss, self.optimizer, schedule, self.x, self.y)

    def measured(self, schedule: npnet.Schedule) -> int:
        """The most that a step takes, parameters and the optimizer's state included."""
        ones.cache_clear()
        there = self.plan().chain
        peak = npnet.measure_peak(self.step, schedule, backend="cupy").increase_bytes
        return peak + there.parameters + there.optimizer

    def check(self, plan: npnet.Plan) -> None:
        measured = self.measured(plan.schedule)
        assert measured <= plan.peak_bytes, (plan.row(), measured)
        assert measured >= 0.99 * plan.peak_bytes - plan.chain.uncounted, (plan.row(), measured)


def dense(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 200, int(rng.integers(3, 30))).tolist()
    model = npnet.mlp(
        sizes, str(rng.choice(ACTIVATIONS)), dtype=rng.choice([np.float32, np.float64]), rng=0, backend="cupy"
    )
    choices = rng.choice(LOSSES), rng.choice(OPTIMIZERS)
    return Case(model, sizes[0], sizes[-1], int(rng.integers(1, 2000)), *choices)


@pytest.mark.parametrize("seed", range(10))
def test_the_predicted_peak_is_that_of_the_pool_whatever_the_network_and_the_strategy(seed: int) -> None:
    case = dense(seed)
    plain = case.plan()
    case.check(plain)
    for strategy in ("sqrt", "revolve", "offload"):
        case.check(case.plan(strategy=strategy))
    for share in (0.3, 0.6):
        budget = plain.chain.fixed + int(share * (plain.peak_bytes - plain.chain.fixed))
        try:
            case.check(case.plan(memory_budget=budget))
        except npnet.InfeasibleBudget as error:
            case.check(case.plan(memory_budget=error.smallest_bytes))


def block(features: int, seed: int) -> npnet.Layer:
    inner = npnet.Sequential(
        npnet.LayerNorm(features, backend="cupy"),
        npnet.Linear(features, features, rng=seed, backend="cupy"),
        npnet.GELU("tanh"),
        npnet.Dropout(0.1, rng=seed),
    )
    return npnet.Residual(inner)


def dense_layer(n: int, seed: int, outputs: int | None = None) -> npnet.Layer:
    return npnet.Dense(n, outputs or n, rng=seed, backend="cupy")


MODELS = {
    "blocks": lambda n: [block(n, 0), block(n, 1)],
    "checkpointed blocks": lambda n: [checkpoint(block(n, seed)) for seed in range(6)],
    "nested": lambda n: [
        npnet.Sequential(dense_layer(n, seed), npnet.Tanh(), dense_layer(n, seed)) for seed in range(5)
    ],
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("features", [3, 33, 300])
@pytest.mark.parametrize("name", MODELS)
def test_composed_models_and_half_precision_keep_to_what_is_predicted(name: str, features: int, half: bool) -> None:
    model = npnet.Sequential(*MODELS[name](features), dense_layer(features, 9, 7))
    if half:
        model = npnet.mixed_precision(model, half_products=False)
    case = Case(model, features, 7, 500, npnet.SoftmaxCrossEntropy, OPTIMIZERS[1])
    for strategy in ("none", "sqrt"):
        plan = case.plan(strategy=strategy)
        assert case.measured(plan.schedule) <= plan.peak_bytes


def test_accumulated_gradients_are_counted_in_blocks_too() -> None:
    case = Case(npnet.mlp([9] * 30, rng=0, backend="cupy"), 9, 9, 100, npnet.Quadratic, OPTIMIZERS[1])
    plan = case.plan(accumulation_steps=3)
    batches = [(case.x, case.y)] * 3
    step = case.model, case.loss, case.optimizer, plan.schedule, batches, 300
    peak = npnet.measure_peak(lambda: accumulated_step(*step), backend="cupy").increase_bytes
    measured = peak + plan.chain.parameters + plan.chain.optimizer
    assert 0.99 * plan.peak_bytes - plan.chain.uncounted <= measured <= plan.peak_bytes


def test_on_numpy_nothing_is_rounded() -> None:
    for dtype in (np.float32, np.float64):
        host, there = (npnet.mlp([9] * 9, rng=0, dtype=dtype, backend=name) for name in ("numpy", "cupy"))
        exact, blocks = npnet.plan(host, 10).chain, npnet.plan(there, 10).chain
        assert exact.parameters == sum(parameter.value.nbytes for parameter in host.parameters())
        assert exact.uncounted == 0 < blocks.uncounted
        assert set(exact.activation[1:]) == {90 * np.dtype(dtype).itemsize}
        assert blocks.activation[1:] == [512 * -(-90 * np.dtype(dtype).itemsize // 512)] * 8
        assert exact.step_flops == blocks.step_flops


def test_without_the_rounding_a_thin_network_would_take_more_than_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(npnet.mlp([30] * 50, rng=0, backend="cupy"), 30, 30, 3, npnet.Quadratic, OPTIMIZERS[1])
    measured = case.measured(case.plan().schedule)
    assert measured <= case.plan().peak_bytes
    monkeypatch.setattr(pricing, "block_bytes", lambda array: 1)
    assert measured > 1.1 * case.plan().peak_bytes
