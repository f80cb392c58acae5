"""Notebooks in Nielsen's manner define a method a cell and assign it. What stands in a method's place takes effect."""

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest

import npnet

SIZES = [6, 5, 4, 5, 3]
X = np.random.default_rng(0).random((40, 6))
Y = np.eye(3)[np.arange(40) % 3]


def backprop(self: Any, x: Any, y: Any) -> Any:
    """Twice the gradient, by the formulas of the book."""
    activations = [x]
    for b, w in zip(self.biases, self.weights, strict=True):
        activations.append(1 / (1 + np.exp(-(w @ activations[-1] + b))))
    delta = self.cost_derivative(activations[-1], y)
    nabla_b, nabla_w = [], []
    for w, before, after in reversed(list(zip(self.weights, activations, activations[1:], strict=False))):
        delta = delta * after * (1 - after)
        nabla_b.insert(0, 2 * delta.sum(axis=1, keepdims=True))
        nabla_w.insert(0, 2 * delta @ before.T)
        delta = w.T @ delta
    return nabla_b, nabla_w


def update_mini_batch(self: Any, mini_batch: Any, eta: float) -> None:
    """Gradient descent with weight decay."""
    nabla_b, nabla_w = self.backprop(mini_batch[0].T, mini_batch[1].T)
    rate = eta / len(mini_batch[0])
    self.weights = [0.99 * w - rate * nw for w, nw in zip(self.weights, nabla_w, strict=True)]
    self.biases = [b - rate * nb for b, nb in zip(self.biases, nabla_b, strict=True)]


def feedforward(self: Any, a: Any) -> Any:
    """Linear."""
    a = a.T
    for b, w in zip(self.biases, self.weights, strict=True):
        a = w @ a + b
    return a


def evaluate(self: Any, test_data: Any) -> Any:
    """Another figure."""
    return 0.25 + 0 * self.feedforward(test_data[0]).sum()


def cost_derivative(self: Any, output_activations: Any, y: Any) -> Any:
    """Of another cost."""
    return 3 * (output_activations - y)


def forward_between_checkpoints(self: Any, a: Any, start: int, end: int) -> Any:
    """Restores wrong activations in the first segment, so that it shows."""
    outputs = [a]
    for index in range(start, end):
        outputs.append(
            (1 - 0.1 * (start == 0)) / (1 + np.exp(-(self.weights[index] @ outputs[-1] + self.biases[index])))
        )
    return outputs


def SGD(self: Any, training_data: Any, epochs: int, *args: Any, **kwargs: Any) -> None:  # noqa: N802
    """Backwards through the data, with twice the rate."""
    x, y = training_data
    for _ in range(epochs):
        for start in reversed(range(0, len(x), 10)):
            self.update_mini_batch((x[start : start + 10], y[start : start + 10]), 1.0)
    print("mine", self.evaluate((x, y)))


METHODS = {f.__name__: f for f in (backprop, update_mini_batch, feedforward, evaluate, cost_derivative, SGD)}
ALL = METHODS | {"forward_between_checkpoints": forward_between_checkpoints}


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def on_class(module: Any, kind: str, name: str, function: Any) -> Any:
    setattr(getattr(module, kind), name, function)
    return made(module, kind)


def with_decorator(module: Any, kind: str, name: str, function: Any) -> Any:
    return on_class(module, kind, name, decorated(function))


def in_subclass(module: Any, kind: str, name: str, function: Any) -> Any:
    return made(module, kind, type("Mine", (getattr(module, kind),), {name: function}))


def on_instance(module: Any, kind: str, name: str, function: Any) -> Any:
    network = made(module, kind)
    setattr(network, name, types.MethodType(function, network))
    return network


def plain_function_on_instance(module: Any, kind: str, name: str, function: Any) -> Any:
    network = made(module, kind)
    setattr(network, name, lambda *args, **kwargs: function(network, *args, **kwargs))
    return network


def by_mock(module: Any, kind: str, name: str, function: Any) -> Any:
    network = made(module, kind)
    setattr(network, name, mock.MagicMock(wraps=types.MethodType(function, network)))
    return network


def patched(module: Any, kind: str, name: str, function: Any) -> Any:
    mock.patch.object(getattr(module, kind), name, autospec=True, side_effect=function).start()  # ends with `modules`
    return made(module, kind)


WAYS = [on_class, with_decorator, in_subclass, on_instance, plain_function_on_instance, by_mock, patched]
RESTORE = npnet.NetworkWithCheckpointing.forward_between_checkpoints


def made(module: Any, kind: str, given: Any = None, n: int = 2) -> Any:
    np.random.seed(3)
    given = given or getattr(module, kind)
    return given(SIZES) if kind == "Network" else given(SIZES, n)


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    """The same arrays within rounding, and then the same text."""
    assert len(ours) == len(theirs)
    assert all(np.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(ours[:-1], theirs[:-1], strict=True))
    assert ours[-1] == theirs[-1]


@pytest.fixture
def modules(classic: Any) -> Iterator[Any]:
    """npnet and the classic code, whose classes are as before afterwards."""
    kinds = [getattr(module, kind) for module in (npnet, classic) for kind in ("Network", "NetworkWithCheckpointing")]
    before = [{name: vars(kind)[name] for name in ALL if name in vars(kind)} for kind in kinds]
    yield npnet, classic
    mock.patch.stopall()
    for kind, methods in zip(kinds, before, strict=True):
        for name in ALL:
            if name in methods:
                setattr(kind, name, methods[name])
            elif name in vars(kind):
                delattr(kind, name)


def results(network: Any, capsys: Any) -> list[Any]:
    network.SGD((X, Y), 2, 10, 0.5, test_data=(X, Y))
    nabla = network.backprop(X[:7].T, Y[:7].T)
    arrays = [*network.weights, *network.biases, network.feedforward(X), *nabla[0], *nabla[1]]
    return [*map(np.array, arrays), capsys.readouterr().out]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", ["Network", "NetworkWithCheckpointing"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_in_anothers_place_gives_what_it_gives_in_the_classic_code(
    name: str, kind: str, way: Any, modules: Any, capsys: Any
) -> None:
    assert_same(*(results(way(module, kind, name, METHODS[name]), capsys) for module in modules))


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_on_the_base_class_reaches_the_network_with_checkpointing_as_in_the_classic_code(
    name: str, n: int, modules: Any, capsys: Any
) -> None:
    found = []
    for module in modules:  # with n = 0 the classic `backprop` calls the base class's, else it is one of its own
        setattr(module.Network, name, METHODS[name])
        found.append(results(made(module, "NetworkWithCheckpointing", n=n), capsys))
    assert_same(*found)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_another_restoration_is_used_by_backprop_and_by_training(way: Any, modules: Any, capsys: Any) -> None:
    """Wrong below the last segment, which npnet has no need to restore."""
    kind, name = "NetworkWithCheckpointing", "forward_between_checkpoints"
    found = [results(way(module, kind, name, forward_between_checkpoints), capsys) for module in modules]
    assert_same(*found)
    modules[0].NetworkWithCheckpointing.forward_between_checkpoints = RESTORE
    plain = results(made(npnet, kind), capsys)
    assert not np.allclose(plain[0], found[0][0])
    assert not np.allclose(plain[-5], found[0][-5])


@pytest.mark.parametrize("n", [0, 2])
def test_the_method_of_another_network_is_that_networks(n: int, modules: Any, capsys: Any) -> None:
    found = []
    for module in modules:
        network, other = made(module, "NetworkWithCheckpointing", n=n), module.NetworkWithCheckpointing(SIZES, n)
        network.backprop = other.backprop
        network.forward_between_checkpoints = other.forward_between_checkpoints
        found.append(results(network, capsys))
        other.weights = [2 * w for w in other.weights]
        found[-1] += [np.array(network.backprop(X.T, Y.T)[1][0])]
    assert_same([*found[0][:-2], found[0][-1], found[0][-2]], [*found[1][:-2], found[1][-1], found[1][-2]])


def test_the_base_classs_backprop_put_into_the_class_with_checkpointing_restores_nothing(modules: Any) -> None:
    network = made(npnet, "NetworkWithCheckpointing")
    network.forward_between_checkpoints = mock.MagicMock(side_effect=AssertionError)
    expected = made(npnet, "Network")
    network.backprop = types.MethodType(npnet.Network.backprop, network)
    network.update_mini_batch((X, Y), 1.0)
    expected.update_mini_batch((X, Y), 1.0)
    assert all(map(np.array_equal, network.weights, expected.weights))


@pytest.mark.parametrize("kind", ["Network", "NetworkWithCheckpointing"])
def test_another_feedforward_is_given_all_test_data_at_once_whatever_they_are(
    kind: str, modules: Any, capsys: Any
) -> None:
    wide, labels = np.tile(X, (60, 2)), np.tile(Y, (60, 1))  # more rows than npnet evaluates at a time
    found = []
    for module in modules:
        network, sizes = made(module, kind), []
        own = network.feedforward
        network.feedforward = lambda a, own=own, sizes=sizes: (sizes.append(a.shape), own(a[:, :6]))[1]
        network.SGD((X, Y), 1, 10, 0.5, test_data=(wide, labels))
        found.append((capsys.readouterr().out, sizes))
    assert found[0] == found[1]
    network = made(npnet, kind)
    network.feedforward = lambda a: np.zeros((3, len(a))).tolist()
    assert network.evaluate((X.tolist(), Y)) == pytest.approx(14 / 40)
    for y, message in ((Y[:, :2], "expected rows"), (Y[:5], "40 and 5 rows"), (2 * Y, "one-hot")):
        with pytest.raises(ValueError, match=message):
            network.evaluate((X, y))


@pytest.mark.parametrize("name", ["backprop", "update_mini_batch"])
@pytest.mark.parametrize("kind", ["Network", "NetworkWithCheckpointing"])
def test_the_data_are_what_the_method_that_reads_them_takes(name: str, kind: str, modules: Any, capsys: Any) -> None:
    """Class numbers, say, and one more column of x."""
    found = []
    for module in modules:

        class Mine(getattr(module, kind)):  # type: ignore[misc]
            def update_mini_batch(self, mini_batch: Any, eta: float) -> None:
                x, y = mini_batch
                if name == "update_mini_batch":
                    x, y = x[:, :6], np.eye(3)[y]
                super().update_mini_batch((x, y), eta)

            def backprop(self, x: Any, y: Any) -> Any:
                return super().backprop(x[:6], np.eye(3)[:, y] if name == "backprop" else y)

        network = made(module, kind, Mine)
        network.SGD((np.hstack([X, X]), np.arange(40) % 3), 2, 10, 0.5, log=False)
        found.append([*map(np.array, [*network.weights, *network.biases]), ""])
        if module is npnet:
            with pytest.raises(ValueError, match="training_data: x and y must have a row per sample each, got 40 and"):
                network.SGD((X, np.arange(3)), 2, 10, 0.5)
    assert_same(*found)
    plain = made(npnet, kind)
    with pytest.raises(ValueError, match=r"training_data: x: expected rows of shape \(samples, 6\)"):
        plain.SGD((np.hstack([X, X]), np.arange(40) % 3), 2, 10, 0.5)


@pytest.mark.parametrize("name", METHODS)
def test_each_of_these_methods_makes_a_difference(name: str, modules: Any, capsys: Any) -> None:
    """Negative control: a method that were ignored would be seen."""
    plain, changed = (
        results(made(npnet, "Network"), capsys),
        results(in_subclass(npnet, "Network", name, METHODS[name]), capsys),
    )
    assert not all(np.array_equal(a, b) for a, b in zip(plain, changed, strict=True))


def test_npnets_own_method_put_back_is_npnets_own(modules: Any, capsys: Any) -> None:
    plain = results(made(npnet, "Network"), capsys)
    own = npnet.Network.backprop
    npnet.Network.backprop = backprop  # type: ignore[method-assign]
    assert not np.array_equal(results(made(npnet, "Network"), capsys)[0], plain[0])
    npnet.Network.backprop = own  # type: ignore[method-assign]
    assert np.array_equal(results(made(npnet, "Network"), capsys)[0], plain[0])


def test_a_call_that_is_watched_is_counted_and_changes_nothing(modules: Any, capsys: Any) -> None:
    plain = results(made(npnet, "Network"), capsys)
    with mock.patch.object(npnet.Network, "backprop", autospec=True, side_effect=npnet.Network.backprop) as watched:
        found = results(made(npnet, "Network"), capsys)
    assert watched.call_count == 2 * 4 + 1
    assert all(np.allclose(a, b, rtol=1e-12) for a, b in zip(plain[:-1], found[:-1], strict=True))


def test_a_subclass_that_calls_super_is_used(modules: Any, capsys: Any) -> None:
    class Half(npnet.Network):
        def backprop(self, x: Any, y: Any) -> Any:
            nabla_b, nabla_w = super().backprop(x, y)
            return [b / 2 for b in nabla_b], [w / 2 for w in nabla_w]

    ours, slow = made(npnet, "Network", Half), made(npnet, "Network")
    ours.update_mini_batch((X, Y), 1.0)
    slow.update_mini_batch((X, Y), 0.5)
    assert all(np.allclose(a, b) for a, b in zip(ours.weights, slow.weights, strict=True))
