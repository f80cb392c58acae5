"""The guard guards: it computes what NumPy computes, counts each wait, and finds the mistakes it is there to find."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import schedules
from npnet.backend import backend_of
from npnet.losses import check_finite
from tests.guard import DeviceArray, GuardModule, install_guard
from tests.scenarios import batch
from tests.scenarios import fresh_registry as fresh_registry
from tests.scenarios import guard_module as guard_module


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
