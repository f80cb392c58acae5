"""npnet on a GPU does what it does on the CPU, and a schedule changes no bit there.

Each test runs twice: on a made-up device, here and now (with its kernels, if there is a C compiler), and on a real one
where there is one (marked gpu: with `pytest -m gpu` these alone).
"""

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import fusing, pools, schedules
from npnet.backend import ones
from npnet.checkpoint import backpropagate, checkpoint
from npnet.layer import needs_saved
from npnet.optimal import smallest_budget
from npnet.random import keep_mask
from tests.benchmarks import gpu
from tests.kernels import COMPILER, RawKernel
from tests.pool import install_device
from tests.scenarios import SCENARIOS, STEPS
from tests.scenarios import fresh_registry as fresh_registry

RNG = np.random.default_rng(0)
X = RNG.standard_normal((130, 20)).astype(np.float32)
Y = np.eye(10, dtype=np.float32)[RNG.integers(10, size=130)]
LOSS = npnet.SoftmaxCrossEntropy()
KERNELS: dict[Any, Any] = {}  # compiled once for all tests


@pytest.fixture(name="real", params=["made up", pytest.param("real", marks=pytest.mark.gpu)], autouse=True)
def a_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """The backend "cupy": on a device of our own making, or on the GPU; which of them."""
    ones.cache_clear()  # a measurement would miss them
    if request.param == "made up":
        monkeypatch.setattr(pools, "_kept", [])
        monkeypatch.setattr(fusing, "_kernels", KERNELS)
        with install_device(total=4_000_000_000, raw_kernel=COMPILER and RawKernel):
            yield False
        return
    if "cupy" not in npnet.available_backends():
        pytest.skip("there is no GPU")
    yield True
    gc.collect()


def close(device: Any, host: Any) -> None:
    """The same numbers but for the rounding of some steps."""
    if not isinstance(host, (np.ndarray, np.generic)):
        assert device == pytest.approx(host, rel=1e-4) if isinstance(host, float) else device == host
        return
    found = npnet.to_host(device)
    assert (found.shape, found.dtype) == (host.shape, host.dtype)
    single = host.dtype.itemsize <= 4
    np.testing.assert_allclose(found, host, rtol=2e-3 if single else 1e-7, atol=2e-4 if single else 1e-9)


def same(these: list[Any], those: list[Any]) -> None:
    for a, b in zip(these, those, strict=True):
        np.testing.assert_array_equal(npnet.to_host(a), npnet.to_host(b))


# The CPU's numbers.


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_device_gives_the_numbers_of_the_host(name: str) -> None:
    there, here = SCENARIOS[name]("cupy"), SCENARIOS[name]("numpy")
    assert len(there) == len(here)
    for device, host in zip(there, here, strict=True):
        close(device, host)


def test_masks_are_the_hosts_bit_for_bit() -> None:
    xp = npnet.get_backend("cupy").xp
    for shape in ((1, 1), (7, 33), (128, 784)):
        for p in (0.1, 0.5, 1 / 3):
            there, here = (keep_mask(module, shape, p, 2**62 + 3, 2**40 + 1) for module in (xp, np))
            np.testing.assert_array_equal(npnet.to_host(there), here)


# No schedule changes a bit.


def test_under_every_schedule_the_lab_trains_the_same_network() -> None:
    expected = STEPS["plain"]("cupy")
    for name, run in STEPS.items():
        if name != "float32":
            same(run("cupy"), expected)


def model(backend: str = "cupy", half: bool = False) -> npnet.Sequential:
    """Layers of every kind."""
    inner = npnet.Sequential(
        npnet.LayerNorm(32, backend=backend), npnet.Linear(32, 32, rng=1, backend=backend), npnet.GELU(),
        npnet.Dropout(0.3, key=5),
    )  # fmt: skip
    layers = [npnet.Dense(20, 32, "sigmoid", rng=2, backend=backend), npnet.Residual(inner), npnet.Dropout(0.2, key=6)]
    layers += [npnet.Dense(32, 32, name, rng=n, backend=backend) for n, name in enumerate(("tanh", "relu") * 4)]
    layers += [checkpoint(npnet.Dense(32, 32, "tanh", rng=9, backend=backend))]
    chain = npnet.Sequential(*layers, npnet.Linear(32, 10, rng=8, backend=backend))
    return npnet.mixed_precision(chain) if half else chain


def fitted(backend: str = "cupy", data_on: str | None = None, half: bool = False, **options: Any) -> list[Any]:
    npnet.set_seed(3)
    net = model(backend, half)
    data = npnet.to_backend(X, data_on or backend), npnet.to_backend(Y, data_on or backend)
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 40, "rng": 0, "test_data": data, "log": False}
    if half:
        settings["scaler"] = npnet.GradScaler(2.0**10)
    adam = npnet.Adam(1e-2, epsilon=1e-2, weight_decay=0.01)  # whose steps do not turn with a gradient that rounds to 0
    npnet.fit(net, data, loss=LOSS, optimizer=adam, **settings | options)
    return [each.value for each in net.parameters()]


OPTIONS: dict[str, dict[str, Any]] = {
    "streaming": {},
    "clipped": {"clip_norm": 0.5},
    "accumulated": {"accumulation_steps": 3},
    "at the end": {"streaming": False},
    "half": {"half": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_under_every_schedule_fit_trains_the_same_model(name: str) -> None:
    saving = needs_saved(model().layers)
    plain = fitted(**OPTIONS[name])
    ways: list[dict[str, Any]] = [
        {"schedule": "sqrt"}, {"schedule": "revolve"}, {"schedule": "offload"},
        {"schedule": schedules.every_nth(13, 3, saving)}, {"memory_budget": "1 MB"}, {"data_on": "numpy"},
        {"schedule": "sqrt", "determinism_check": True},
    ]  # fmt: skip
    for way in ways:
        same(fitted(**OPTIONS[name], **way), plain)


@pytest.mark.parametrize("n", [1, 2])
def test_copies_that_go_on_while_it_computes_change_no_bit(real: bool, n: int) -> None:
    """Large enough that a copy takes longer than a layer, in memory that is used again and again; Ctrl-C among them."""
    width, batch = (512, 4096) if real else (16, 32)
    net, x, y = chain_and_data(width, 12, batch)
    schedule = schedules.offloaded(13, n)
    _, plain = npnet.value_and_grad(net, LOSS, x, y)

    def interrupted(layer: npnet.Layer) -> None:
        if layer is net.layers[8]:
            raise KeyboardInterrupt

    for _ in range(10):
        with pytest.raises(KeyboardInterrupt):
            backpropagate(net.layers, schedule, x, lambda y: y.copy(), after_backward=interrupted)
        _, found = npnet.value_and_grad(net, LOSS, x, y, schedule=schedule)
        same([*found.values()], [*plain.values()])


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "half"])
def test_fit_trains_the_hosts_model(name: str) -> None:
    for there, here in zip(fitted(**OPTIONS[name]), fitted("numpy", **OPTIONS[name]), strict=True):
        np.testing.assert_allclose(npnet.to_host(there), here, rtol=0.05, atol=2e-3)


# Saving.


def test_what_is_saved_there_is_loaded_here_and_the_other_way_round(tmp_path: Path) -> None:
    for saved_on, loaded_on in (("cupy", "numpy"), ("numpy", "cupy"), ("cupy", "cupy")):
        net = npnet.mlp([20, 16, 10], rng=0, backend=saved_on)
        net.save(tmp_path / "model.npz")
        with npnet.use_backend(loaded_on):
            again = npnet.load(tmp_path / "model.npz")
        same([p.value for p in again.parameters()], [p.value for p in net.parameters()])
        assert {npnet.backend.backend_of(p.value).name for p in again.parameters()} == {loaded_on}


def test_a_training_is_gone_on_with_on_the_other_backend(tmp_path: Path) -> None:
    """Four epochs, two here and two there: but for rounding what one backend comes to."""

    def train(backend: str, epochs: int, file: str) -> list[Any]:
        net = npnet.mlp([20, 16, 10], "tanh", rng=0, backend=backend)
        data = npnet.to_backend(X, backend), npnet.to_backend(Y, backend)
        saver = npnet.Saver(tmp_path / file, every=1000, resume=True)
        npnet.fit(net, data, loss=LOSS, optimizer=npnet.Adam(1e-2), epochs=epochs, batch_size=50, rng=0, saver=saver,
                  log=False)  # fmt: skip
        return [npnet.to_host(p.value) for p in net.parameters()]

    whole = train("cupy", 4, "whole.npz")
    for first, then in (("cupy", "numpy"), ("numpy", "cupy"), ("cupy", "cupy")):
        file = f"{first}-{then}.npz"
        train(first, 2, file)
        found = train(then, 4, file)
        if first == then:
            same(found, whole)
        for a, b in zip(found, whole, strict=True):
            np.testing.assert_allclose(a, b, rtol=0.05, atol=2e-3)


# Memory.


def chain_and_data(width: int, depth: int, batch: int) -> tuple[npnet.Sequential, Any, Any]:
    rng = np.random.default_rng(1)
    net = npnet.mlp([784, *[width] * depth, 10], "sigmoid", rng=0, backend="cupy")
    x = rng.standard_normal((batch, 784)).astype(np.float32)
    y = np.eye(10, dtype=np.float32)[rng.integers(10, size=batch)]
    return net, npnet.to_backend(x, "cupy"), npnet.to_backend(y, "cupy")


@pytest.mark.parametrize("strategy", ["none", "sqrt", "revolve", "offload", "optimal"])
@pytest.mark.parametrize(("width", "depth", "batch"), [(30, 50, 4096), (256, 12, 1024)])
def test_the_pools_peak_is_what_was_predicted_within_a_percent(
    width: int, depth: int, batch: int, strategy: str
) -> None:
    net, x, y = chain_and_data(width, depth, batch)
    optimizer = npnet.Adam(1e-3)
    plain = npnet.plan(net, batch, loss=LOSS, optimizer=optimizer)
    budget = plain.chain.fixed + (plain.peak_bytes - plain.chain.fixed) // 2 if strategy == "optimal" else None
    plan = npnet.plan(net, batch, loss=LOSS, optimizer=optimizer, strategy=strategy, memory_budget=budget)
    step: Callable[[], float] = lambda: npnet.train_step(net, LOSS, optimizer, plan.schedule, x, y)  # noqa: E731
    step()
    ones.cache_clear()
    measured = npnet.measure_peak(step, backend="cupy").increase_bytes + plan.chain.parameters + plan.chain.optimizer
    assert 0.99 * plan.peak_bytes <= measured <= plan.peak_bytes


def test_plain_backpropagation_runs_out_of_memory_where_the_planned_schedule_passes() -> None:
    sizes, (_, x, y) = [784, *[256] * 20, 10], chain_and_data(8, 1, 2048)
    network = npnet.Network(sizes, rng=0, dtype=np.float32, backend="cupy")
    plain = npnet.plan(network, len(x))
    least = smallest_budget(plain.chain)[0] + plain.chain.fixed
    there = plain.chain.parameters
    for budget in (least, (least + plain.peak_bytes) // 2):
        with npnet.limit_memory(budget - there, "cupy"), pytest.raises(npnet.OutOfMemory):
            network.update_mini_batch((x, y), 1.0)
        planned = npnet.NetworkWithCheckpointing(sizes, memory_budget=budget, rng=0, dtype=np.float32, backend="cupy")
        planned.update_mini_batch((x, y), 1.0)
    network.update_mini_batch((x, y), 1.0)
    same([*planned.weights, *planned.biases], [*network.weights, *network.biases])


def test_a_full_device_is_an_explained_error(real: bool) -> None:
    """Not limited by npnet: somebody has nearly all of it."""
    net, x, y = chain_and_data(64, 6, 2**18 if real else 2**8)
    schedule = schedules.none(7)
    npnet.train_step(net, LOSS, npnet.SGD(0.1), schedule, x[:10], y[:10])  # libraries have their memory by now
    before = [npnet.to_host(each.value) for each in net.parameters()]
    xp = npnet.get_backend("cupy").xp
    xp.get_default_memory_pool().free_all_blocks()
    room = npnet.plan(net, len(x), loss=LOSS).peak_bytes // 2
    hog = xp.empty(xp.cuda.runtime.memGetInfo()[0] - room, np.uint8)
    with pytest.raises(npnet.OutOfMemory, match=r"Out of memory allocating.*take a smaller batch"):
        npnet.train_step(net, LOSS, npnet.SGD(0.1), schedule, x, y)
    same(before, [each.value for each in net.parameters()])
    del hog
    xp.get_default_memory_pool().free_all_blocks()
    npnet.train_step(net, LOSS, npnet.SGD(0.1), schedule, x, y)


# The benchmark.


def test_the_benchmark_runs(real: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    modes = "float32,half" if not real else "float32,tf32,half"  # tf32 in another process
    assert gpu.main(["--quick", "--seconds", "2", "--modes", modes, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["schedules give the same bits"] for row in rows if row["contender"] == "check"] == [True] * (2 + real)
    ours = [row for row in rows if row["contender"].startswith("npnet")]
    assert len(ours) == 4 * (2 + real)
    for row in ours:
        assert row["rounds"] >= 5
        assert row["peak bytes"] <= row["predicted"]
    assert "npnet plain" in capsys.readouterr().out


def test_what_fails_in_the_benchmark_says_so_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with install_device():
        peak, step, steps = gpu.Npnet.peak, gpu.Npnet.step, list[str]()

        def failing_peak(self: gpu.Npnet, plan: npnet.Plan) -> dict[str, Any]:
            if plan.schedule.name == "plain":
                raise MemoryError("no room")
            return peak(self, plan)

        def failing_step(self: gpu.Npnet, plan: npnet.Plan) -> None:
            steps.append(plan.schedule.name)
            if plan.schedule.name == "offload" and steps.count("offload") == 6:
                raise RuntimeError("the seventh")
            step(self, plan)

        monkeypatch.setattr(gpu.Npnet, "peak", failing_peak)
        monkeypatch.setattr(gpu.Npnet, "step", failing_step)
        rows = {row["contender"]: row for row in gpu.compare("tiny", "float32", 0.0)}
        assert rows["npnet plain"]["failed"] == "MemoryError: no room"
        assert rows["npnet plain"]["ms"] > 0
        assert rows["npnet offload"]["failed"] == "RuntimeError: the seventh"
        assert "ms" not in rows["npnet offload"]
        assert {"ms", "peak bytes"} <= rows["npnet sqrt"].keys()
        monkeypatch.setattr(gpu.Npnet, "__init__", lambda *_: 1 / 0)
        (row,) = gpu.compare("tiny", "float32", 0.0)
        assert "ZeroDivisionError" in row["failed"]


def test_without_a_gpu_the_benchmark_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unavailable(name: str | None = None) -> Any:
        raise npnet.BackendUnavailable("backend 'cupy': the reason")

    monkeypatch.setattr(npnet, "get_backend", unavailable)
    assert gpu.main(["--quick"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("this benchmark needs a GPU: backend 'cupy': the reason")
    assert "driver" in said
