"""The lab's classes as students extend them: an own ``__init__``, own attributes, own test data."""

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import schedules

SIZES = [6, 5, 4, 5, 3]
X = np.random.default_rng(0).random((40, 6))
Y = np.eye(3)[np.arange(40) % 3]
KINDS = ("Network", "NetworkWithCheckpointing")


def own(module: Any, kind: str, order: str = "sbwn") -> Any:
    """A subclass that does not call ``super().__init__``, and sets its attributes in this order."""

    class Mine(getattr(module, kind)):  # type: ignore[misc]
        def __init__(self, sizes: Any, n: int = 2) -> None:
            for each in order:
                if each == "s":
                    self.sizes = sizes
                elif each == "n":
                    self.num_layers = len(sizes)
                elif each == "b":
                    self.biases = [np.random.randn(y, 1) for y in sizes[1:]]
                elif each == "w":
                    self.weights = [np.random.randn(y, x) / np.sqrt(x) for x, y in itertools.pairwise(sizes)]
                elif kind == "NetworkWithCheckpointing":
                    self.checkpoint_every_nth_layer = n

    return Mine


def trained(network: Any) -> list[Any]:
    network.SGD((X, Y), 3, 10, 0.5, log=False)
    return [*map(np.array, network.weights), *map(np.array, network.biases), network.feedforward(X)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["sbwnc", "wbsnc", "cnswb", "bcw n s"])
def test_an_init_of_ones_own_without_super_trains_as_in_the_classic_code(kind: str, order: str, classic: Any) -> None:
    found = []
    for module in (npnet, classic):
        np.random.seed(1)
        found.append(trained(own(module, kind, order)(SIZES)))
    assert all(np.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found, strict=True))


def test_with_checkpointing_it_really_checkpoints() -> None:
    network = own(npnet, "NetworkWithCheckpointing", "sbwnc")(SIZES)
    assert network.schedule == schedules.every_nth(4, 2)
    assert network.checkpoint_every_nth_layer == 2
    assert npnet.plan(network, 10).peak_bytes > 0
    network.memory_budget = "1 MB"
    trained(network)
    assert network.plan is not None


def test_what_an_own_init_sets_can_be_read_in_it() -> None:
    class Mine(npnet.Network):
        def __init__(self) -> None:
            self.weights = [np.ones((3, 6))]
            self.first = self.weights[0].sum()
            self.biases = [np.zeros((3, 1))]

    network = Mine()
    assert network.first == 18
    assert network.feedforward(X).shape == (3, 40)
    network.weights[0][0, 0] += 1  # before the next update it changes the network
    assert network.weights[0][0, 0] == 2


@pytest.mark.parametrize(
    ("kind", "how"),
    [(kind, how) for kind in KINDS for how in (copy.copy, copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n)))],
)
def test_copies_train_alone(kind: str, how: Any) -> None:
    network = getattr(npnet, kind)(SIZES, rng=0)
    network.note = "mine"
    other = how(network)
    before = [each.copy() for each in network.weights]
    trained(other)
    assert other.note == "mine"
    assert all(map(np.array_equal, before, network.weights))
    assert not np.array_equal(other.weights[0], before[0])


@pytest.mark.parametrize("order", ["s", "sb", "sw", ""])
def test_an_init_that_leaves_weights_or_biases_out_is_told_so(order: str) -> None:
    network = own(npnet, "Network", order)(SIZES)
    for use in (lambda: network.SGD((X, Y), 1, 10, 0.5), lambda: network.feedforward(X), lambda: repr(network)):
        with pytest.raises(
            AttributeError, match=r"Mine has no weights and biases yet: its __init__ sets both, or calls"
        ):
            use()
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        network.colour  # noqa: B018


def test_weights_that_are_no_matrices_are_refused() -> None:
    class Mine(npnet.Network):
        def __init__(self) -> None:
            self.biases = [np.zeros((3, 1))]
            self.weights = [np.zeros(3)]

    with pytest.raises(
        ValueError, match=r"weights: expected a list of \(out, in\) arrays, got arrays of shapes \[\(3,\)\]"
    ):
        Mine()


ATTRIBUTES: dict[str, Any] = {
    "layers": 3, "backend": "numpy", "schedule": [3.0, 1.0], "plan": "to win", "dtype": "x", "sizes": None,
    "num_layers": "many", "loss_arrays": 7, "parameters": [], "config": {}, "rng": 1, "lr": 0.1, "name": "mine",
    "history": [], "limit": 1, "restore": 2, "cost": 3, "_private": 4, "training": False, "network": 5,
}  # fmt: skip


@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_attributes_of_the_students_own_keep_their_values_and_change_nothing(kind: str, name: str) -> None:
    arguments = {} if kind == "Network" else {"checkpoint_every_nth_layer": 2}
    expected = trained(getattr(npnet, kind)(SIZES, rng=0, **arguments))
    network = getattr(npnet, kind)(SIZES, rng=0, **arguments)
    setattr(network, name, ATTRIBUTES[name])
    assert all(map(np.array_equal, trained(network), expected))
    assert getattr(network, name) is ATTRIBUTES[name]
    assert npnet.plan(network, 10).peak_bytes == npnet.plan(getattr(npnet, kind)(SIZES), 10).peak_bytes
    assert len(npnet.summary(network).rows) == 4
    network.evaluate((X, Y))


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_budget_they_change_nothing_either(kind: str) -> None:
    network = npnet.NetworkWithCheckpointing(SIZES, rng=0, memory_budget="1 MB")
    for name, value in ATTRIBUTES.items():
        setattr(network, name, value)
    assert all(map(np.array_equal, trained(network), trained(npnet.Network(SIZES, rng=0))))


def test_what_looks_like_a_change_of_the_network_is_refused_or_made() -> None:
    network = npnet.NetworkWithCheckpointing(SIZES, 2)
    for name, value in (("layers", [npnet.Dense(3, 2)]), ("dtype", np.float32), ("backend", "cupy")):
        if value == "cupy" and "cupy" not in npnet.available_backends():
            continue
        with pytest.raises(AttributeError, match=f"^{name}: a network keeps its own; make a new one"):
            setattr(network, name, value)
    network.schedule = "revolve"
    assert network.schedule == schedules.revolve(4)
    network.schedule = schedules.every_nth(4, 3)
    assert (network.schedule, network.checkpoint_every_nth_layer) == (schedules.every_nth(4, 3), 0)
    network.checkpoint_every_nth_layer = 2
    assert network.schedule == schedules.every_nth(4, 2)


def test_public_attributes_read_as_before() -> None:
    network = npnet.NetworkWithCheckpointing(SIZES, dtype=np.float32)
    assert [layer.out_features for layer in network.layers] == SIZES[1:]
    assert (network.dtype, network.backend.name, network.plan) == (np.float32, "numpy", None)
    assert (network.sizes, network.num_layers) == (SIZES, 5)


LABELS = np.arange(40) % 3


@pytest.mark.parametrize("kind", KINDS)
def test_test_data_may_be_whatever_an_own_evaluate_takes(kind: str, capsys: Any) -> None:
    class ByLabels(getattr(npnet, kind)):  # type: ignore[misc]
        def evaluate(self, test_data: Any) -> float:
            x, labels = test_data
            return float(np.mean(self.feedforward(x).argmax(axis=0) == labels))

    for network in (ByLabels(SIZES, rng=0), getattr(npnet, kind)(SIZES, rng=0)):
        if type(network) is not ByLabels:
            network.evaluate = lambda data: float(np.mean(network.feedforward(data[0]).argmax(0) == data[1]))  # noqa: B023
        network.SGD((X, Y), 1, 10, 0.5, test_data=(X, LABELS))
        assert capsys.readouterr().out.startswith("Epoch: 0, Accuracy: 0.")


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_log_test_data_are_not_looked_at_and_with_one_they_must_fit(kind: str) -> None:
    network = getattr(npnet, kind)(SIZES, rng=0)
    network.SGD((X, Y), 1, 10, 0.5, test_data=(X, LABELS), log=False)
    with pytest.raises(ValueError, match="test_data: y: expected rows"):
        network.SGD((X, Y), 1, 10, 0.5, test_data=(X, LABELS))


@pytest.mark.parametrize("kind", KINDS)
def test_own_networks_are_saved_with_what_they_say(kind: str, tmp_path: Any) -> None:
    class Mine(getattr(npnet, kind)):  # type: ignore[misc]
        def __init__(self, width: int = 4) -> None:
            self.width = width
            self.weights = [np.ones((width, 6)), np.ones((3, width))]
            self.biases = [np.zeros((width, 1)), np.zeros((3, 1))]

    network = Mine(5)
    network.SGD((X, Y), 1, 10, 0.5, log=False)
    network.save(tmp_path / "n.npz")
    loaded = npnet.load(tmp_path / "n.npz", classes=[Mine])
    assert loaded.width == 5
    assert all(map(np.array_equal, loaded.weights, network.weights))
