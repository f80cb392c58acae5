"""npnet on a device, without one: every step runs on the guard backend, gives NumPy's bits, and uses what CuPy has."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import backend as registry
from npnet import schedules
from npnet.activations import ACTIVATIONS
from npnet.backend import backend_of
from npnet.losses import LOSSES, check_finite
from tests.guard import METHODS, DeviceArray, GuardModule, install_guard

SIZES = [5, 4, 6, 4, 3, 4, 3]
OPTIMIZERS: dict[str, Callable[[], npnet.Optimizer]] = {
    "sgd": lambda: npnet.SGD(0.5),
    "momentum": lambda: npnet.SGD(0.1, momentum=0.9),
    "adam": lambda: npnet.Adam(0.01),
}


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees, or leaves behind, a backend loaded or chosen by another."""
    for name in ("_loaders", "_loaded", "_by_type"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    monkeypatch.setattr(registry, "_current", None)
    monkeypatch.delenv("NPNET_BACKEND", raising=False)


@pytest.fixture
def xp() -> Iterator[GuardModule]:
    with install_guard() as module:
        yield module


# What npnet does with arrays, each as a function of the backend's name that returns all numbers it came to.


def batch(backend: str, samples: int = 8, dtype: Any = np.float64) -> tuple[Any, Any]:
    """Rows x, and one-hot rows y, on ``backend``."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((samples, SIZES[0])).astype(dtype)
    y = np.eye(SIZES[-1], dtype=dtype)[rng.integers(SIZES[-1], size=samples)]
    return npnet.to_backend(x, backend), npnet.to_backend(y, backend)


def network(backend: str | None, *args: Any, **options: Any) -> npnet.NetworkWithCheckpointing:
    return npnet.NetworkWithCheckpointing(SIZES, *args, rng=0, backend=backend, **options)


def parameters(net: npnet.Network) -> list[Any]:
    return [*net.weights, *net.biases]


def steps(backend: str, *args: Any, **options: Any) -> list[Any]:
    net = network(backend, *args, **options)
    for _ in range(3):
        net.update_mini_batch(batch(backend, dtype=net.dtype), 3.0)
    return parameters(net)


def finite_differences(backend: str) -> list[Any]:
    """A weight lent out, changed in place, kept while the network goes on, and handed to another network."""
    net, other = network(backend), network(backend)
    net.weights[0][0, 0] += 0.25
    net.biases[1][2, 0] -= 0.5
    before = net.weights
    net.update_mini_batch(batch(backend), 3.0)
    other.weights, other.biases = before, net.biases
    other.biases[0] = other.biases[0] * 2.0
    other.update_mini_batch(batch(backend), 3.0)
    return [*before, *parameters(net), *parameters(other)]


def predictions(backend: str) -> list[Any]:
    net, (x, y) = network(backend), batch(backend, 1030)  # more than evaluate runs at a time
    return [net.feedforward(x), net.evaluate((x, y)), *net.forward_between_checkpoints(x.T, 0, 3)]


def gradients(backend: str) -> list[Any]:
    x, y = batch(backend)
    nabla_b, nabla_w = network(backend, 2).backprop(x.T, y.T)
    return [*nabla_b, *nabla_w]


def sgd(backend: str) -> list[Any]:
    net, data = network(backend, 3), batch(backend, 20)
    net.SGD(data, 2, 6, 3.0, test_data=data)
    return parameters(net)


class CrossEntropy(npnet.NetworkWithCheckpointing):
    """What students write: another cost, and the gradient taken in their own hands."""

    def cost_derivative(self, output_activations: Any, y: Any) -> Any:
        return (output_activations - y) / (output_activations * (1 - output_activations))

    def backprop(self, x: Any, y: Any) -> Any:
        nabla_b, nabla_w = super().backprop(x, y)
        return [2.0 * nabla for nabla in nabla_b], nabla_w


def subclass(backend: str) -> list[Any]:
    net = CrossEntropy(SIZES, 2, rng=0, backend=backend)
    net.update_mini_batch(batch(backend), 0.5)
    return parameters(net)


def chain(backend: str, activation: str, loss: str, optimizer: str) -> list[Any]:
    """Three steps of an MLP on two batches each: losses and parameters."""
    model = npnet.mlp([5, 4, 4, 3], activation, activation, rng=0, backend=backend)
    x, y = batch(backend, dtype=np.float32)
    criterion, descent, values = LOSSES[loss](), OPTIMIZERS[optimizer](), []

    def output_gradient(output: Any) -> Any:
        value, gradient = criterion.value_and_gradient(output, y)
        values.append(value)
        return gradient

    run = partial(npnet.backpropagate, model.layers, schedules.every_nth(3, 2), x, output_gradient)
    for _ in range(3):
        run()
        run(after_backward=lambda layer: descent.step(layer.parameters()))
    return [*values, *(parameter.value for parameter in model.parameters())]


def layers_alone(backend: str) -> list[Any]:
    """The layers as functions: forward, backward and predict, each activation also outside a dense layer."""
    x, y = batch(backend, dtype=np.float32)
    model = npnet.Sequential(*(cls() for cls in ACTIVATIONS.values()), npnet.Dense(5, 3, rng=0, backend=backend))
    output, saved = model.forward(x)
    loss = npnet.SoftmaxCrossEntropy()
    loss.check_targets(y, 3)
    dx = model.backward(loss.value_and_gradient(output, y)[1], saved)
    return [x, output, dx, loss(output, y), model.predict(x), *(p.gradient for p in model.parameters())]


def complaint(backend: str, wrong: str) -> list[str]:
    """The whole text of an error: on the way to it come computations that no correct run makes."""
    net, (x, y) = network(backend), batch(backend)
    if wrong == "nan":
        x[3, 2] = float("nan")
    elif wrong == "not one-hot":
        y[5] = 1.0
    elif wrong == "diverged":
        y[0, 0] = 1e200
    else:
        y[1, 2] = 0.25
    try:
        if wrong == "no probabilities":
            npnet.SoftmaxCrossEntropy().check_targets(y, 3)
        net.SGD((x, y), 1, 4, 3.0, test_data=(x, y) if wrong == "not one-hot" else None)
    except (ValueError, npnet.TrainingDiverged) as error:
        return [str(error)]
    raise AssertionError("nothing was refused")


STEPS: dict[str, Callable[[str], list[Any]]] = {
    "plain": steps,
    **{f"every {n}": partial(steps, checkpoint_every_nth_layer=n) for n in (1, 2, 3, 4, 5, 6, 9)},
    "sqrt": partial(steps, schedule="sqrt"),
    "float32": partial(steps, checkpoint_every_nth_layer=2, dtype=np.float32),
}
CHAINS: dict[str, Callable[[str], list[Any]]] = {
    "-".join(names): partial(chain, activation=names[0], loss=names[1], optimizer=names[2])
    for names in product(ACTIVATIONS, LOSSES, OPTIMIZERS)
}
OTHERS: dict[str, Callable[[str], list[Any]]] = {
    **{f.__name__: f for f in (finite_differences, predictions, gradients, sgd, subclass, layers_alone)},
    **{w: partial(complaint, wrong=w) for w in ("nan", "not one-hot", "diverged", "no probabilities")},
}
SCENARIOS = STEPS | CHAINS | OTHERS


# The package on the guard backend.


@pytest.mark.parametrize("name", SCENARIOS)
def test_guard_gives_the_bits_of_numpy(xp: GuardModule, name: str) -> None:
    on_device, on_host = SCENARIOS[name]("guard"), SCENARIOS[name]("numpy")
    assert len(on_device) == len(on_host)
    for device, host in zip(on_device, on_host, strict=True):
        if not isinstance(host, (np.ndarray, np.generic)):  # an accuracy, a message
            assert device == host
            continue
        assert isinstance(device, DeviceArray)
        assert (device.shape, device.dtype) == (host.shape, host.dtype)
        assert np.isfinite(host).all()
        np.testing.assert_array_equal(npnet.to_host(device), host)


def test_the_steps_compared_are_steps() -> None:
    """All schedules agree, and none of them stays where it began: two networks that do nothing are equal, too."""
    start = parameters(network("numpy"))
    ends = {name: run("numpy") for name, run in STEPS.items() if name != "float32"}
    for end in ends.values():
        assert all(map(np.array_equal, end, ends["plain"]))
        assert not any(map(np.array_equal, end, start))


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_for_the_device_once(xp: GuardModule, name: str) -> None:
    STEPS[name]("guard")
    assert xp.syncs == {"float": 3}  # steps: three, and in each the check that the loss is finite


@pytest.mark.parametrize("name", CHAINS)
def test_the_engine_itself_never_waits(xp: GuardModule, name: str) -> None:
    CHAINS[name]("guard")
    assert not xp.syncs


@pytest.mark.parametrize(("network_on", "data_on"), [("guard", "numpy"), ("numpy", "guard")])
@pytest.mark.parametrize("call", ["update_mini_batch", "feedforward", "evaluate", "backprop", "SGD", "weights", "item"])
@pytest.mark.usefixtures("xp")
def test_a_network_refuses_the_arrays_of_another_backend(network_on: str, data_on: str, call: str) -> None:
    net, (x, y) = network(network_on), batch(data_on)
    calls: dict[str, Callable[[], Any]] = {
        "update_mini_batch": lambda: net.update_mini_batch((x, y), 1.0),
        "feedforward": lambda: net.feedforward(x),
        "evaluate": lambda: net.evaluate((x, y)),
        "backprop": lambda: net.backprop(x.T, y.T),
        "SGD": lambda: net.SGD((x, y), 1, 4, 1.0),
        "weights": lambda: setattr(net, "weights", network(data_on).weights),
        "item": lambda: net.weights.__setitem__(0, network(data_on).weights[0]),
    }
    with pytest.raises(TypeError) as error:
        calls[call]()
    message = str(error.value)
    assert f"on backend {network_on!r}" in message
    assert f"on {data_on}" in message
    assert f"npnet.to_backend(array, {network_on!r})" in message


@pytest.mark.parametrize(("layer_on", "data_on"), [("guard", "numpy"), ("numpy", "guard")])
@pytest.mark.usefixtures("xp")
def test_layers_and_losses_refuse_the_arrays_of_another_backend(layer_on: str, data_on: str) -> None:
    layer, (x, y) = npnet.Dense(5, 3, rng=0, backend=layer_on), batch(data_on, dtype=np.float32)
    with pytest.raises(TypeError, match=f"input is on backend '{data_on}', the weights on '{layer_on}'.*to_backend"):
        layer.forward(x)
    output, _ = layer.forward(npnet.to_backend(x, layer_on))
    for loss in LOSSES.values():
        with pytest.raises(
            TypeError, match=f"output is on backend '{layer_on}', the target on '{data_on}'.*to_backend"
        ):
            loss()(output, y)


def test_to_backend_and_to_host_copy_only_between_backends(xp: GuardModule) -> None:
    host = np.asfortranarray(np.ones((2, 3)))
    device = npnet.to_backend(host, "guard")
    assert isinstance(device, DeviceArray)
    assert device.flags.f_contiguous  # the layout that products like best survives
    assert backend_of(device).xp is npnet.array_module(device) is xp
    assert npnet.to_backend(device, "guard") is device
    assert npnet.to_backend(host, "numpy") is npnet.to_host(host) is host
    device[0, 0] = 5.0
    back = npnet.to_host(device)
    assert (back[0, 0], host[0, 0]) == (5.0, 1.0)
    back[0, 0] = 6.0
    assert npnet.to_backend(device, "numpy")[0, 0] == 5.0
    assert xp.syncs == {"asnumpy": 2}
    with pytest.raises(TypeError, match="expected an array of 'numpy', 'guard', got list"):
        npnet.array_module([1.0])


# What the package calls exists in CuPy.


def missing_names(module: Any, names: set[str]) -> set[str]:
    return {name for name in names if not hasattr(module, name)}


def refused_keywords(module: Any, used: dict[str, set[str]]) -> set[tuple[str, str]]:
    """(function, keyword) for what the signatures, or for ufuncs CuPy's manual, do not list."""
    refused = set()
    for name, keywords in used.items():
        function = getattr(module, name)
        known = inspect.signature(function).parameters if inspect.isfunction(function) else {"out", "dtype", "casting"}
        refused |= {(name, keyword) for keyword in keywords if keyword not in known}
    return refused


def test_cupy_has_every_function_that_npnet_calls(xp: GuardModule) -> None:
    cupy = pytest.importorskip("cupy")
    for run in SCENARIOS.values():
        run("guard")
    assert {"dot", "exp", "tanh", "maximum", "sqrt", "log", "copyto", "argwhere"} <= xp.functions_used
    assert not missing_names(cupy, xp.functions_used)
    assert not refused_keywords(cupy, xp.keywords_used)
    xp.spacing(1.0)  # NumPy has it, CuPy has not
    xp.zeros(2, like=None)
    assert missing_names(cupy, xp.functions_used) == {"spacing"}
    assert refused_keywords(cupy, {"zeros": xp.keywords_used["zeros"]}) == {("zeros", "like")}


def test_cupy_has_every_method_that_the_guard_offers() -> None:
    cupy = pytest.importorskip("cupy")
    for name, keywords in METHODS.items():
        signature = getattr(cupy.ndarray, name).__doc__.splitlines()[0]
        assert set(keywords.split()) <= set(re.findall(r"\w+", signature))


def test_a_function_that_cupy_lacks_is_found(xp: GuardModule) -> None:
    """The control for the two tests above, where there is no CuPy."""

    def zeros(shape: Any, dtype: Any = float) -> None: ...

    xp.zeros(2, like=None)
    xp.exp(xp.zeros(2), where=True)
    module = SimpleNamespace(zeros=zeros, exp=np.exp)
    assert missing_names(module, xp.functions_used | {"log"}) == {"log"}
    assert refused_keywords(module, xp.keywords_used) == {("zeros", "like"), ("exp", "where")}


# The guard guards.


def device_and_host(backend: str = "guard") -> tuple[Any, np.ndarray]:
    host = np.arange(1.0, 7.0).reshape(2, 3)
    return npnet.to_backend(host, backend), host


REFUSED: dict[str, Callable[[Any, np.ndarray, GuardModule], Any]] = {
    "asarray": lambda x, host, xp: np.asarray(x),
    "array of a list": lambda x, host, xp: np.array([x, x]),
    "ufunc": lambda x, host, xp: np.exp(x),
    "ufunc with a scalar": lambda x, host, xp: np.add(x, 1),
    "ufunc out": lambda x, host, xp: np.exp(host, out=x),
    "function": lambda x, host, xp: np.concatenate([x, x]),
    "reduction": lambda x, host, xp: np.sum(x),
    "method of a host array": lambda x, host, xp: host.dot(x.T),
    "device + host": lambda x, host, xp: x + host,
    "host + device": lambda x, host, xp: host + x,
    "host @ device": lambda x, host, xp: host @ x.T,
    "host == device": lambda x, host, xp: host == x,
    "0-d host": lambda x, host, xp: x * np.asarray(2.0),
    "0-d host first": lambda x, host, xp: np.asarray(2.0) * x,
    "device += host": lambda x, host, xp: x.__iadd__(host),
    "host += device": lambda x, host, xp: host.__iadd__(x) is NotImplemented or host + x,
    "list": lambda x, host, xp: x * [1.0, 2.0, 3.0],
    "list to a ufunc": lambda x, host, xp: xp.add(x, [1.0, 2.0, 3.0]),
    "xp ufunc": lambda x, host, xp: xp.add(x, host),
    "xp function": lambda x, host, xp: xp.dot(x, host.T),
    "xp function in a list": lambda x, host, xp: xp.concatenate([x, host]),
    "xp out": lambda x, host, xp: xp.exp(x, out=host),
    "xp copyto": lambda x, host, xp: xp.copyto(x, host),
    "method": lambda x, host, xp: x.dot(host.T),
    "assignment": lambda x, host, xp: x.__setitem__(0, host[0]),
    "host index": lambda x, host, xp: x[np.array([True, False])],
    "keyword unknown to CuPy": lambda x, host, xp: x.sum(where=True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_guard_refuses(xp: GuardModule, name: str) -> None:
    x, host = device_and_host()
    with pytest.raises(TypeError, match=r"device|DeviceArray|CuPy"):
        REFUSED[name](x, host, xp)
    assert not xp.syncs


SAME: dict[str, Callable[[Any, Any], Any]] = {
    "arithmetic": lambda x, xp: (1 - x) * 2.0 / (x + 3) ** 2 // 0.1 % 2 - -x,
    "numpy scalar": lambda x, xp: np.float64(2) * x + x * np.float64(3),
    "matmul": lambda x, xp: x @ x.T,
    "comparisons": lambda x, xp: (x > 2) & (x <= 5) | ~(x != 1) ^ (x == 3) & (x >= 1) & (x < 9),
    "reductions": lambda x, xp: (
        x.sum() + x.max(axis=1, keepdims=True) * x.min() - x.mean(axis=0) + x.argmax() + x.argmin()
    ),
    "reductions to 0-d": lambda x, xp: x.sum(),
    "any, all": lambda x, xp: (x > 2).any() & (x > 0).all(),
    "dot of vectors": lambda x, xp: xp.dot(x[0], x[1]),
    "method dot": lambda x, xp: x.dot(x.T),
    "element": lambda x, xp: x[1, 2],
    "slice": lambda x, xp: x[:, ::2],
    "index array": lambda x, xp: x[xp.asarray([1, 0, 1])],
    "mask": lambda x, xp: x[x > 2],
    "shapes": lambda x, xp: x.reshape(3, 2).T.ravel(order="F").reshape(-1, 1).astype(np.float32).transpose(),
    "newaxis and pi": lambda x, xp: x[:, xp.newaxis] * xp.pi + xp.float32(2),
    "where": lambda x, xp: xp.where(x > 2, x, 0.0),
    "concatenate": lambda x, xp: xp.concatenate([x, x], axis=1),
}


@pytest.mark.parametrize("name", SAME)
def test_guard_computes_what_numpy_computes(xp: GuardModule, name: str) -> None:
    x, host = device_and_host()
    device, expected = SAME[name](x, xp), SAME[name](host, np)
    assert isinstance(device, DeviceArray)
    assert (device.shape, device.dtype, device.ndim) == (expected.shape, expected.dtype, expected.ndim)
    np.testing.assert_array_equal(npnet.to_host(device), expected)


def test_guard_writes_in_place_as_numpy_does(xp: GuardModule) -> None:
    x, host = device_and_host()
    same, out = x, xp.empty_like(x)
    assert xp.add(x, 1.0, out=out) is out
    for a in (x, host):
        a += 1
        a -= 0.5
        a *= a
        a /= 2
        a[1] = 7.0
        a[0, 0] += 1.0
        a[a > 20] = 0.0
    assert x is same
    np.testing.assert_array_equal(npnet.to_host(x), host)
    view = x[0]
    view.fill(3.0)
    element = x[1, 1]
    element += 1.0  # a view too, unlike NumPy's scalar
    assert npnet.to_host(x).tolist() == [[3.0, 3.0, 3.0], [7.0, 8.0, 7.0]]
    assert xp.may_share_memory(x, view) is True
    assert xp.may_share_memory(x, out) is False
    assert isinstance(x.copy(order="F"), DeviceArray)
    assert x.copy(order="F").flags.f_contiguous
    assert (len(x), x.size, x.nbytes) == (2, 6, 48)
    with pytest.raises(TypeError, match="unhashable"):
        hash(x)


WAITS: dict[str, tuple[str, Callable[[Any, GuardModule], Any]]] = {
    "float": ("float", lambda x, xp: float(x.sum())),
    "int": ("int", lambda x, xp: int(x.argmax())),
    "bool": ("bool", lambda x, xp: bool((x > 2).any())),
    "if": ("bool", lambda x, xp: 1 if x.max() > 2 else 0),
    "index": ("index", lambda x, xp: [1, 2, 3, 4, 5, 6][x.argmax()]),
    "item": ("item", lambda x, xp: x.sum().item()),
    "iteration": ("iteration", lambda x, xp: list(x)),
    "unpacking": ("iteration", lambda x, xp: max(*x[0, :1], 0, key=id)),
    "repr": ("repr", lambda x, xp: repr(x)),
    "f-string": ("repr", lambda x, xp: f"{x}"),
    "asnumpy": ("asnumpy", lambda x, xp: npnet.to_host(x)),
    "check_finite": ("float", lambda x, xp: check_finite(x.sum())),
    "mask": ("mask", lambda x, xp: x[x > 2]),
    "argwhere": ("argwhere", lambda x, xp: xp.argwhere(x)),
    "array_equal": ("bool", lambda x, xp: bool(xp.array_equal(x, x))),
}


@pytest.mark.parametrize("name", WAITS)
def test_guard_counts_each_wait(xp: GuardModule, name: str) -> None:
    cause, wait = WAITS[name]
    x, _ = device_and_host()
    assert not xp.syncs
    wait(x, xp)
    assert xp.syncs == {cause: 1}


class Spy(npnet.Dense):
    """A dense layer whose forward pass does one thing more with its input."""

    def __init__(self, more: Callable[[Any], Any]) -> None:
        super().__init__(5, 3, rng=0, backend="guard")
        self.more = more

    def forward(self, x: Any) -> Any:
        self.more(x)
        return super().forward(x)


def step_with(more: Callable[[Any], Any]) -> None:
    x, y = batch("guard", dtype=np.float32)
    loss = npnet.MeanSquaredError()
    npnet.backpropagate([Spy(more)], schedules.none(1), x, lambda output: loss.value_and_gradient(output, y)[1])


@pytest.mark.parametrize("mistake", [np.exp, np.asarray, lambda x: x * np.ones(5, np.float32), lambda x: np.sum(x, 0)])
@pytest.mark.usefixtures("xp")
def test_a_layer_that_calls_numpy_fails_under_the_guard(mistake: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError):
        step_with(mistake)


def test_a_layer_that_waits_is_found_out(xp: GuardModule) -> None:
    step_with(lambda x: x * 2)
    assert not xp.syncs
    step_with(lambda x: float(x.sum()))
    assert xp.syncs == {"float": 1}


@pytest.mark.parametrize("name", ["errstate", "random", "linalg", "no_such_function", "vectorize"])
def test_guard_module_offers_functions_and_dtypes_only(xp: GuardModule, name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(xp, name)
    with pytest.raises(AttributeError, match="put_into_numpy"):
        xp.zeros(2).put_into_numpy()
    assert xp.functions_used == {"zeros"}


def test_install_guard_leaves_nothing_behind() -> None:
    before = npnet.available_backends()
    with install_guard() as first:
        x = npnet.to_backend(np.ones(2), "guard")
        npnet.use_backend("guard")
        assert npnet.available_backends() == (*before, "guard")
        float(x.sum())
    assert npnet.available_backends() == before
    assert npnet.get_backend().name == "numpy"
    with pytest.raises(TypeError, match="got DeviceArray") as error:
        backend_of(x)
    assert "guard" not in str(error.value)
    with install_guard() as second:
        assert first is not second
        assert not second.syncs
        assert not second.functions_used


# Choosing a backend.


def test_registering_a_name_again_replaces_the_backend(xp: GuardModule) -> None:
    class OtherArray:
        pass

    other = registry.Backend("guard", np, OtherArray, np.asarray)
    npnet.register_backend("guard", lambda: other)
    assert npnet.get_backend("guard") is other
    assert backend_of(OtherArray()) is other


@pytest.mark.usefixtures("xp")
def test_use_backend_chooses_for_good_or_for_a_while() -> None:
    def current() -> str:
        return npnet.get_backend().name

    assert current() == "numpy"
    with npnet.use_backend("guard") as chosen:
        assert chosen is npnet.get_backend("guard")
        assert current() == "guard"
        with npnet.use_backend("numpy"):
            assert current() == "numpy"
        assert current() == "guard"
        with pytest.raises(ZeroDivisionError), npnet.use_backend("numpy"):
            raise ZeroDivisionError
        assert current() == "guard"
    assert current() == "numpy"
    npnet.use_backend("guard")
    assert current() == "guard"
    npnet.use_backend("numpy")
    assert current() == "numpy"


@pytest.mark.usefixtures("xp")
def test_what_is_created_goes_to_the_current_backend_and_stays_there() -> None:
    with npnet.use_backend("guard"):
        net, layer = network(None), npnet.Dense(5, 3, rng=0)
        explicit = network("numpy")
        moved = npnet.to_backend(np.ones(2))
    assert {type(array) for array in [*parameters(net), layer.weight.value, layer.bias.value, moved]} == {DeviceArray}
    assert {type(array) for array in [*parameters(explicit), *parameters(network(None))]} == {np.ndarray}
    net.update_mini_batch(batch("guard"), 3.0)
    assert {type(array) for array in parameters(net)} == {DeviceArray}
    x, _ = batch("guard", dtype=np.float32)
    assert isinstance(layer.forward(x)[0], DeviceArray)


@pytest.mark.usefixtures("xp")
@pytest.mark.parametrize(
    "create",
    [
        npnet.use_backend,
        network,
        lambda name: npnet.mlp([2, 1], backend=name),
        lambda name: npnet.to_backend(np.ones(2), name),
        npnet.get_backend,
    ],
)
def test_an_unknown_name_is_refused_and_changes_nothing(create: Callable[[str], Any]) -> None:
    npnet.use_backend("guard")
    with pytest.raises(ValueError, match="unknown backend 'tpu'; choose one of 'numpy', 'cupy', 'guard'") as error:
        create("tpu")
    assert "NPNET_BACKEND" not in str(error.value)
    assert npnet.get_backend().name == "guard"


def test_the_environment_decides_until_somebody_else_does(xp: GuardModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPNET_BACKEND", "guard")
    assert isinstance(network(None).weights[0], DeviceArray)
    with npnet.use_backend("numpy"):
        assert npnet.get_backend().name == "numpy"
    assert npnet.get_backend().name == "guard"
    monkeypatch.setenv("NPNET_BACKEND", "")
    assert npnet.get_backend().name == "numpy"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("guard", "guard"),
        ("tpu", "unknown backend 'tpu' (chosen by the environment variable NPNET_BACKEND); choose one of 'numpy', 'cupy'"),
    ],
)
def test_the_environment_of_a_fresh_process_decides(value: str, expected: str) -> None:
    code = """if True:
        from tests.guard import install_guard
        import npnet
        with install_guard():
            try:
                print(npnet.Network([2, 1]).backend.name)
            except ValueError as error:
                print(error)
    """
    root = Path(__file__).parents[1]
    environment = os.environ | {"NPNET_BACKEND": value}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.startswith(expected)


# CuPy that is not there, or not whole.


def pretend_cupy(monkeypatch: pytest.MonkeyPatch, driver: int, devices: Callable[[], int]) -> ModuleType:
    """A module cupy as ``import`` finds it, on a machine with that driver and those devices."""
    forget_cupy(monkeypatch)
    cupy = ModuleType("cupy")
    runtime = SimpleNamespace(driverGetVersion=lambda: driver, getDeviceCount=devices)
    cupy.__dict__.update(cuda=SimpleNamespace(runtime=runtime), ndarray=type("ndarray", (), {}), asnumpy=np.asarray)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return cupy


def forget_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = registry._loaded.pop("cupy", None)
    if loaded is not None:
        registry._by_type.pop(loaded.array_type)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)


def package_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forget_cupy(monkeypatch)
    monkeypatch.setitem(sys.modules, "cupy", None)


def package_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forget_cupy(monkeypatch)
    (tmp_path / "cupy.py").write_text("raise ImportError('libcublas.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)


def driver_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_cupy(monkeypatch, 0, driver_error)


def driver_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_cupy(monkeypatch, 11020, driver_error)


def device_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_cupy(monkeypatch, 12040, lambda: 0)


class CUDARuntimeError(RuntimeError):
    """As in CuPy."""


def driver_error() -> int:
    raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")


UNAVAILABLE: dict[Any, tuple[str, str]] = {
    package_missing: ("the package is missing", "pip install 'npnet[cuda12]'"),
    package_broken: ("does not load (libcublas.so.12: cannot open shared object file)", "pip install 'npnet[cuda12]'"),
    driver_missing: ("the NVIDIA driver is missing", "install the driver"),
    driver_too_old: ("the driver cannot serve this CuPy (cudaErrorInsufficientDriver", "update the driver"),
    device_missing: ("a GPU is not", "use backend 'numpy'"),
}


@pytest.mark.parametrize("break_cupy", UNAVAILABLE)
@pytest.mark.usefixtures("xp")
def test_cupy_unavailable_says_what_is_missing_and_what_to_do(
    break_cupy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    break_cupy(monkeypatch, tmp_path)
    npnet.use_backend("guard")
    for create in (npnet.use_backend, npnet.get_backend, network):
        with pytest.raises(npnet.BackendUnavailable) as error:
            create("cupy")
        message = str(error.value)
        assert message.startswith("backend 'cupy': ")
        for diagnosis, _ in UNAVAILABLE.values():
            assert (diagnosis in message) == (diagnosis == UNAVAILABLE[break_cupy][0])
        assert UNAVAILABLE[break_cupy][1] in message
    assert npnet.get_backend().name == "guard"
    assert npnet.available_backends() == ("numpy", "guard")
    # Once mended, it works at once: a failure is not remembered.
    cupy = pretend_cupy(monkeypatch, 12040, lambda: 1)
    assert npnet.get_backend("cupy").xp is cupy
    assert npnet.available_backends() == ("numpy", "cupy", "guard")
    assert backend_of(cupy.ndarray()).name == "cupy"


def test_the_environment_may_ask_for_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPNET_BACKEND", "cupy")
    pretend_cupy(monkeypatch, 12040, lambda: 0)
    with pytest.raises(npnet.BackendUnavailable, match="a GPU is not"):
        network(None)
    assert network("numpy").backend.name == "numpy"


def test_real_cupy_without_a_gpu_is_unavailable() -> None:
    cupy = pytest.importorskip("cupy")
    if cupy.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(npnet.BackendUnavailable, match=r"driver|GPU"):
        npnet.get_backend("cupy")
