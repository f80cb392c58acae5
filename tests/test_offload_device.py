"""Activations of a GPU in the host's pinned memory: nobody waits for the copies, and the numbers are the same."""

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import offload, pools
from npnet.offload import OffloadError, Store
from tests.guard import DeviceArray
from tests.pool import Device, install_device
from tests.scenarios import fresh_registry as fresh_registry

RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, 7)).astype(np.float32)
Y = RNG.standard_normal((40, 3)).astype(np.float32)


@pytest.fixture(name="device", autouse=True)
def counted_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setattr(pools, "_kept", [])
    monkeypatch.setattr(offload._stores, "free", [])
    with install_device() as device:
        yield device
        gc.collect()
        assert not device.dangling


def trained(backend: str, schedule: str) -> list[np.ndarray]:
    model = npnet.mlp([7, *[5] * 6, 3], "tanh", rng=0, backend=backend)
    data = npnet.to_backend(X, backend), npnet.to_backend(Y, backend)
    plan = npnet.plan(model, 40, strategy=schedule)
    DeviceArray.syncs.clear()
    for _ in range(3):
        npnet.train_step(model, npnet.Quadratic(), npnet.SGD(0.1), plan.schedule, *data)
    counted = dict(DeviceArray.syncs)
    assert counted == ({"float": 3} if backend == "cupy" else {})  # the loss of each step, and no copy
    return [npnet.to_host(each.value) for each in model.parameters()]


def same(these: list[np.ndarray], those: list[np.ndarray]) -> bool:
    return all(map(np.array_equal, these, those))


def test_it_trains_the_same_network_and_waits_for_no_copy(device: Device) -> None:
    there = trained("cupy", "offload")
    assert "copy ordered" in device.streams.log
    assert same(there, trained("cupy", "none"))
    assert same(there, trained("numpy", "offload"))


def test_pinned_memory_is_used_again_step_after_step(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(
        offload,
        "pinned_bytes",
        lambda xp, count: taken.append(count) or np.zeros(count, np.uint8),  # type: ignore
    )
    trained("cupy", "offload")
    assert taken == [40 * 5 * 4] * 5  # six outputs, the last of which is used at once


def test_what_is_on_its_way_cannot_be_read_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a copy that goes by way of the host would find garbage."""
    expected = trained("cupy", "none")

    def by_the_host(self: Store, number: int) -> Any:
        kept: Any = self._kept.pop(number)
        return npnet.to_backend(kept.source.copy(), "cupy")

    monkeypatch.setattr(Store, "get", by_the_host)
    assert not same(trained("cupy", "offload"), expected)


@pytest.mark.parametrize("layout", ["C", "F", "neither"])
def test_an_array_comes_back_in_its_layout(layout: str) -> None:
    host = np.asfortranarray(X) if layout == "F" else X
    array = npnet.to_backend(host, "cupy")
    array = array[::2, ::3] if layout == "neither" else array
    expected = npnet.to_host(array)
    store = Store()
    store.put(3, array)
    found: Any = store.get(3)
    np.testing.assert_array_equal(npnet.to_host(found), expected)
    assert found.flags.f_contiguous is (layout == "F")


def test_where_there_is_no_pinned_memory_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(size: int) -> Any:
        raise RuntimeError("cudaErrorMemoryAllocation: out of memory")

    array = npnet.to_backend(X, "cupy")
    monkeypatch.setattr(npnet.get_backend("cupy").xp.cuda, "alloc_pinned_memory", none_left)
    with pytest.raises(OffloadError, match=r"no pinned memory on the host for 1120 bytes \(cudaErrorMemoryAllocation"):
        Store().put(1, array)
