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
    assert repr(network) == f"Mine({SIZES if 's' in order else ''})"
    assert not hasattr(network, "layers")
    for use in (
        lambda: network.SGD((X, Y), 1, 10, 0.5),
        lambda: network.feedforward(X),
        lambda: npnet.plan(network, 9),
    ):
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
        Mine().feedforward(X)


ATTRIBUTES: dict[str, Any] = {
    "layers": 3, "backend": "numpy", "schedule": [3.0, 1.0], "plan": "to win", "dtype": "x", "sizes": None,
    "num_layers": "many", "loss_arrays": 7, "parameters": [], "config": {}, "rng": 1, "lr": 0.1, "name": "mine",
    "history": [], "limit": 1, "restore": 2, "cost": 3, "_private": 4, "training": False, "network": 5,
    "_weights": [], "_biases": None, "_schedule": 7, "_chain": 8, "_given": 9, "_every": 1, "_plan": 2, "_run": 3,
    "_rows": 4, "_memory_budget": 5, "given": 6, "ready": 7, "lenders": 8, "foreign": True, "save": "no",
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


def test_the_one_name_that_npnet_keeps_is_not_one_that_a_student_would_choose() -> None:
    """Negative control: the names above are all but this one."""
    network = npnet.NetworkWithCheckpointing(SIZES, 2)
    trained(network)
    assert set(vars(network)) == {"_npnet", "sizes", "num_layers"}
    public = {"SGD", "backend", "backprop", "biases", "checkpoint_every_nth_layer", "config", "cost_derivative",
              "description", "dtype", "evaluate", "feedforward", "forward_between_checkpoints", "layers",
              "memory_budget", "named_arrays", "named_buffers", "named_parameters", "num_layers", "plan", "save",
              "schedule", "shared_places", "sizes", "update_mini_batch", "weights"}  # fmt: skip
    assert {name for name in dir(network) if not name.startswith("__")} == {*public, "_npnet"}
    network._npnet = 3
    with pytest.raises(AttributeError):
        trained(network)


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


def both(make: Any, classic: Any, *arguments: Any, first: Any = lambda network: None) -> Any:
    """npnet's network, trained with the numbers of the classic one: ``make`` makes the class from the module."""
    found, networks = [], []
    for module in (npnet, classic):
        np.random.seed(2)
        networks.append(make(module)(*arguments))
        first(networks[-1])
        found.append(trained(networks[-1]))
    assert len(found[0]) == len(found[1])
    assert all(np.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found, strict=True))
    return networks[0]


@pytest.mark.parametrize("kind", KINDS)
def test_lists_filled_one_by_one(kind: str, classic: Any) -> None:
    def make(module: Any) -> Any:
        class Mine(getattr(module, kind)):  # type: ignore[misc]
            def __init__(self) -> None:
                self.num_layers, self.checkpoint_every_nth_layer = 5, 2
                self.weights, self.biases = [], []
                for n, m in itertools.pairwise(SIZES):
                    self.weights.append(np.random.randn(m, n))
                    self.biases.append(np.random.randn(m, 1))

        return Mine

    network = both(make, classic)
    assert len(npnet.summary(network).rows) == 4


def test_lists_of_lists_and_whole_numbers_are_numbers() -> None:
    network = own(npnet, "Network")(SIZES)
    expected = own(npnet, "Network")(SIZES)
    whole = [np.rint(5 * w).astype(int) for w in network.weights]
    network.weights, expected.weights = [w.tolist() for w in whole], [w.astype(float) for w in whole]
    network.biases, expected.biases = [b.tolist() for b in network.biases], network.biases
    assert all(map(np.array_equal, trained(network), trained(expected)))


PLACES = ["_w", "_weights", "__w", "super"]


@pytest.mark.parametrize("inits", [True, False])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_property_in_a_subclass_holds_the_weights(kind: str, place: str, inits: bool, classic: Any) -> None:
    def make(module: Any) -> Any:
        base = own(module, kind, "sbwnc") if inits else getattr(module, kind)

        class Mine(base):  # type: ignore[misc]
            reads = 0

            @property
            def weights(self) -> Any:
                self.reads += 1
                return vars(self)[place] if place != "super" or module is classic else super().weights

            @weights.setter
            def weights(self, arrays: Any) -> None:
                if place != "super" or module is classic:
                    vars(self)[place] = list(arrays)
                else:
                    npnet.Network.weights.fset(self, arrays)  # type: ignore[attr-defined]

        return Mine

    arguments = (SIZES,) if kind == "Network" else (SIZES, 2)
    network = both(make, classic, *arguments)
    assert network.reads > 12  # each step asks for it
    network.weights = [0 * w for w in network.weights]
    assert np.allclose(network.feedforward(X), 1 / (1 + np.exp(-network.biases[-1])))
    assert np.array_equal(copy.copy(network).feedforward(X), network.feedforward(X))


def test_attributes_of_the_class_are_the_networks_until_it_has_its_own(classic: Any) -> None:
    def make(module: Any) -> Any:
        class Mine(module.NetworkWithCheckpointing):  # type: ignore[misc]
            checkpoint_every_nth_layer = 3
            weights, biases, layers, schedule, memory = None, None, 7, "mine", 5

            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                del self.checkpoint_every_nth_layer

        return Mine

    network = both(make, classic, SIZES, 1)
    assert (network.layers, network.schedule) == (7, "mine")
    assert network._npnet.schedule == schedules.every_nth(4, 3)


def other_sizes(network: Any) -> None:
    network.sizes, network.num_layers = [6, 7, 3], 3
    network.weights = [np.linspace(-1, 1, 42).reshape(7, 6), np.linspace(1, -1, 21).reshape(3, 7)]
    network.biases = [np.zeros((7, 1)), np.ones((3, 1))]


@pytest.mark.parametrize("change", [other_sizes, lambda network: network.__init__([6, 4, 3])], ids=["sizes", "again"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_may_be_given_other_sizes(kind: str, change: Any, classic: Any) -> None:
    arguments = (SIZES,) if kind == "Network" else (SIZES, 2)
    network = both(lambda module: getattr(module, kind), classic, *arguments, first=change)
    assert [network.sizes[0], *(layer.out_features for layer in network.layers)] == network.sizes
    assert len(npnet.plan(network, 10).layers) == 2


def test_between_two_sizes_it_says_what_is_missing_and_goes_on_with_both() -> None:
    network = npnet.NetworkWithCheckpointing(SIZES, schedule="sqrt", rng=0)
    before = network.feedforward(X)
    new = npnet.Network([6, 7, 3], rng=1)
    with pytest.raises(ValueError, match="for a network of other sizes, assign network"):
        network.weights = new.weights
    assert np.array_equal(network.feedforward(X), before)
    network.sizes = new.sizes
    network.weights = new.weights
    assert network.weights[0].shape == (7, 6)
    with pytest.raises(ValueError, match="biases: expected a list of 2 arrays, got 4"):
        network.feedforward(X)
    network.biases = new.biases
    assert np.array_equal(network.feedforward(X), new.feedforward(X))
    assert network.schedule == schedules.sqrt(2)


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_network_with_an_init_of_its_own_train_alone(kind: str, how: Any, used: bool) -> None:
    network = own(npnet, kind)(SIZES)
    if used:
        trained(network)
    other, before = how(network), [np.array(w) for w in network.weights]
    trained(other)
    assert all(map(np.array_equal, before, network.weights))
    assert all(map(np.array_equal, trained(network), [*other.weights, *other.biases, other.feedforward(X)]))


class Pickled(npnet.NetworkWithCheckpointing):
    def __init__(self, sizes: Any) -> None:
        self.sizes = sizes
        self.weights = [np.ones((m, n)) for n, m in itertools.pairwise(sizes)]
        self.biases = [np.ones((m, 1)) for m in sizes[1:]]
        self.layers = self.schedule = "mine"


@pytest.mark.parametrize("used", [True, False])
def test_a_network_with_an_init_of_its_own_is_pickled(used: bool) -> None:
    network = Pickled(SIZES)
    if used:
        trained(network)
    other = pickle.loads(pickle.dumps(network))
    assert (other.layers, other.schedule) == ("mine", "mine")
    assert all(map(np.array_equal, trained(other), trained(network)))


def test_a_network_is_saved_as_it_is_whatever_the_students_attributes_say(tmp_path: Any) -> None:
    network = npnet.NetworkWithCheckpointing(SIZES, schedule="sqrt", rng=0)
    network.schedule, network.sizes, network.layers = [3.0, 1.0], "mine", 3
    network.save(tmp_path / "n.npz")
    loaded = npnet.load(tmp_path / "n.npz")
    assert (loaded.schedule, loaded.sizes) == (schedules.sqrt(4), SIZES)
    assert all(map(np.array_equal, loaded.weights, network.weights))


def test_an_init_that_keeps_no_argument_is_told_so_when_saved(tmp_path: Any) -> None:
    class Mine(npnet.Network):
        def __init__(self, width: int) -> None:
            self.weights, self.biases = [np.ones((3, width))], [np.ones((3, 1))]

    with pytest.raises(TypeError, match="Mine cannot be saved: keep its argument 'width' in an attribute"):
        Mine(6).save(tmp_path / "n.npz")


def test_methods_of_ones_own_may_hold_weights_that_are_no_chain(classic: Any) -> None:
    """A network without biases, of which npnet takes the loop alone."""

    def make(module: Any) -> Any:
        class Mine(module.Network):  # type: ignore[misc]
            def __init__(self) -> None:
                self.weights, self.biases = [np.zeros((3, 6)), np.zeros(3)], []

            def feedforward(self, a: Any) -> Any:
                return self.weights[0] @ a.T + self.weights[1][:, None]

            def backprop(self, x: Any, y: Any) -> Any:
                delta = self.feedforward(x.T) - y
                return [], [delta @ x.T, delta.sum(axis=1)]

        return Mine

    network = both(make, classic)
    assert network.evaluate((X, Y)) >= 14 / 40
