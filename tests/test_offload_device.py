"""Activations of a GPU in the host's pinned memory: copied while it computes, and the numbers are the same.

On made-up streams (`tests/streams.py`, which says what they cannot see): each rule of `npnet.transfers` is broken once.
"""

import gc
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import npnet
from npnet import offload, pools, pricing, schedules, transfers
from npnet.checkpoint import backpropagate
from npnet.offload import OffloadError, Store
from npnet.schedule import FETCH, OFFLOAD, Action
from npnet.transfers import Transfers
from tests.guard import DeviceArray
from tests.pool import Device, install_device
from tests.scenarios import fresh_registry as fresh_registry
from tests.streams import Stream

RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, 7)).astype(np.float32)
Y = RNG.standard_normal((40, 3)).astype(np.float32)
LOSS = {"float": 3}  # how often the host waits in three steps: to see each loss, and for no copy


@pytest.fixture(name="device", autouse=True)
def counted_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setattr(pools, "_kept", [])
    with install_device() as device:
        yield device
        gc.collect()
        assert not device.dangling


def trained(backend: str, schedule: npnet.schedules.ScheduleLike) -> list[np.ndarray]:
    model = npnet.mlp([7, *[5] * 6, 3], "tanh", rng=0, backend=backend)
    data = npnet.to_backend(X, backend), npnet.to_backend(Y, backend)
    plan = npnet.plan(model, 40, strategy=schedule)
    DeviceArray.syncs.clear()
    for _ in range(3):
        npnet.train_step(model, npnet.Quadratic(), npnet.SGD(0.1), plan.schedule, *data)
    trained.waits = dict(DeviceArray.syncs)  # type: ignore[attr-defined]
    return [npnet.to_host(each.value) for each in model.parameters()]


def same(these: list[np.ndarray], those: list[np.ndarray]) -> bool:
    return all(map(np.array_equal, these, those))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_it_trains_the_same_network_and_waits_for_no_copy(device: Device, n: int) -> None:
    schedule = schedules.offloaded(7, n)
    there = trained("cupy", schedule)
    assert trained.waits == LOSS  # type: ignore[attr-defined]
    assert {"copy ordered", "copy out ordered"} <= {*device.streams.log} or n == 3  # of whose two one goes, and stays
    assert not device.streams.astray
    assert same(there, trained("cupy", "none"))
    assert same(there, trained("numpy", schedule))


def without(method: str, inside: str) -> Callable[..., Any]:
    """The method ``inside`` of `Transfers`, without what its ``method`` does there."""
    right, instead = getattr(Transfers, inside), {"_arrived": let_go, "_wait_for_computing": lambda self: None}[method]

    def broken(self: Transfers, *args: Any) -> Any:
        with patch.object(Transfers, method, instead):
            return right(self, *args)

    return broken


def let_go(self: Transfers, moved: transfers.Moved) -> Any:
    """As `Transfers._arrived`, without waiting."""
    array, moved.array = moved.array, None
    return array


def host_waits(self: Transfers, moved: transfers.Moved) -> Any:
    moved.copied.synchronize()
    return let_go(self, moved)


BROKEN: dict[str, tuple[str, Callable[..., Any]]] = {
    "a copy out does not wait for what is computed": ("send", without("_wait_for_computing", "send")),
    "a copy back does not wait for what is computed": ("_order_back", without("_wait_for_computing", "_order_back")),
    "what leaves is let go before it is copied": ("_let_leave", without("_arrived", "_let_leave")),
    "what comes back is used before it is there": ("fetch", without("_arrived", "fetch")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_rule_that_is_broken_gives_other_numbers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    expected = trained("cupy", "none")
    monkeypatch.setattr(Transfers, *BROKEN[name])
    assert not same(trained("cupy", "offload"), expected)


def test_a_host_that_waits_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained("cupy", "none")
    monkeypatch.setattr(Transfers, "_arrived", host_waits)
    assert same(trained("cupy", "offload"), expected)
    assert trained.waits == LOSS | {"event": 3 * 9}  # type: ignore[attr-defined]  # five out, four back


def arrays(count: int) -> list[np.ndarray]:
    return [np.full((3, 4), number, np.float32) for number in range(count)]


def test_what_went_out_before_is_ordered_back_with_each_that_is_fetched(device: Device) -> None:
    store, out, back = Store(), ["copying waits", "copy out ordered"], ["copying waits", "copy ordered"]

    def said(call: Callable[..., Any], *args: Any) -> list[str]:
        device.streams.log.clear()
        call(*args)
        return [*device.streams.log]

    assert said(store.put, 0, npnet.to_backend(arrays(4)[0], "cupy")) == out
    for number in (1, 2, 3):  # the one before is let go
        assert said(store.put, number, npnet.to_backend(arrays(4)[number], "cupy")) == ["computing waits", *out]
    for _ in range(2):  # in a pass that is done as in the first
        assert said(store.get, 3) == ["computing waits", *back]  # it has not left; 2 is ordered
        assert said(store.get, 2) == ["computing waits", *back]
        assert said(store.get, 0) == [*back, "computing waits"]  # against all expectation: 1 is on its way
        assert said(store.get, 1) == ["computing waits"]
        for number, array in enumerate(arrays(4)):
            store.put(number, npnet.to_backend(array, "cupy"))


def test_memory_that_is_on_its_way_is_one_array_each_way(device: Device) -> None:
    store, used = Store(), []
    for number, array in enumerate(arrays(5)):
        store.put(number, npnet.to_backend(array, "cupy"))
        used.append(device.default.used_bytes())
    for number in reversed(range(5)):
        np.testing.assert_array_equal(npnet.to_host(store.get(number)), arrays(5)[number])
        used.append(device.default.used_bytes())
    assert used == [512] * 9 + [0]


@pytest.mark.parametrize("seed", range(20))
def test_in_whatever_order_arrays_come_back_whole_and_what_moves_is_what_is_priced(device: Device, seed: int) -> None:
    rng, store, out = np.random.default_rng(seed), Store(), dict[int, np.ndarray]()
    actions, used, inside = list[Action](), list[int](), {*range(1, 13)}
    for i in range(200):
        if inside and rng.random() < (0.6 if i < 100 else 0.3):
            number = int(rng.choice([*inside]))
            out[number] = rng.standard_normal((number, 128)).astype(np.float32)
            store.put(number, npnet.to_backend(out[number], "cupy"))
            actions.append(Action(OFFLOAD, number))
        elif out:
            number = [*out][-1] if rng.random() < 0.7 else int(rng.choice([*out]))
            np.testing.assert_array_equal(npnet.to_host(store.get(number)), out.pop(number))
            actions.append(Action(FETCH, number))
        inside = {*range(1, 13)} - {*out}
        used += [device.default.used_bytes()] * (len(actions) - len(used))
    assert used == [*pricing._moving(actions, [512 * number for number in range(13)])]
    assert not device.streams.astray


def broken_off(schedule: npnet.Schedule, after: int) -> None:
    """A pass that Ctrl-C ends: 0 is at the turn, 1 after the last layer, 2 when the first activation is back."""
    model = npnet.mlp([7, *[5] * 6, 3], "tanh", rng=0, backend="cupy")
    done: list[Any] = []

    def again(result: Any) -> Any:
        done.append(None)
        if len(done) > after:
            raise KeyboardInterrupt
        return result

    with pytest.raises(KeyboardInterrupt):
        backpropagate(
            model.layers, schedule, npnet.to_backend(X, "cupy"), lambda y: again(y.copy()), after_backward=again
        )


@pytest.mark.parametrize("after", range(7))
@pytest.mark.parametrize("waits", [True, False])
def test_after_a_pass_that_was_broken_off_nothing_is_on_its_way(
    device: Device, monkeypatch: pytest.MonkeyPatch, after: int, waits: bool
) -> None:
    schedule, expected = schedules.offloaded(7), trained("cupy", "none")
    if not waits:  # the control
        monkeypatch.setattr(Stream, "synchronize", lambda self: None)
    broken_off(schedule, after)
    (ours,) = offload._stores.free[0]._transfers.values()
    assert (ours._stream.done == len(ours._stream.ordered)) is (waits or after > 5)  # by then all is back
    assert not ours._out
    assert len(ours._free[40 * 5 * 4]) == 5  # pinned memory, to be used again
    assert same(trained("cupy", schedule), expected)
    assert bool(device.streams.astray) is (not waits and 1 < after < 6)  # while one is on its way back


def test_without_an_error_the_host_waits_for_nothing(device: Device) -> None:
    with offload.borrowed_store() as store:
        for number, array in enumerate(arrays(4)):
            store.put(number, npnet.to_backend(array, "cupy"))
        for number in reversed(range(4)):
            store.get(number)
    assert not DeviceArray.syncs["stream"]


def test_a_store_that_goes_waits_for_what_is_under_way(device: Device) -> None:
    store = Store()
    store.put(0, npnet.to_backend(X, "cupy"))
    stream = store._transfers[0]._stream
    del store
    gc.collect()
    assert stream.done == len(stream.ordered) > 0


def test_each_gpu_has_transfers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    store, runtime = Store(), npnet.get_backend("cupy").xp.cuda.runtime
    for number in (0, 1, 0):
        monkeypatch.setattr(runtime, "getDevice", lambda number=number: number)
        store.put(number, npnet.to_backend(X, "cupy"))
        store.get(number)
    assert [*store._transfers] == [0, 1]


def test_pinned_memory_is_used_again_step_after_step(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(
        transfers,
        "pinned_bytes",
        lambda xp, count: taken.append(count) or np.zeros(count, np.uint8),  # type: ignore
    )
    trained("cupy", "offload")
    assert taken == [40 * 5 * 4] * 5  # six outputs, the last of which is used at once


def test_what_is_on_its_way_cannot_be_read_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a copy that goes by way of the host would find garbage."""
    expected = trained("cupy", "none")
    monkeypatch.setattr(Transfers, "fetch", lambda self, moved: npnet.to_backend(moved.on_host.copy(), "cupy"))
    assert not same(trained("cupy", "offload"), expected)


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("layout", ["C", "F", "neither"])
def test_an_array_comes_back_in_its_layout(layout: str, leaves: bool) -> None:
    host = np.asfortranarray(X) if layout == "F" else X
    array = npnet.to_backend(host, "cupy")
    array = array[::2, ::3] if layout == "neither" else array
    expected = npnet.to_host(array)
    store = Store()
    store.put(3, array)
    if leaves:
        store.put(4, array)
        store.get(4)
    found: Any = store.get(3)
    np.testing.assert_array_equal(npnet.to_host(found), expected)
    assert found.flags.f_contiguous is (layout == "F")


def test_where_there_is_no_pinned_memory_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(size: int) -> Any:
        raise RuntimeError("cudaErrorMemoryAllocation: out of memory")

    array = npnet.to_backend(X, "cupy")
    monkeypatch.setattr(npnet.get_backend("cupy").xp.cuda, "PinnedMemory", none_left)
    with pytest.raises(OffloadError, match=r"no pinned memory on the host for 1120 bytes \(cudaErrorMemoryAllocation"):
        Store().put(1, array)
