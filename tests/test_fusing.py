"""Kernels made of formulas: compiled by the C compiler they do what the calls do; and NVIDIA's compiler takes them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest

import npnet
from npnet import fusing, pools, random, symbols
from npnet.activations import ACTIVATIONS
from npnet.fusing import FUSED
from npnet.kernels import Kernel
from npnet.losses import LOSSES
from npnet.symbols import CannotFuse
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
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (9, 4), (33, 10), (8, 67)])
def test_softmax_is_one_kernel_that_goes_through_each_row_three_times(
    device: Device, shape: tuple[int, int], dtype: Any
) -> None:
    softmax, z, bias = ACTIVATIONS["softmax"](), RNG.standard_normal(shape).astype(dtype) * 50, np.ones(shape[1], dtype)
    z[0, 0] = 1e4  # without the maximum it would overflow
    there = npnet.to_backend(z, "cupy")
    softmax.forward_(there, npnet.to_backend(bias, "cupy"))
    softmax.forward_(z, bias)
    near(there, z)
    assert len(RawKernel.launches) == 1
    assert RawKernel.launches[0].count("for (unsigned int c") == 3

    dy = RNG.standard_normal(shape).astype(dtype)
    gradient = npnet.to_backend(dy, "cupy")
    softmax.backward_(gradient, (None, there))
    softmax.backward_(dy, (None, z))
    near(gradient, dy)
    assert len(RawKernel.launches) == 2


def near(device: Any, host: np.ndarray) -> None:
    """But for the order in which sums are added up."""
    found, eps = npnet.to_host(device), float(np.finfo(host.dtype).eps)
    assert (found.dtype, found.shape) == (host.dtype, host.shape)
    np.testing.assert_allclose(found, host, rtol=1e4 * eps, atol=100 * eps)


@compiler
def test_what_cannot_be_a_kernel_runs_as_it_is_written(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    z, activation = rows(np.float16, special=False), ACTIVATIONS["relu"]()
    there = npnet.to_backend(z, "cupy")
    activation.forward_(there)
    activation.forward_(z)
    np.testing.assert_array_equal(npnet.to_host(there), z)
    z = np.asfortranarray(rows(np.float32, special=False))
    there = npnet.to_backend(z, "cupy")
    ACTIVATIONS["relu"]().forward_(there, npnet.to_backend(z[1].copy(), "cupy"))  # another layout than the bias needs
    ACTIVATIONS["softmax"]().forward_(there)  # ... than rows need
    monkeypatch.setattr(fusing, "MOST_NUMBERS", 4)
    ACTIVATIONS["relu"]().forward_(npnet.to_backend(np.ones((2, 2)), "cupy"))
    assert not RawKernel.launches
    xp, kind = npnet.array_module, [np.dtype(np.float32)]
    for method in (
        lambda z: z.max(),
        lambda z: z.sum(axis=0, keepdims=True),
        lambda z: z.sum(axis=1),
        lambda z: xp(z).sin(z, out=z),
        lambda z: xp(z).add(z, np.inf, out=z),
        lambda z: xp(z).exp(z.sum(axis=1, keepdims=True), out=z),  # a number for a row, in the place of elements
        lambda z: z + 1,
        lambda z: z.sum() * xp(z).exp(z),
        lambda z: z.shape,
        lambda z: None,
    ):
        with pytest.raises(CannotFuse):
            Kernel(method, kind, [False])
    with pytest.raises(CannotFuse):
        Kernel(ACTIVATIONS["softmax"]().forward_, kind, [False], parts=2)
    with pytest.raises(CannotFuse):
        Kernel(lambda z, b: xp(z).add(z, b, out=b), kind * 2, [False, True])


# Losses.


@compiler
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (8, 4), (33, 10), (5, 67)])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_one_kernel_and_a_sum_over_the_rows(
    device: Device, name: str, shape: tuple[int, int], dtype: Any
) -> None:
    loss, output = LOSSES[name](), RNG.standard_normal(shape).astype(dtype) * 30
    target = RNG.dirichlet(np.ones(shape[1]), shape[0]).astype(dtype)
    value, gradient = loss.value_and_gradient(npnet.to_backend(output, "cupy"), npnet.to_backend(target, "cupy"))
    expected, slope = loss.value_and_gradient(output, target)
    near(value, np.asarray(expected))
    near(gradient, slope)
    assert len(RawKernel.launches) == 1
    assert device.streams.syncs == {"asnumpy": 2}  # near, that is

    output[0, 0] = np.nan
    value, gradient = loss.value_and_gradient(npnet.to_backend(output, "cupy"), npnet.to_backend(target, "cupy"))
    assert np.isnan(npnet.to_host(value))
    assert np.isnan(npnet.to_host(gradient)[0, 0])


@compiler
def test_a_loss_of_arrays_that_differ_in_layout_runs_as_it_is_written(device: Device) -> None:
    output, target = np.ones((3, 2), np.float32), np.eye(3, 2)
    for there, kernels in (((np.asfortranarray(output), target.astype(np.float32)), 0), ((output, target), 1)):
        value, _ = npnet.MeanSquaredError().value_and_gradient(*(npnet.to_backend(each, "cupy") for each in there))
        assert float(value) == pytest.approx(2 / 3)
        assert len(RawKernel.launches) == kernels


# Masks.


@compiler
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (257, 33), (1, 0)])
def test_a_mask_is_one_kernel_with_numpys_bits(device: Device, shape: tuple[int, int]) -> None:
    xp = npnet.get_backend("cupy").xp
    for key, step, p in ((0, 0, 0.5), (2**63 - 1, 2**63 - 1, 1 / 3), (7, 2**40 + 3, 0.9)):
        RawKernel.launches.clear()
        with random.rows_from(3):
            there, here = (random.keep_mask(module, shape, p, key, step) for module in (xp, np))
        np.testing.assert_array_equal(npnet.to_host(there), here)
        assert len(RawKernel.launches) == (1 if here.size else 0)
    assert len(RawKernel.compiled) <= 1  # whatever key, step and probability


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
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_of_all_sizes_are_updated_in_one_launch(device: Device, name: str) -> None:
    sizes = [(3, 2), (300, 5), (1,), (7, 7), (0, 3)]
    found = []
    for backend in ("cupy", "numpy"):
        rng, optimizer = np.random.default_rng(0), OPTIMIZERS[name]()
        arrays = [rng.standard_normal(size).astype(np.float32) for size in sizes]
        parameters = [npnet.Parameter(npnet.to_backend(array, backend)) for array in arrays]
        for step in range(3):
            given = parameters[step % 2 :]  # the first is updated less often: Adam's factors are others
            for parameter in given:
                gradient = rng.standard_normal(parameter.value.shape).astype(np.float32)
                parameter.accumulate(npnet.to_backend(gradient, backend))
            optimizer.step(given)
            assert all(parameter.gradient is None for parameter in parameters)
        found.append([npnet.to_host(array) for array in optimizer.held(parameters)])
    for there, here in zip(*found, strict=True):
        np.testing.assert_array_equal(there, here)
    assert len(RawKernel.launches) == (4 if "adam" in name else 3)


@compiler
def test_more_parameters_than_a_launch_takes(device: Device) -> None:
    found = []
    for backend in ("cupy", "numpy"):
        parameters = [npnet.Parameter(npnet.to_backend(np.full(3, i), backend)) for i in np.arange(150.0)]
        for parameter in parameters:
            parameter.accumulate(npnet.to_backend(np.full(3, 2.0), backend))
        npnet.Adam(0.5).step(parameters)
        found.append([npnet.to_host(parameter.value) for parameter in parameters])
    np.testing.assert_array_equal(*found)
    assert len(RawKernel.launches) == 3


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
    assert len(set(RawKernel.compiled)) == 5  # sigmoid both ways, the identity's bias, the loss, Adam
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
    assert updates == 4 * 2  # four steps, two layers


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
    monkeypatch.setitem(symbols.EXPRESSIONS, "subtract", "{1} - {0}")
    y, dy = rows(np.float32, special=False), rows(np.float32, special=False)
    gradient = npnet.to_backend(dy, "cupy")
    ACTIVATIONS["tanh"]().backward_(gradient, (None, npnet.to_backend(y, "cupy")))
    ACTIVATIONS["tanh"]().backward_(dy, (None, y))
    assert not np.allclose(npnet.to_host(gradient), dy)


@compiler
def test_rows_that_are_not_put_together_would_be_noticed(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads of a row, each with its part of a sum."""
    whole = Kernel._whole
    lone = lambda self, *parts: whole(self, *parts).replace("__shfl_xor_sync(~0u, ", "(0 * lane, ")  # noqa: E731
    monkeypatch.setattr(Kernel, "_whole", lone)
    z = rows(np.float64, special=False)
    there = npnet.to_backend(z, "cupy")
    ACTIVATIONS["softmax"]().forward_(there)
    ACTIVATIONS["softmax"]().forward_(z)
    assert not np.allclose(npnet.to_host(there), z)


# NVIDIA's compiler, which needs no GPU.


class Noted:
    """A RawKernel that is never run."""

    sources: ClassVar[list[str]] = []

    def __init__(self, code: str, name: str, options: tuple[str, ...]) -> None:
        self.sources.append(code)

    def __call__(self, *_: Any) -> None: ...


def every_kernel(monkeypatch: pytest.MonkeyPatch, dtype: Any) -> list[str]:
    """The source of every kernel that npnet makes."""
    monkeypatch.setattr(fusing, "_kernels", {})
    monkeypatch.setattr(Noted, "sources", [])
    with install_device(raw_kernel=Noted), np.errstate(all="ignore"):  # what no kernel wrote is summed
        x = npnet.to_backend(np.full((4, 3), 0.25, dtype), "cupy")
        for name in ACTIVATIONS:
            activation = ACTIVATIONS[name]()
            activation.forward_(x, x[0])
            activation.forward_(x)
            activation.backward_(x, (None, x))
        for make_loss in LOSSES.values():
            make_loss().value_and_gradient(x, x)
        for make in OPTIMIZERS.values():
            for count in (1, 3):
                parameters = [npnet.Parameter(x.copy()) for _ in range(count)]
                for parameter in parameters:
                    parameter.accumulate(x.copy())
                make().step(parameters)
        npnet.Dropout(0.5, key=1).forward(x)
    return Noted.sources


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nvidias_compiler_takes_every_kernel(monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    sources = every_kernel(monkeypatch, dtype)
    assert len(sources) == 25
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc")
    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"no compiler: {error}")
    for source in [*sources, sources[0].replace("exp(", "expp(")]:
        program = nvrtc.createProgram(source, "fused.cu", (), ())
        try:
            nvrtc.compileProgram(program, ("-arch=compute_80", "--fmad=false"))
        except nvrtc.NVRTCError:
            assert "expp" in source, source  # the control
        else:
            assert "expp" not in source
            assert b".entry fused" in nvrtc.getPTX(program)


def test_cupy_compiles_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = pytest.importorskip("cupy")
    raw = functools.partial(cupy.RawKernel, every_kernel(monkeypatch, np.float32)[0], "fused")
    assert raw(options=("--fmad=false",)).name == "fused"
