"""Where activations go: to the disk, or from a device to its host; the same numbers, and what was predicted."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import schedules
from npnet.archive import read_archive, write_archive
from npnet.offload import Store, borrowed_store
from npnet.schedule import FETCH, OFFLOAD
from tests.pool import Device, install_device
from tests.scenarios import fresh_registry as fresh_registry

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((200, 7)).astype(np.float32), RNG.standard_normal((200, 3)).astype(np.float32)
LOSS = npnet.Quadratic()


def model(backend: str = "numpy") -> npnet.Sequential:
    return npnet.mlp([7, *[64] * 10, 3], "tanh", rng=0, backend=backend)


def trained(backend: str = "numpy", **options: Any) -> list[np.ndarray]:
    net, data = model(backend), (npnet.to_backend(X, backend), npnet.to_backend(Y, backend))
    npnet.fit(net, data, loss=LOSS, optimizer=npnet.SGD(0.1), epochs=2, batch_size=100, rng=0, log=False, **options)
    return [npnet.to_host(parameter.value) for parameter in net.parameters()]


def same(these: list[np.ndarray], those: list[np.ndarray]) -> bool:
    return all(map(np.array_equal, these, those))


@pytest.fixture(name="stored")
def _stored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What stores are told to do, from then on."""
    done: list[str] = []

    def noted(name: str, right: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args: (done.append(name), right(self, *args))[1]

    for name in ("put", "get", "_write", "_read"):
        monkeypatch.setattr(Store, name, noted(name, getattr(Store, name)))
    return done


@pytest.mark.parametrize("budget", [None, "350 kB"])
@pytest.mark.parametrize(("backend", "place"), [("numpy", "disk"), ("cupy", "disk"), ("cupy", "host")])
def test_fit_trains_the_same_network(backend: str, place: str, budget: str | None, stored: list[str]) -> None:
    with install_device():
        plain = trained(backend)
        assert not stored
        found = trained(backend, offload=place, memory_budget=budget)
        assert same(found, plain)
    assert stored.count("put") == stored.count("get") > (10 if budget else 40)
    assert stored.count("_write") == stored.count("_read") == (stored.count("put") if place == "disk" else 0)


def test_with_a_budget_it_is_planned_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[npnet.Schedule] = []
    right = npnet.step.backpropagate
    monkeypatch.setattr(
        "npnet.step.backpropagate", lambda layers, schedule, *args, **o: used.append(schedule) or right(
            layers, schedule, *args, **o
        )
    )  # fmt: skip
    trained(offload="disk", memory_budget="350 kB")
    plan = npnet.plan(model(), 100, offload="disk", memory_budget="350 kB", loss=LOSS, optimizer=npnet.SGD(0.1))
    assert used[-1] == plan.schedule
    assert used[-1].offload_to == plan.schedule.offload_to == "disk"
    assert 0 < len([action for action in used[-1] if action.kind is OFFLOAD]) < 9
    assert "moved to the disk on the way up" in plan.describe()
    assert "proven" not in plan.describe()  # nothing is run again: there is nothing to prove


@pytest.fixture(name="device")
def _device() -> Any:
    with install_device() as device:
        yield device


@pytest.mark.parametrize("n", [1, 3])
def test_from_a_device_to_the_disk_nothing_is_on_its_way(device: Device, n: int) -> None:
    net, schedule = model("cupy"), schedules.offloaded(11, n, to="disk")
    x, y = (npnet.to_backend(np.tile(each, (10, 1)), "cupy") for each in (X, Y))
    plan = npnet.plan(net, 2000, strategy=schedule, loss=LOSS)
    step = (npnet.train_step, net, LOSS, npnet.SGD(0.1), schedule, x, y)
    npnet.measure_peak(*step, backend="cupy")
    peak = npnet.measure_peak(*step, backend="cupy").increase_bytes + plan.chain.parameters
    assert 0.99 * plan.peak_bytes - plan.chain.small <= peak <= plan.peak_bytes
    to_host = npnet.plan(net, 2000, strategy=schedules.offloaded(11, n, to="host"), loss=LOSS)
    assert to_host.peak_bytes == npnet.plan(net, 2000, strategy=schedules.offloaded(11, n), loss=LOSS).peak_bytes
    assert to_host.peak_bytes > plan.peak_bytes + 500_000 * (n == 1)
    assert not device.streams.log  # no copy was ordered beside the computing


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("backend", ["numpy", "cupy"])
def test_what_comes_back_from_the_disk_is_what_went_there(device: Device, backend: str, order: str) -> None:
    array = np.asarray(RNG.standard_normal((4, 3)), order=order)  # type: ignore[call-overload]
    with borrowed_store("disk") as store:
        store.put(1, npnet.to_backend(array, backend))
        again = store.get(1)
    assert npnet.backend.backend_of(again).name == backend
    assert again.flags[f"{order}_CONTIGUOUS"] if backend == "numpy" else again.flags.f_contiguous == (order == "F")
    np.testing.assert_array_equal(npnet.to_host(again), array, strict=True)


def test_the_next_pass_may_go_elsewhere(device: Device) -> None:
    net, x, y = model("cupy"), npnet.to_backend(X, "cupy"), npnet.to_backend(Y, "cupy")
    plain = npnet.value_and_grad(net, LOSS, x, y)[1]
    for to in ("disk", None, "host", "disk"):
        found = npnet.value_and_grad(net, LOSS, x, y, schedule=schedules.offloaded(11, to=to))[1]
        assert same([*map(npnet.to_host, found.values())], [*map(npnet.to_host, plain.values())])


def test_a_schedule_knows_its_place(tmp_path: Path) -> None:
    schedule = schedules.offloaded(4, to="disk")
    assert pickle.loads(pickle.dumps(schedule)).offload_to == "disk"
    assert schedules.as_schedule(schedule, 4).offload_to == "disk"
    network = npnet.NetworkWithCheckpointing([3, 4, 4, 4, 2], schedule=schedule)
    network.save(tmp_path / "network.npz")
    again = npnet.load(tmp_path / "network.npz").schedule
    assert (again, again.offload_to) == (schedule, "disk")


def test_a_network_saved_before_schedules_had_places_is_loaded(tmp_path: Path) -> None:
    network = npnet.NetworkWithCheckpointing([3, 4, 4, 2], schedule="offload")
    network.save(tmp_path / "network.npz")
    description, arrays = read_archive(tmp_path / "network.npz")
    assert description["model"]["config"]["schedule"].pop("offload_to", "") is None
    write_archive(tmp_path / "network.npz", description, arrays)
    assert npnet.load(tmp_path / "network.npz").schedule == network.schedule


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no place": (lambda: trained(offload="tape"), "offload: expected 'host' or 'disk', got 'tape'"),
    "a number": (lambda: trained(offload=1), "offload: expected 'host' or 'disk', got 1"),
    "in a plan": (
        lambda: npnet.plan(model(), 10, offload=["disk"]),
        "offload: expected 'host' or 'disk', got ['disk']",
    ),
    "in a schedule": (lambda: schedules.offloaded(4, to="Disk"), "offload_to: expected 'host' or 'disk', got 'Disk'"),
    "host to host": (lambda: trained(offload="host"), "offload: activations are in the host's memory already; 'disk'"),
    "planned": (lambda: npnet.plan(model(), 10, offload="host"), "offload: activations are in the host's memory"),
    "in a pass": (
        lambda: npnet.add_gradients(model(), LOSS, X, Y, schedule=schedules.offloaded(11, to="host")),
        "offload: activations are in the host's memory already; 'disk' moves them out of it",
    ),
    "two": (lambda: trained(offload="disk", schedule="sqrt"), "give schedule or offload, not both"),
    "n": (lambda: npnet.plan(model(), 10, offload="disk", every_nth=2), "give every_nth or strategy='offload', not"),
    "sqrt": (lambda: npnet.plan(model(), 10, offload="disk", strategy="sqrt"), "give offload or strategy='sqrt', not"),
    "little": (lambda: trained(offload="disk", memory_budget="100 kB"), "the smallest budget of this strategy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_words(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


def test_a_store_that_swaps_activations_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, right = trained(), Store.get
    monkeypatch.setattr(Store, "get", lambda self, number: right(self, number)[::-1].copy())
    assert not same(trained(offload="disk"), plain)


def test_the_actions_are_the_same_two() -> None:
    assert schedules.offloaded(6, to="disk") == schedules.offloaded(6)
    assert {OFFLOAD, FETCH} < {action.kind for action in schedules.offloaded(6, to="disk")}
