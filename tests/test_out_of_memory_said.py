"""What is said when memory runs out or numbers overflow, and that it really does."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import (
    Adam,
    Dense,
    GradScaler,
    Network,
    NetworkWithCheckpointing,
    OutOfMemory,
    Sequential,
    SoftmaxCrossEntropy,
)
from tests.exhausting import STEPS, Exhausting, X, Y, deep

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("options", [{}, {"scaler": True}, {"batch_size": 120, "accumulation_steps": 4}])
def test_the_budget_that_is_named_really_does(options: dict[str, Any]) -> None:
    model, many = deep(40), (np.tile(X, (10, 1)), np.tile(Y, (10, 1)))
    options = {"epochs": 1, "batch_size": 480, "log": False} | options
    if "scaler" in options:
        options["scaler"] = GradScaler()

    def train(**budget: int) -> None:
        npnet.fit(model, many, loss=SoftmaxCrossEntropy(), optimizer=Adam(weight_decay=0.1), **options, **budget)

    Exhausting.at(2)
    with pytest.raises(OutOfMemory) as error:
        train()
    Exhausting.at(-1)
    said = re.search(r"it takes (.*?); npnet\.plan finds schedules for memory_budget=(\d+) ", str(error.value))
    assert said is not None, str(error.value)
    assert npnet.memory.parse_bytes(said[1]) > int(said[2])
    train(memory_budget=int(said[2]))
    with pytest.raises(npnet.InfeasibleBudget):
        train(memory_budget=int(said[2]) - 1)


def test_the_budget_of_a_network_really_does() -> None:
    sizes = [20, *[16] * 40, 3]
    network = Network(sizes, rng=0)
    for layer in network.layers:
        layer.__class__ = Exhausting
    Exhausting.at(5)
    with pytest.raises(OutOfMemory) as error:
        network.update_mini_batch((X.astype(np.float64), Y.astype(np.float64)), 0.5)
    Exhausting.at(-1)
    budget = int(re.search(r"memory_budget=(\d+) ", str(error.value))[1])  # type: ignore[index]
    other = NetworkWithCheckpointing(sizes, rng=0, memory_budget=budget)
    other.update_mini_batch((X.astype(np.float64), Y.astype(np.float64)), 0.5)
    with pytest.raises(npnet.InfeasibleBudget):
        npnet.plan(network, 48, memory_budget=budget - 1)


def test_what_cannot_be_planned_is_a_smaller_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("npnet.failures.plan", exhausted)
    Exhausting.at(2)
    with pytest.raises(OutOfMemory, match=r"on a batch of 16 under the schedule 'plain' .*; take a smaller batch$"):
        STEPS["fit"](deep(), Adam(), GradScaler())


def test_the_error_holds_no_activations() -> None:
    """So that within `except` there is memory for another try."""
    Exhausting.at(18)
    with pytest.raises(OutOfMemory) as error:
        STEPS["fit"](deep(), Adam(), GradScaler())
    trace, held = error.value.__cause__.__traceback__, []  # type: ignore[union-attr]
    while trace is not None:
        held += [name for name in ("held", "saved") if name in trace.tb_frame.f_locals]
        trace = trace.tb_next
    assert held == []


def test_a_gradient_that_overflows_names_its_layer() -> None:
    class Steep(Dense):
        """The gradient at its input is infinite."""

        def backward_(self, *given: Any) -> Any:
            dx = super().backward_(*given)
            dx[:] = np.inf
            return dx

    model = Sequential(Dense(20, 8, "tanh", rng=0), Dense(8, 8, "tanh", rng=1), Steep(8, 3, "identity", rng=2))
    with pytest.raises(
        npnet.TrainingDiverged,
        match=r"epoch 1, step 1 of 3: the norm of the gradient is .*weight of layer 1, Dense\(8, 8",
    ):
        npnet.fit(
            model, (X, Y), loss=SoftmaxCrossEntropy(), optimizer=Adam(), epochs=1, batch_size=16, clip_norm=1.0,
            log=False,
        )  # fmt: skip


# Really.

REALLY = """
import re, resource, sys
import numpy as np
import npnet
from npnet import Adam, Network, OutOfMemory, SoftmaxCrossEntropy, fit, mlp
rng = np.random.default_rng(0)
x, y = rng.random((40000, 32), np.float32), npnet.one_hot(rng.integers(10, size=40000), 10).astype(np.float32)
few = x[:64], y[:64]
options = dict(loss=SoftmaxCrossEntropy(), epochs=1, log=False, rng=0)
fit(mlp([32, 32, 10], rng=0), few, optimizer=Adam(), batch_size=64, **options)  # imports what it needs
model, optimizer = mlp([32] * 31 + [10], rng=0), Adam()
before = {name: each.copy() for name, each in model.state_dict().items()}
network = Network([32] * 31 + [10], rng=0)
weights = [each.copy() for each in network.weights]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + 90_000_000  # the activations take 155 MB
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    fit(model, (x, y), optimizer=optimizer, batch_size=40000, **options)
    sys.exit("there was memory enough")
except OutOfMemory as error:
    print(error)
    budget = int(re.search(r"memory_budget=(\\d+) ", str(error))[1])
assert all(np.array_equal(each, before[name]) for name, each in model.state_dict().items())
assert not optimizer.state_dict(model.named_parameters())
assert budget < 70_000_000, budget
fit(model, (x, y), optimizer=optimizer, batch_size=40000, memory_budget=budget, **options)
assert not all(np.array_equal(each, before[name]) for name, each in model.state_dict().items())
del model, optimizer, before
try:
    network.update_mini_batch((x.astype(np.float64), y.astype(np.float64)), 0.5)
    sys.exit("there was memory enough")
except OutOfMemory as error:
    print(error)
assert all(map(np.array_equal, network.weights, weights))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is not kept elsewhere")
def test_really() -> None:
    """A limit on the address space; what is named is then done, under the same limit."""
    process = subprocess.run(
        [sys.executable, "-c", REALLY], cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    first, second = process.stdout.splitlines()
    assert "on a batch of 40000 under the schedule 'plain' (Unable to allocate" in first
    assert "npnet.plan finds schedules for memory_budget=" in second
