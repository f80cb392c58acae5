"""A budget is a hard limit on a device: plain backpropagation runs out of memory where the planned schedule passes."""

import copy
import gc
import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import npnet
from npnet.cli import main
from npnet.optimal import smallest_budget
from tests.pool import Device, counted_device
from tests.scenarios import fresh_registry as fresh_registry

SIZES = [20, *[64] * 20, 10]
RNG = np.random.default_rng(0)
X = RNG.standard_normal((900, 20)).astype(np.float32)
Y = np.eye(10, dtype=np.float32)[RNG.integers(10, size=900)]


@pytest.fixture(name="device", autouse=True)
def clean_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with counted_device(monkeypatch) as device:
        yield device
        gc.collect()
        assert not device.dangling
        assert not device.hooks
        assert device.allocators == [device.default.malloc]


def data(backend: str = "cupy") -> Any:
    return npnet.to_backend(X, backend), npnet.to_backend(Y, backend)


def values(model: Any) -> list[np.ndarray]:
    return [npnet.to_host(each.value).copy() for each in model.named_parameters().values()]


def same(these: list[np.ndarray], those: list[np.ndarray]) -> bool:
    return all(map(np.array_equal, these, those))


# In the lab's hands.


def lab_step(backend: str, **options: Any) -> list[np.ndarray]:
    network = npnet.NetworkWithCheckpointing(SIZES, rng=0, backend=backend, dtype=np.float32, **options)
    network.update_mini_batch(data(backend), 3.0)
    return values(network)


def test_plain_backpropagation_runs_out_of_memory_where_the_planned_schedule_passes(device: Device) -> None:
    plain = npnet.plan(npnet.Network(SIZES, rng=0, backend="cupy", dtype=np.float32), 900)
    budget = plain.peak_bytes // 2
    with npnet.limit_memory(budget, "cupy"), pytest.raises(npnet.OutOfMemory, match="limit set to") as error:
        lab_step("cupy")
    assert "npnet.plan finds schedules for memory_budget=" in str(error.value)
    with npnet.limit_memory(budget + 3 * X.nbytes, "cupy"):  # the data are allocated in it, too
        planned = lab_step("cupy", memory_budget=budget)
    assert same(planned, lab_step("numpy"))
    with npnet.limit_memory(plain.peak_bytes + 3 * X.nbytes, "cupy"):
        assert same(planned, lab_step("cupy"))


def least(streaming: bool = True, **options: Any) -> npnet.Plan:
    """The plan for the smallest budget."""
    network = npnet.Network(SIZES, rng=0, backend="cupy", dtype=np.float32)
    chain = npnet.plan(network, 900, streaming=streaming, **options).chain
    budget = smallest_budget(chain)[0] + chain.fixed
    return npnet.plan(network, 900, streaming=streaming, memory_budget=budget, **options)


@pytest.mark.parametrize("lent", [False, True])
def test_the_lab_trains_within_the_smallest_budget_to_the_byte(device: Device, lent: bool) -> None:
    budget = least().peak_bytes
    network = npnet.NetworkWithCheckpointing(SIZES, memory_budget=budget, rng=0, backend="cupy", dtype=np.float32)
    plain = npnet.Network(SIZES, rng=0, dtype=np.float32)
    before = [network.weights, network.biases] if lent else []
    for _ in range(3):
        network.update_mini_batch(data(), 3.0)
        plain.update_mini_batch(data("numpy"), 3.0)
        before += [network.weights] if lent else []
    assert same(values(network), values(plain))
    twin = copy.deepcopy(network)
    for each in (network, twin):
        each.SGD(data(), 1, 300, 3.0, log=False)
    plain.SGD(data("numpy"), 1, 300, 3.0, log=False)
    assert same(values(network), values(plain))
    assert same(values(twin), values(plain))


def test_gradients_in_hand_do_not_count_against_the_next_step(device: Device) -> None:
    budget = least(streaming=False).peak_bytes
    network = npnet.NetworkWithCheckpointing(SIZES, memory_budget=budget, rng=0, backend="cupy", dtype=np.float32)
    x, y = data()
    kept = [network.backprop(x.T, y.T) for _ in range(3)]
    assert len(kept) == 3


class Hungry(npnet.NetworkWithCheckpointing):
    """Its methods allocate what no plan knows of."""

    def cost_derivative(self, output_activations: Any, y: Any) -> Any:
        more = [output_activations.copy() for _ in range(200)]
        return output_activations - y + 0 * more[0]


def test_the_limit_holds_what_the_plan_does_not_know(device: Device) -> None:
    """The control: without it, such a step takes more than its budget."""
    budget = least().peak_bytes
    network = Hungry(SIZES, memory_budget=budget, rng=0, backend="cupy", dtype=np.float32)
    before = values(network)
    with pytest.raises(npnet.OutOfMemory):
        network.update_mini_batch(data(), 3.0)
    assert same(values(network), before)
    network._npnet.limit.budget = None
    network.update_mini_batch(data(), 3.0)
    Hungry(SIZES, memory_budget=budget, rng=0, dtype=np.float32).update_mini_batch(data("numpy"), 3.0)


def test_the_budget_that_is_named_when_memory_runs_out_does_under_the_same_limit(device: Device) -> None:
    budget = least().peak_bytes + 1000
    x, y = data()
    network = npnet.Network(SIZES, rng=0, backend="cupy", dtype=np.float32)
    there = npnet.plan(network, 900).chain.parameters
    with npnet.limit_memory(budget - there, "cupy"), pytest.raises(npnet.OutOfMemory) as error:
        network.update_mini_batch((x, y), 3.0)
    named = re.search(r"memory_budget=(\d+) ", str(error.value))
    assert named is not None
    other = npnet.NetworkWithCheckpointing(SIZES, memory_budget=int(named[1]), rng=0, backend="cupy", dtype=np.float32)
    with npnet.limit_memory(int(named[1]) - there, "cupy"):
        other.update_mini_batch((x, y), 3.0)


# In the loop.


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_norm": 0.1},
    "at the end": {"streaming": False},
    "accumulated": {"accumulation_steps": 2},
    "scaled": {"scaler": True},
    "bytes as data": {"transform": lambda rows: rows.astype(np.float32) / 8},
}


def fitted(backend: str, budget: int | None, model: Any = None, **options: Any) -> list[np.ndarray]:
    model = model or npnet.mlp([20, *[32] * 15, 10], "tanh", rng=0, backend=backend)
    x, y = data(backend)
    if "transform" in options:
        x = (x * 8).astype(np.int8)
    options = {**options, "scaler": npnet.GradScaler()} if "scaler" in options else options
    settings: dict[str, Any] = {"loss": npnet.SoftmaxCrossEntropy(), "epochs": 2, "batch_size": 200, "rng": 1}
    optimizer = npnet.Adam(1e-3, weight_decay=0.01)
    npnet.fit(
        model, (x, y), optimizer=optimizer, memory_budget=budget, test_data=(x, y), log=False, **settings, **options
    )
    return values(model)


def least_fit(**options: Any) -> int:
    """The smallest budget for it."""
    with pytest.raises(npnet.InfeasibleBudget) as error:
        fitted("cupy", 1000, **options)
    return error.value.smallest_bytes


@pytest.mark.parametrize("name", OPTIONS)
def test_fit_keeps_to_the_smallest_budget_with_its_optimizer_and_gives_the_same_numbers(
    device: Device, name: str
) -> None:
    options = OPTIONS[name]
    budget = least_fit(**options)
    assert same(fitted("cupy", budget, **options), fitted("numpy", None, **options))


class Liar(npnet.Dense):
    """Says that its backward pass takes nothing."""

    def cost(self, shape: Any, dtype: Any, needs_dx: bool = True) -> npnet.LayerCost:
        return super().cost(shape, dtype, needs_dx)._replace(backward_bytes=0)


def lying(backend: str) -> npnet.Sequential:
    sizes = [20, 64, 64, 64, 10]
    return npnet.Sequential(*(Liar(n, m, rng=0, backend=backend) for n, m in itertools.pairwise(sizes)))


def test_a_step_that_takes_more_than_its_plan_runs_out_of_memory_and_changes_nothing(device: Device) -> None:
    with pytest.raises(npnet.InfeasibleBudget) as error:
        fitted("cupy", 1000, lying("cupy"))
    budget, model = error.value.smallest_bytes, lying("cupy")
    before = values(model)
    with pytest.raises(npnet.OutOfMemory):
        fitted("cupy", budget, model)
    assert same(values(model), before)
    fitted("numpy", budget, lying("numpy"))  # where there is no limit


def test_what_was_cached_before_makes_no_difference(device: Device) -> None:
    budget = least_fit()
    xp = npnet.get_backend("cupy").xp
    for size in range(1000, 60_000, 1000):
        xp.zeros(size)
    fitted("cupy", budget)
    assert device.default.total_bytes() > 1_000_000


def test_a_second_training_with_the_same_optimizer_has_the_same_budget(device: Device) -> None:
    """What the optimizer keeps is there by then."""
    model, optimizer, budget = npnet.mlp(SIZES, rng=0, backend="cupy"), npnet.Adam(1e-3), 0
    for _ in range(3):
        plan = npnet.plan(model, 300, loss=npnet.SoftmaxCrossEntropy(), optimizer=optimizer)
        budget = budget or smallest_budget(plan.chain)[0] + plan.chain.fixed
        npnet.fit(model, data(), loss=npnet.SoftmaxCrossEntropy(), optimizer=optimizer, epochs=1, batch_size=300,
                  memory_budget=budget, log=False)  # fmt: skip
    assert len(optimizer.held(model.parameters())) == 3 * len(model.parameters())


def test_npnet_train_on_a_device_keeps_to_its_budget(device: Device, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--backend", "cupy", "--arch", "784,30x9,10", "--samples", "512", "--epochs", "1", "--quiet"]
    assert main(["train", *options, "--memory-budget", "10 kB"]) == 1
    least = re.search(r"the smallest budget that was found is (\d+) bytes", capsys.readouterr().err)
    assert least is not None
    device.default.free_all_blocks()
    assert main(["train", *options, "--memory-budget", least[1]]) == 0
    row = re.search(r"^ *optimal +\d+ .*", capsys.readouterr().out, re.MULTILINE)
    assert row is not None
    measured, predicted = (int(row[0].replace(",", "").split()[place]) for place in (4, 6))
    assert 0.97 * predicted < measured <= predicted == int(least[1])
