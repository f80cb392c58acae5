"""Dropout's masks, made on a device by plain arithmetic: those of NumPy's Philox generator, bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npnet
from npnet import random
from tests.guard import GuardModule, install_guard
from tests.scenarios import fresh_registry as fresh_registry
from tests.scenarios import guard_module as guard_module

SHAPES = [(1, 1), (1, 7), (3, 8), (5, 13), (1, 0), (257, 33), (40, 1000)]
ODDS = (0.0, 1e-9, 0.1, 0.5, 1 / 3, 0.999, 1 - 2**-24, float(np.nextafter(1, 0)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("key", "step"), [(0, 0), (1, 5), (2**63 - 1, 2**63 - 1), (0x4F1BBCDCBFA53E0A, 2**40 + 3)])
def test_a_mask_is_numpys(xp: GuardModule, shape: tuple[int, int], key: int, step: int) -> None:
    for p in ODDS:
        host, device = (random.keep_mask(module, shape, p, key, step) for module in (np, xp))
        assert (device.shape, device.dtype) == (shape, np.bool_)
        np.testing.assert_array_equal(npnet.to_host(device), host)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(0, 200), st.floats(0, 1, exclude_max=True))
@settings(max_examples=50, derandomize=True, deadline=None, database=None)
def test_a_mask_is_what_numpys_generator_draws(key: int, step: int, size: int, p: float) -> None:
    with install_guard() as xp:
        device = npnet.to_host(random.keep_mask(xp, (size,), p, key, step))
    np.testing.assert_array_equal(device, random.draws(key, step).random(size, np.float32) >= p)


@pytest.mark.parametrize("features", [1, 5, 8, 30])
def test_a_share_of_a_batch_has_its_rows_of_the_mask(xp: GuardModule, features: int) -> None:
    """Where several processes share a batch, each draws from its first row on."""
    whole = random.keep_mask(np, (40, features), 0.4, 7, 3)
    for first, last in ((0, 40), (3, 17), (17, 40), (39, 40), (40, 40)):
        with random.rows_from(first):
            share = [random.keep_mask(module, (last - first, features), 0.4, 7, 3) for module in (np, xp)]
        for mask in share:
            np.testing.assert_array_equal(npnet.to_host(mask), whole[first:last])


def test_no_number_of_a_mask_comes_from_the_host(xp: GuardModule, monkeypatch: pytest.MonkeyPatch) -> None:
    x = npnet.to_backend(np.ones((50, 40), np.float32), "guard")
    monkeypatch.setattr(random, "draws", lambda *_: pytest.fail("drawn on the host"))
    _, mask = npnet.Dropout(0.5, key=3).forward(x)
    assert not xp.syncs
    assert 800 < npnet.to_host(mask).sum() < 1200
    with pytest.raises(pytest.fail.Exception, match="drawn on the host"):
        npnet.Dropout(0.5, key=3).forward(npnet.to_host(x))


def test_another_formula_would_be_noticed(xp: GuardModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "_WEYL", (random._WEYL[0] + 2, random._WEYL[1]))
    host, device = (random.keep_mask(module, (9, 9), 0.5, 3, 4) for module in (np, xp))
    assert not np.array_equal(npnet.to_host(device), host)
