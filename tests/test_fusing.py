"""Fused kernels: their source, compiled by the C compiler, does what the calls do; and NVIDIA's compiler takes it."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import fusing, pools
from npnet.activations import ACTIVATIONS
from npnet.fusing import FUSED, CannotFuse, Kernel
from tests.kernels import COMPILER, RawKernel
from tests.pool import Device, install_device
from tests.scenarios import fresh_registry as fresh_registry

ELEMENTWISE = [name for name in ACTIVATIONS if name != "softmax"]
OPTIMIZERS: dict[str, Callable[[], npnet.Optimizer]] = {
    "sgd": lambda: npnet.SGD(0.1),
    "momentum": lambda: npnet.SGD(0.1, momentum=0.9),
    "adam": lambda: npnet.Adam(0.01),
    "adam with decay": lambda: npnet.Adam(0.01, beta1=0.8, weight_decay=0.1),
}
RNG = np.random.default_rng(0)
compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")


@pytest.fixture(name="device")
def fusing_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A made-up device that compiles kernels."""
    monkeypatch.setattr(pools, "_kept", [])
    monkeypatch.setattr(fusing, "_kernels", {})
    monkeypatch.setattr(RawKernel, "launches", [])
    monkeypatch.setattr(RawKernel, "compiled", [])
    with install_device(raw_kernel=RawKernel) as device:
        yield device


def rows(dtype: Any, special: bool = True) -> np.ndarray:
    """(7, 5), with what is not a number among them."""
    array = RNG.standard_normal((7, 5)).astype(dtype) * 3
    if special:
        array[0, :4] = np.nan, np.inf, -np.inf, -0.0
    return array


def close(device: Any, host: np.ndarray, exact: bool) -> None:
    """But for the last digits of exp and tanh, which every library rounds in its own way."""
    found = npnet.to_host(device)
    assert found.dtype == host.dtype
    tolerance = 0.0 if exact else 4 * float(np.finfo(host.dtype).eps)
    np.testing.assert_allclose(found, host, rtol=tolerance, atol=0.0)


# Activations.


@compiler
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
def test_an_activation_is_one_kernel_with_the_numbers_of_the_calls(
    device: Device, name: str, bias: bool, dtype: Any
) -> None:
    activation, z, b = ACTIVATIONS[name](), rows(dtype), rows(dtype)[1] if bias else None
    there = npnet.to_backend(z, "cupy"), None if b is None else npnet.to_backend(b, "cupy")
    activation.forward_(*there)
    host = z.copy()
    activation.forward_(host, b)
    close(there[0], host, exact=name in ("relu", "identity"))
    assert len(RawKernel.launches) == (0 if name == "identity" and b is None else 1)

    y, dy = rows(dtype), rows(dtype)
    gradient = npnet.to_backend(dy, "cupy")
    RawKernel.launches.clear()
    assert activation.backward_(gradient, (None, npnet.to_backend(y, "cupy"))) is gradient
    expected = dy.copy()
    activation.backward_(expected, (None, y))
    close(gradient, expected, exact=True)
    assert len(RawKernel.launches) == (0 if name == "identity" else 1)


@compiler
def test_what_is_not_elementwise_runs_as_it_is_written(device: Device) -> None:
    for dtype, name in ((np.float32, "softmax"), (np.float16, "relu")):
        z, activation = rows(dtype, special=False), ACTIVATIONS[name]()
        there = npnet.to_backend(z, "cupy")
        activation.forward_(there)
        activation.forward_(z)
        np.testing.assert_array_equal(npnet.to_host(there), z)
    z = np.asfortranarray(rows(np.float32))
    there = npnet.to_backend(z, "cupy")
    ACTIVATIONS["relu"]().forward_(there, npnet.to_backend(z[1].copy(), "cupy"))  # another layout than the bias needs
    assert not RawKernel.launches
    with pytest.raises(CannotFuse):
        Kernel(lambda z: z.max(), [np.dtype(np.float32)], [False])
    with pytest.raises(CannotFuse):
        Kernel(lambda z: npnet.array_module(z).log(z, out=z), [np.dtype(np.float32)], [False])
    with pytest.raises(CannotFuse):
        Kernel(lambda z: z + 1, [np.dtype(np.float32)], [False])


# Optimizers.


@compiler
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_is_one_kernel_with_the_bits_of_the_calls(device: Device, name: str, dtype: Any, order: str) -> None:
    start, gradients = RNG.standard_normal((6, 4)), [RNG.standard_normal((6, 4)) for _ in range(5)]
    found = []
    for backend in ("cupy", "numpy"):
        parameter = npnet.Parameter(npnet.to_backend(np.array(start, dtype, order=order), backend))
        optimizer = OPTIMIZERS[name]()
        for step, gradient in enumerate(gradients):
            optimizer.learning_rate = 0.1 / (1 + step)  # no new kernel for that
            parameter.accumulate(npnet.to_backend(np.array(gradient, dtype, order=order), backend))
            optimizer.step([parameter])
        found.append([npnet.to_host(array) for array in optimizer.held([parameter])])
    for there, here in zip(*found, strict=True):
        np.testing.assert_array_equal(there, here)
    assert len(RawKernel.launches) == 5
    assert len(RawKernel.compiled) == 1


@compiler
def test_another_momentum_is_another_kernel(device: Device) -> None:
    for momentum in (0.9, 0.5):
        parameter = npnet.Parameter(npnet.to_backend(np.ones((2, 2)), "cupy"))
        optimizer = npnet.SGD(0.5, momentum=momentum)
        for _ in range(2):
            parameter.accumulate(npnet.to_backend(np.ones((2, 2)), "cupy"))
            optimizer.step([parameter])
        assert npnet.to_host(parameter.value)[0, 0] == 1 - 0.5 * (2 + momentum)
    assert len(RawKernel.compiled) == 2


# Training.


def fitted(backend: str, **options: Any) -> list[np.ndarray]:
    model = npnet.mlp([5, 8, 8, 8, 8, 3], "sigmoid", rng=0, backend=backend)
    rng = np.random.default_rng(1)
    data = rng.standard_normal((60, 5)).astype(np.float32), np.eye(3, dtype=np.float32)[rng.integers(3, size=60)]
    moved = tuple(npnet.to_backend(array, backend) for array in data)
    npnet.fit(model, moved, loss=npnet.SoftmaxCrossEntropy(), optimizer=npnet.Adam(1e-2), epochs=2, batch_size=20,
              rng=0, log=False, **options)  # fmt: skip
    return [npnet.to_host(each.value) for each in model.parameters()]


@compiler
def test_training_with_kernels_gives_the_same_bits_under_every_schedule(device: Device) -> None:
    plain = fitted("cupy")
    assert len(set(RawKernel.compiled)) == 4  # sigmoid both ways, the identity's bias, Adam
    for options in ({"schedule": "sqrt"}, {"schedule": "revolve"}, {"memory_budget": "31 kB"}, {"clip_norm": 0.1}):
        found = fitted("cupy", **options)
        assert "clip_norm" in options or all(map(np.array_equal, found, plain))
    for there, here in zip(plain, fitted("numpy"), strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-5)


@compiler
def test_a_step_with_kernels_takes_no_more_than_is_predicted(device: Device) -> None:
    model = npnet.mlp([5, 60, 60, 60, 3], "sigmoid", rng=0, backend="cupy")
    x, y = (npnet.to_backend(np.ones((500, n), np.float32) / n, "cupy") for n in (5, 3))
    optimizer, loss = npnet.Adam(0.0), npnet.SoftmaxCrossEntropy()
    plan = npnet.plan(model, 500, loss=loss, optimizer=optimizer)
    npnet.train_step(model, loss, optimizer, plan.schedule, x, y)
    report = npnet.measure_peak(npnet.train_step, model, loss, optimizer, plan.schedule, x, y, backend="cupy")
    assert report.increase_bytes + plan.chain.parameters + plan.chain.optimizer <= plan.peak_bytes


@compiler
def test_measured_steps_are_on_arrays_of_the_same_layout(device: Device) -> None:
    """Copies in another layout would be updated call by call."""
    model = npnet.mlp([5, 4, 3], "tanh", rng=0, backend="cupy")
    x, y = (npnet.to_backend(np.ones((9, n), np.float32) / n, "cupy") for n in (5, 3))
    npnet.step_costs(model, npnet.SoftmaxCrossEntropy(), npnet.Adam(), [npnet.schedules.none(2)], x, y, rounds=1)
    updates = sum("double f1" in source for source in RawKernel.launches)
    assert updates == 4 * 4  # four steps, four parameters


def test_nothing_is_replaced_before_a_gpu_is_there_nor_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [vars(cls)[name] for cls, name, _ in FUSED]
    assert not any(hasattr(method, "__wrapped__") for method in before)
    with install_device():  # which compiles no kernels
        assert [vars(cls)[name] for cls, name, _ in FUSED] == before
    with install_device(raw_kernel=RawKernel):
        assert all(hasattr(vars(cls)[name], "__wrapped__") for cls, name, _ in FUSED)
    assert [vars(cls)[name] for cls, name, _ in FUSED] == before
    monkeypatch.setenv("NPNET_FUSE", "0")
    with install_device(raw_kernel=RawKernel):
        assert [vars(cls)[name] for cls, name, _ in FUSED] == before


@compiler
def test_a_wrong_expression_would_be_noticed(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fusing.EXPRESSIONS, "subtract", "{1} - {0}")
    y, dy = rows(np.float32, special=False), rows(np.float32, special=False)
    gradient = npnet.to_backend(dy, "cupy")
    ACTIVATIONS["tanh"]().backward_(gradient, (None, npnet.to_backend(y, "cupy")))
    ACTIVATIONS["tanh"]().backward_(dy, (None, y))
    assert not np.allclose(npnet.to_host(gradient), dy)


# NVIDIA's compiler, which needs no GPU.


def kernels(dtype: Any) -> Iterator[Kernel]:
    """Every kernel that npnet makes."""
    kind = np.dtype(dtype)
    for name in ELEMENTWISE:
        activation = ACTIVATIONS[name]()
        yield Kernel(activation.forward_, [kind, kind], [False, True])
        if name != "identity":
            yield Kernel(activation.forward_, [kind], [False])
            yield Kernel(lambda dy, y, a=activation: a.backward_(dy, (None, y)), [kind, kind], [False, False])
    for make in OPTIMIZERS.values():
        optimizer = make()
        names = optimizer.state_names

        def method(weight: Any, gradient: Any, *rest: Any) -> None:
            parameter = npnet.Parameter(weight)
            optimizer._state = {parameter: dict(zip(names, rest, strict=False))}  # noqa: B023
            optimizer._update(parameter, gradient, *rest[len(names) :])  # noqa: B023

        count = 2 + len(names)
        yield Kernel(method, [kind] * count, [False] * count, len(optimizer._factors(1)), scratch=[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nvidias_compiler_takes_every_kernel(dtype: Any) -> None:
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc")
    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"no compiler: {error}")
    sources = [kernel.source for kernel in kernels(dtype)]
    assert len(sources) == 14
    for source in [*sources, sources[0].replace("exp(", "expp(")]:
        program = nvrtc.createProgram(source, "fused.cu", (), ())
        try:
            nvrtc.compileProgram(program, ("-arch=compute_80", "--fmad=false"))
        except nvrtc.NVRTCError:
            assert "expp" in source  # the control
        else:
            assert "expp" not in source
            assert b".entry fused" in nvrtc.getPTX(program)


def test_cupy_compiles_kernels() -> None:
    cupy = pytest.importorskip("cupy")
    kernel = next(kernels(np.float32))
    raw = functools.partial(cupy.RawKernel, kernel.source, "fused")
    assert raw(options=("--fmad=false",)).name == "fused"
