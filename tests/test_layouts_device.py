"""What CuPy does otherwise than NumPy with columns and with sums: the guard does it, too, and npnet goes around it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import backend, checks, lending, measuring, optimizers, precision
from npnet.backend import along_rows, dot, to_backend, to_host
from npnet.layer import Parameter
from tests.kernels import COMPILER, RawKernel
from tests.pool import Device, counted_device, install_device
from tests.scenarios import fresh_registry as fresh_registry

RNG = np.random.default_rng(0)
MATRIX = np.asfortranarray(RNG.standard_normal((300, 40)))
ROWS = 512 * -(-MATRIX.nbytes // 512)


@pytest.fixture(name="device")
def _device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with counted_device(monkeypatch) as device:
        yield device


def columns() -> Any:
    """A matrix in Fortran order, on the device."""
    return to_backend(MATRIX, "cupy")


def peak(call: Callable[[], Any]) -> int:
    return npnet.measure_peak(call, backend="cupy").increase_bytes


# The guard does as CuPy does.


def test_the_guards_functions_give_rows(device: Device) -> None:
    x, xp = columns(), npnet.get_backend("cupy").xp
    assert x.flags.f_contiguous
    for made in (xp.exp(x), xp.add(x, x), x * 2, 1 - x, -x, x > 0, ~(x > 0), xp.maximum(x, 0)):
        assert made.flags.c_contiguous
    for kept in (xp.exp(x, out=xp.empty_like(x)), xp.empty_like(x), x.astype(np.float32), x.copy(order="K"), x.T.T):
        assert kept.flags.f_contiguous
    x *= 2
    assert x.flags.f_contiguous


def test_what_the_guard_makes_on_the_way_is_counted(device: Device) -> None:
    x, xp, small = columns(), npnet.get_backend("cupy").xp, 2 * 512
    flat = x.ravel(order="K")
    assert peak(lambda: x.max()) >= ROWS > small >= peak(lambda: flat.max())
    assert peak(lambda: xp.dot(flat, flat)) >= ROWS > small >= peak(lambda: dot(flat, flat))
    assert peak(lambda: xp.asnumpy(x)) >= ROWS > peak(lambda: to_host(x)) == 0
    with pytest.raises(TypeError, match="CuPy's einsum copies"):
        xp.einsum("ij,ij->j", x, x)


# npnet goes around it.


def test_along_rows_is_the_same_memory(device: Device) -> None:
    x = columns()
    row, other = along_rows(x, x)
    assert row.flags.c_contiguous
    assert other.shape == MATRIX.T.shape
    row *= 2
    np.testing.assert_array_equal(to_host(x), 2 * MATRIX)
    for as_it_is in (MATRIX, x.T, x[0]):
        assert along_rows(as_it_is)[0] is as_it_is  # NumPy's; rows; a vector, strided


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_vectors_are_multiplied_whatever_their_precision(device: Device, dtype: Any) -> None:
    host = np.arange(5, dtype=dtype)
    found = to_host(dot(to_backend(host, "cupy"), to_backend(host, "cupy")))
    assert (found, found.dtype) == (30, np.dtype(dtype))


def test_a_layout_survives_the_way_to_the_host_and_back(device: Device, tmp_path: Path) -> None:
    x = columns()
    assert to_host(x).flags.f_contiguous
    assert to_backend(to_host(x), "cupy").flags.f_contiguous
    model = npnet.mlp([20, 16, 10], rng=0, backend="cupy")
    model.save(tmp_path / "model.npz")
    for before, after in zip(
        model.parameters(), npnet.load(tmp_path / "model.npz", backend="cupy").parameters(), strict=True
    ):
        assert after.value.flags.f_contiguous == before.value.flags.f_contiguous
        np.testing.assert_array_equal(to_host(after.value), to_host(before.value), strict=True)


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_the_updates_of_a_model_that_was_loaded_are_one_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with install_device(raw_kernel=RawKernel):
        npnet.mlp([20, 16, 10], rng=0, backend="cupy").save(tmp_path / "model.npz")
        optimizer, xp = npnet.Adam(1e-2, weight_decay=0.1), npnet.get_backend("cupy").xp
        for whole, launches in ((True, 1), (False, 0)):  # negative control: as CuPy's own asnumpy
            if not whole:
                monkeypatch.setattr("npnet.storage.to_backend", lambda array, name: xp.asarray(array.copy(order="C")))
            model = npnet.load(tmp_path / "model.npz", backend="cupy")
            for parameter in model.parameters():
                parameter.gradient = xp.empty_like(parameter.value)
                parameter.gradient[...] = 1.0
                if parameter.value.ndim == 2 and not whole:
                    parameter.gradient = to_backend(np.ones(parameter.value.shape, np.float32, order="F"), "cupy")
            RawKernel.launches.clear()
            optimizer.step([parameter for parameter in model.parameters() if parameter.value.ndim == 2])
            assert sum("Part part[" in code for code in RawKernel.launches) == launches


def scaled_step(clip: bool) -> tuple[int, int]:
    """Measured and planned bytes of a step whose gradients are clipped, or scaled."""
    model = npnet.mlp([100, 512, 512, 10], "relu", rng=0, backend="cupy")
    x = to_backend(RNG.random((32, 100), np.float32), "cupy")
    y = to_backend(np.eye(10, dtype=np.float32)[np.zeros(32, int)], "cupy")
    loss, optimizer = npnet.SoftmaxCrossEntropy(), npnet.Adam(1e-4)
    plan = npnet.plan(model, 32, loss=loss, optimizer=optimizer, streaming=False)
    options: dict[str, Any] = {"clip_norm": 0.1} if clip else {"scaler": npnet.GradScaler(2.0)}

    def step() -> None:
        npnet.accumulated_step(model, loss, optimizer, plan.schedule, [(x, y)], 32, **options)

    step()
    backend.ones.cache_clear()
    return peak(step) + plan.chain.parameters + plan.chain.optimizer, plan.peak_bytes


@pytest.mark.parametrize("clip", [True, False])
def test_clipping_and_scaling_take_what_is_planned(device: Device, clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, planned = scaled_step(clip)
    assert measured <= planned
    if clip:  # negative control: CuPy's own functions
        monkeypatch.setattr(optimizers, "dot", lambda x, y: npnet.get_backend("cupy").xp.dot(x, y))
    else:
        monkeypatch.setattr(precision, "all_finite", lambda arrays: all(bool(array.max() < np.inf) for array in arrays))
    measured, planned = scaled_step(clip)
    assert measured > 1.1 * planned


def test_numbers_that_are_not_finite_are_found_in_columns(device: Device) -> None:
    for wrong in (np.nan, np.inf, -np.inf):
        host = MATRIX.copy(order="F")
        host[17, 3] = wrong
        assert not checks.all_finite([columns(), to_backend(host, "cupy")])
        assert not checks.all_finite([host])
    assert checks.all_finite([columns(), columns()])


def test_gradients_in_columns_add_up_in_columns(device: Device) -> None:
    parameter = Parameter(columns())
    for _ in range(3):
        parameter.accumulate(columns())
    assert parameter.gradient is not None
    assert parameter.gradient.flags.f_contiguous
    np.testing.assert_array_equal(to_host(parameter.gradient), 3 * MATRIX)
    parameter.accumulate(to_backend(np.ascontiguousarray(MATRIX), "cupy"))  # whatever its layout
    np.testing.assert_array_equal(to_host(parameter.gradient), 4 * MATRIX)


@pytest.mark.parametrize("name", ["numpy", "cupy"])
def test_what_descends_keeps_the_weights_layout(device: Device, name: str) -> None:
    weight, gradient = to_backend(MATRIX, name), to_backend(np.ascontiguousarray(MATRIX), name)
    (new,) = lending.descended("weights", [weight], [gradient], 0.5)
    assert new.flags.f_contiguous
    np.testing.assert_array_equal(to_host(new), MATRIX - MATRIX * 0.5)


@pytest.mark.parametrize("order", ["C", "F"])
def test_casts_keep_the_layout(device: Device, order: Any) -> None:
    for array in (np.asarray(MATRIX, order=order), to_backend(np.asarray(MATRIX, order=order), "cupy")):
        cast = precision._cast(array, np.dtype(np.float16))
        assert cast.flags[f"{order}_CONTIGUOUS"] if array is MATRIX else cast.flags.f_contiguous == (order == "F")
        np.testing.assert_array_equal(to_host(cast), MATRIX.astype(np.float16))


# Time.


def test_a_steps_time_ends_when_the_device_is_done(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    xp, right = npnet.get_backend("cupy").xp, measuring.train_step
    monkeypatch.setattr(xp.cuda.runtime, "deviceSynchronize", lambda: said.append("wait"))
    monkeypatch.setattr(measuring, "train_step", lambda *args: (said.append("step"), right(*args))[1])
    model, plan = npnet.mlp([6, 5, 3], rng=0, backend="cupy"), npnet.schedules.none(2)
    x, y = (to_backend(RNG.random((9, n), np.float32), "cupy") for n in (6, 3))
    npnet.step_costs(model, npnet.Quadratic(), npnet.SGD(0.1), [plan, plan], x, y, rounds=2, log=False)
    assert said[-12:] == ["step", "wait"] * 6  # two plans in two rounds, and one to warm up
    assert "wait" not in said[:-12]
