"""On a device, what a plan predicts is what its pool hands out: on the guard with CuPy's pool beside it."""

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import npnet
from npnet import chain_costs, pricing, schedules
from npnet.backend import ones
from npnet.checkpoint import checkpoint
from npnet.schedule import BACKWARD
from npnet.step import accumulated_step
from tests.pool import Device, counted_device
from tests.scenarios import fresh_registry as fresh_registry
from tests.test_schedules import valid_actions

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
        assert measured >= 0.99 * plan.peak_bytes - plan.chain.small, (plan.row(), measured)


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


OFFLOADED = [(1, None), (1, 1), (1, 5), (2, None), (3, 2), (4, None)]


@pytest.mark.parametrize(("n", "most"), OFFLOADED)
@pytest.mark.parametrize("features", [7, 128])
def test_what_is_on_its_way_out_and_back_is_counted(features: int, n: int, most: int | None) -> None:
    case = Case(
        npnet.mlp([features] * 16, rng=0, backend="cupy"), features, features, 2000, npnet.Quadratic, OPTIMIZERS[0]
    )
    case.check(case.plan(strategy=schedules.offloaded(15, n, most)))


@given(valid_actions(), st.integers(0, 2**16))
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_schedule_moves_its_peak_is_the_one_predicted(given_list: Any, seed: int) -> None:
    actions, depth = given_list
    sizes = np.random.default_rng(seed).integers(1, 90, depth + 1).tolist()
    model = npnet.mlp(sizes, "tanh", rng=0, backend="cupy")
    case = Case(model, sizes[0], sizes[-1], 600, npnet.Quadratic, OPTIMIZERS[0])
    case.check(case.plan(strategy=npnet.Schedule(actions, depth)))


@pytest.mark.parametrize(("sizes", "binding"), [([9, 3, 3, 80, 80, 80], 5), ([9, 80, 80, 80, 3, 3, 3], 3)])
def test_without_what_is_on_its_way_more_would_be_taken_than_predicted(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], binding: int
) -> None:
    """The peak is at the turn, when a_3 is on its way out; or in backward 3, when a_1 is on its way back."""
    model = npnet.mlp(sizes, "tanh", rng=0, backend="cupy")
    case = Case(model, sizes[0], sizes[-1], 2000, npnet.Quadratic, OPTIMIZERS[0])
    plan = case.plan(strategy="offload")
    case.check(plan)
    assert plan.binding.action == (BACKWARD, binding)
    monkeypatch.setattr(pricing, "_moving", lambda schedule, chain: repeat(0, len(schedule)))
    assert case.measured(plan.schedule) > 1.1 * case.plan(strategy="offload").peak_bytes


def test_a_budget_for_offloading_is_kept_to(device: Device) -> None:
    case = Case(npnet.mlp([64] * 20, rng=0, backend="cupy"), 64, 64, 2000, npnet.Quadratic, OPTIMIZERS[0])
    plain, least = case.plan(), case.plan(strategy="offload")
    for share in (0.0, 0.3, 0.7):
        budget = least.peak_bytes + int(share * (plain.peak_bytes - least.peak_bytes))
        plan = case.plan(strategy="offload", memory_budget=budget)
        case.check(plan)
        there = plan.chain.parameters + plan.chain.optimizer
        with npnet.limit_memory(budget - there, "cupy"):
            case.step(plan.schedule)
        with npnet.limit_memory(int(0.97 * plan.peak_bytes) - there, "cupy"), pytest.raises(npnet.OutOfMemory):
            case.step(plan.schedule)
        assert not device.streams.astray


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
    for strategy in ("none", "sqrt", "offload"):
        plan = case.plan(strategy=strategy)
        assert case.measured(plan.schedule) <= plan.peak_bytes


def test_accumulated_gradients_are_counted_in_blocks_too() -> None:
    case = Case(npnet.mlp([9] * 30, rng=0, backend="cupy"), 9, 9, 100, npnet.Quadratic, OPTIMIZERS[1])
    plan = case.plan(accumulation_steps=3)
    batches = [(case.x, case.y)] * 3
    step = case.model, case.loss, case.optimizer, plan.schedule, batches, 300
    peak = npnet.measure_peak(lambda: accumulated_step(*step), backend="cupy").increase_bytes
    measured = peak + plan.chain.parameters + plan.chain.optimizer
    assert 0.99 * plan.peak_bytes - plan.chain.small <= measured <= plan.peak_bytes


def test_on_numpy_nothing_is_rounded() -> None:
    for dtype in (np.float32, np.float64):
        host, there = (npnet.mlp([9] * 9, rng=0, dtype=dtype, backend=name) for name in ("numpy", "cupy"))
        exact, blocks = npnet.plan(host, 10).chain, npnet.plan(there, 10).chain
        assert exact.parameters == sum(parameter.value.nbytes for parameter in host.parameters())
        assert exact.small == 0 < blocks.small
        assert not exact.overlapping
        assert blocks.overlapping
        assert set(exact.activation[1:]) == {90 * np.dtype(dtype).itemsize}
        assert blocks.activation[1:] == [512 * -(-90 * np.dtype(dtype).itemsize // 512)] * 8
        assert exact.step_flops == blocks.step_flops


def test_without_the_rounding_a_thin_network_would_take_more_than_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(npnet.mlp([30] * 50, rng=0, backend="cupy"), 30, 30, 3, npnet.Quadratic, OPTIMIZERS[1])
    measured = case.measured(case.plan().schedule)
    assert measured <= case.plan().peak_bytes
    monkeypatch.setattr(chain_costs, "block_bytes", lambda array: 1)
    assert measured > 1.1 * case.plan().peak_bytes
