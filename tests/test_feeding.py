"""Data on the host, the model on a device: batches are copied ahead, and arrive whole. On made-up streams."""

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import feeding, pools
from npnet.backend import get_backend
from npnet.feeding import Feed
from tests.guard import DeviceArray
from tests.pool import Device, install_device
from tests.scenarios import fresh_registry as fresh_registry
from tests.streams import Stream

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (94, 6), np.uint8)
Y = np.eye(3, dtype=np.float32)[RNG.integers(3, size=94)]


@pytest.fixture(name="device", autouse=True)
def counted_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setattr(pools, "_kept", [])
    with install_device() as device:
        yield device
        gc.collect()
        assert not device.dangling


def fitted(backend: str, data_on: str, **options: Any) -> list[np.ndarray]:
    """Two epochs of batches that do not divide the data evenly, bytes on the way."""
    model = npnet.mlp([6, 8, 8, 3], "tanh", rng=0, backend=backend)
    data = npnet.to_backend(X, data_on), npnet.to_backend(Y, data_on)
    npnet.fit(
        model, data, loss=npnet.SoftmaxCrossEntropy(), optimizer=npnet.Adam(1e-2), epochs=2, batch_size=10, rng=0,
        transform=lambda rows: rows.astype(np.float32) / 256, test_data=data, log=False, **options,
    )  # fmt: skip
    return [npnet.to_host(each.value) for each in model.parameters()]


def same(these: list[np.ndarray], those: list[np.ndarray]) -> bool:
    return all(map(np.array_equal, these, those))


@pytest.mark.parametrize("options", [{}, {"accumulation_steps": 3}, {"memory_budget": "100 kB"}, {"schedule": "sqrt"}])
def test_it_trains_as_with_the_data_on_the_device(device: Device, options: dict[str, Any]) -> None:
    there = fitted("cupy", "cupy", **options)
    assert not device.streams.log
    assert same(fitted("cupy", "numpy", **options), there)
    assert device.streams.log
    assert same(fitted("numpy", "numpy", **options), there)


def test_a_batch_is_ordered_before_the_one_before_it_is_used(device: Device) -> None:
    batches = iter([(X[i : i + 10], Y[i : i + 10]) for i in range(0, 40, 10)])
    fed = Feed(None, get_backend("cupy")).pairs(batches)
    order = ["copying waits", "copy ordered", "copy ordered"]
    for number in range(4):
        x, y = next(fed)
        ahead = ["computing waits"] if number == 3 else [*order, "computing waits"]
        assert device.streams.log == (order if number == 0 else []) + ahead
        device.streams.log.clear()
        np.testing.assert_array_equal(x._data, X[10 * number : 10 * number + 10])
        np.testing.assert_array_equal(y._data, Y[10 * number : 10 * number + 10])
    assert list(fed) == []


def test_the_host_waits_only_where_a_copy_is_two_batches_behind(device: Device) -> None:
    def waits(samples: int) -> int:
        DeviceArray.syncs.clear()
        for x, _ in Feed(None, get_backend("cupy")).pairs((X[:5], Y[:5]) for _ in range(samples)):
            assert x.shape == (5, 6)
        return sum(DeviceArray.syncs.values())

    assert waits(12) == waits(4) == 0


def test_without_waiting_for_a_copy_other_numbers_are_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fitted("cupy", "cupy")
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    assert not same(fitted("cupy", "numpy"), expected)


@pytest.mark.parametrize("waits", [True, False])
def test_pinned_memory_is_not_written_before_it_was_read(device: Device, waits: bool) -> None:
    """The host is faster than the copies: it comes to a slot again before the device has begun with it."""
    xp = get_backend("cupy").xp
    slot, stream = feeding._Slot(xp), xp.cuda.Stream(non_blocking=True)
    first, _ = slot.copy((X[:5], Y[:5]), stream)
    if not waits:  # the control
        slot.free = None
    slot.copy((X[5:10], Y[5:10]), stream)
    stream.synchronize()
    assert np.array_equal(first._data, X[:5]) is waits
    assert (DeviceArray.syncs["event"] == 1) is waits


def test_a_training_broken_off_waits_for_what_is_under_way(device: Device) -> None:
    fed = Feed(None, get_backend("cupy")).pairs((X[:5], Y[:5]) for _ in range(9))
    next(fed)
    del fed
    gc.collect()
    assert DeviceArray.syncs["stream"] == 1


def test_data_of_another_device_are_refused_as_before(device: Device) -> None:
    with pytest.raises(TypeError, match="to_backend"):
        fitted("numpy", "cupy")
