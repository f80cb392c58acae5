"""npnet on a device, without one: every step runs on the guard backend, gives NumPy's bits, and uses what CuPy has."""

import inspect
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import npnet
from npnet.losses import LOSSES
from tests.guard import METHODS, DeviceArray, GuardModule
from tests.scenarios import CHAINS, SCENARIOS, STEPS, batch, network, parameters
from tests.scenarios import fresh_registry as fresh_registry
from tests.scenarios import guard_module as guard_module

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
    assert {"dot", "exp", "tanh", "maximum", "sqrt", "log", "argwhere"} <= xp.functions_used
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
