"""What goes into a network: data of every kind and layout; bad input with a message that helps, and nothing changed."""

import copy

import numpy as np
import pytest

from npnet import Network, NetworkWithCheckpointing
from npnet.schedules import every_nth
from tests.test_network import KINDS, SIZES, X, Y, arrays_of, copies, make, same

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = [-1, 1.5, True, "2", None, [2], 2j]
RAGGED = [[1, 2], [3]]
ACCEPT = {
    "training_data": lambda network, pair: network.SGD(pair, 1, 4, 3.0),
    "test_data": lambda network, pair: network.SGD((X, Y), 1, 4, 3.0, pair),
    "mini_batch": lambda network, pair: network.update_mini_batch(pair, 3.0),
    "evaluate": lambda network, pair: network.evaluate(pair),
}


def state(network):
    """The parameters as the network shows them, and the output as it computes with them."""
    return [*copies(arrays_of(network)), network.feedforward(np.ones((1, network.sizes[0])))]


def refused(network, call, error, message):
    """``call(network)`` raises the error with npnet's message, and changes nothing."""
    before = state(network)
    with pytest.raises(error, match=message):
        call(network)
    for now, then in zip(state(network), before, strict=True):
        assert np.array_equal(now, then, equal_nan=True)


DIGITS = np.random.default_rng(0).integers(0, 9, (12, 4))
LAYOUTS = {
    "uint8": lambda a: a.astype(np.uint8),
    "int": lambda a: a.astype(int),
    "float32 and bool": lambda a: a.astype(bool if a.max() == 1 else np.float32),
    "lists": lambda a: a.tolist(),
    "Fortran order": np.asfortranarray,
    "every second of a larger array": lambda a: np.repeat(np.repeat(a, 2, 0), 2, 1)[::2, ::2],
    "backwards": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "read-only": lambda a: np.broadcast_to(a, a.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_data_of_any_kind_and_layout_give_the_same_network(layout, options):
    x, y = layout(DIGITS), layout(Y)
    network, expected = make(**options), make(**options)
    before = copy.deepcopy((x, y))
    network.SGD((x, y), 2, 5, 3.0, (x, y), log=False)
    expected.SGD((DIGITS.astype(float), Y), 2, 5, 3.0, log=False)
    for ours, theirs in zip(arrays_of(network), arrays_of(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12 if ours.dtype == np.float64 else 1e-5)
    np.testing.assert_allclose(network.feedforward(x), expected.feedforward(DIGITS), rtol=1e-5)
    assert network.evaluate((x, y)) == expected.evaluate((DIGITS, Y))
    assert same([*x, *y], [*before[0], *before[1]])  # the data stay as they were


BAD_SIZES = [[], [4], [4, 0, 3], [-4, 3], [4, 2.5], [4.0, 3.0], [4, True], ["4", "3"], "43", None, 5, [[4], 3]]


@pytest.mark.parametrize("sizes", [*BAD_SIZES, [4, None], np.ones((2, 2), int), np.ones(3)], ids=str)
def test_bad_sizes(sizes):
    with pytest.raises((TypeError, ValueError), match=r"^sizes(\[\d\])?: expected"):
        Network(sizes)


@pytest.mark.parametrize("nth", NO_NUMBERS, ids=repr)
def test_bad_n_at_first_and_later(nth):
    with pytest.raises((TypeError, ValueError), match="checkpoint_every_nth_layer: expected a whole number"):
        NetworkWithCheckpointing(SIZES, nth)
    network = make(checkpoint_every_nth_layer=2)
    with pytest.raises((TypeError, ValueError), match="checkpoint_every_nth_layer: expected a whole number"):
        network.checkpoint_every_nth_layer = nth
    assert (network.checkpoint_every_nth_layer, network.schedule) == (2, every_nth(4, 2))


BAD_OPTIONS = {
    "the network has 4": [{"schedule": every_nth(5, 2)}, {"schedule": lambda depth: every_nth(depth + 1, 2)}],
    "unknown schedule 'best'; choose one of 'none', 'sqrt'": [{"schedule": "best"}],
    "layer 1 has no backward pass": [{"schedule": list(every_nth(4, 2))[:-1]}],
    "schedule: expected a Schedule .* list": [{"schedule": 7}, {"schedule": [1]}],
    "one of checkpoint_every_nth_layer, schedule and memory_budget, not more": [
        {"schedule": "sqrt", "checkpoint_every_nth_layer": 2},
        {"schedule": "sqrt", "memory_budget": "20 MB"},
        {"memory_budget": 10**6, "checkpoint_every_nth_layer": 1},
    ],
    "dtype": [{"dtype": kind} for kind in (int, complex, object, bool, str)],
    "rng": [{"rng": rng} for rng in ("a", True, 1.5, -1, np.random.RandomState(0))],
    "unknown backend 'abacus'; choose one of": [{"backend": "abacus"}],
}


@pytest.mark.parametrize(("message", "options"), [(m, o) for m, some in BAD_OPTIONS.items() for o in some])
def test_bad_options(message, options):
    with pytest.raises((TypeError, ValueError), match=message):
        make(**options)


W, B = make(rng=2).weights, make(rng=2).biases
BAD_PARAMETERS = [
    ("weights", W[:-1], ValueError, "weights: expected a list of 4 arrays, got 3"),
    ("biases", [], ValueError, "biases: expected a list of 4 arrays, got 0"),
    ("weights", [*W[:-1], W[-1].T], ValueError, r"weights\[3\]: expected shape \(3, 5\), got \(5, 3\)"),
    ("biases", [*B[:-1], B[-1].ravel()], ValueError, r"biases\[3\]: expected shape \(3, 1\), got \(3,\)"),
    ("weights", [*W[:-1], "w"], TypeError, r"weights\[3\]: expected real numbers"),
    ("weights", [*W[:-1], W[-1] * 1j], TypeError, r"weights\[3\]: expected real numbers"),
    ("biases", [*B[:-1], None], TypeError, r"biases\[3\]: expected real numbers"),
    ("biases", [*B[:-1], RAGGED], TypeError, r"biases\[3\]: expected an array of numbers, got a ragged list"),
    ("weights", None, TypeError, "weights: expected a list of 4 arrays, got NoneType"),
    ("biases", 5, TypeError, "biases: expected a list of 4 arrays, got int"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_PARAMETERS)
def test_parameters_that_do_not_fit_change_nothing(name, value, error, message):
    refused(make(), lambda network: setattr(network, name, value), error, message)
    if isinstance(value, list) and len(value) == 4:
        refused(make(), lambda network: getattr(network, name).__setitem__(-1, value[-1]), error, message)


@pytest.mark.parametrize(
    "change",
    ["append(1)", "pop()", "clear()", "reverse()", "extend([1])", "__iadd__([1])", "__setitem__(slice(1), [1])"],
)
def test_changing_the_list_as_the_network_cannot_follow_is_refused(change):
    refused(make(), lambda network: eval(f"network.weights.{change}", {"network": network}), TypeError, "whole list")


BAD_DATA = [
    (X[:5], Y, "x and y must have a row per sample each, got 5 and 12 rows"),
    (X[:, :3], Y, r"x: expected rows of shape \(samples, 4\), got \(12, 3\)"),
    (X, Y[:, :2], r"y: expected rows of shape \(samples, 3\), got \(12, 2\)"),
    (X, Y.argmax(axis=1), r"y: expected rows .* got \(12,\); class numbers become rows with npnet.one_hot"),
    (X[0], Y[0], r"x: expected rows of shape \(samples, 4\), got \(4,\)"),
    (X[None], Y, r"x: expected rows of shape \(samples, 4\), got \(1, 12, 4\)"),
    (X[:0], Y[:0], r"x: expected rows of shape \(samples, 4\), got \(0, 4\)"),
    (X * 1j, Y, "x: expected real numbers, got dtype complex128"),
    (X.astype(object), Y, "x: expected real numbers, got dtype object"),
    (X, Y.astype(str), "y: expected real numbers, got dtype <U"),
    (RAGGED, Y, "x: expected an array of numbers, got a ragged list"),
    (X, None, "y: expected real numbers"),
    ("x", Y, "x: expected real numbers"),
]


@pytest.mark.parametrize(("x", "y", "message"), BAD_DATA)
@pytest.mark.parametrize("place", ACCEPT)
def test_bad_data_are_named_and_change_nothing(place, x, y, message):
    name = place.replace("evaluate", "test_data")
    refused(make(), lambda network: ACCEPT[place](network, (x, y)), (TypeError, ValueError), f"^{name}: {message}")


@pytest.mark.parametrize("pair", [5, X, (X,), (X, Y, Y), {}, "xyz"], ids=lambda pair: type(pair).__name__)
@pytest.mark.parametrize("place", ACCEPT)
def test_what_is_no_pair(place, pair):
    name = place.replace("evaluate", "test_data")
    message = rf"^{name}: expected a pair \(x, y\), two arrays with a row for each sample, got a {type(pair).__name__}"
    refused(make(), lambda network: ACCEPT[place](network, pair), TypeError, message)


@pytest.mark.parametrize("y", [2 * Y, 0 * Y, 1 - Y, np.full_like(Y, 1 / 3), np.where(Y, NAN, 0), np.where(Y, 1, -1)])
@pytest.mark.parametrize("place", ["test_data", "evaluate"])
def test_labels_that_are_not_one_hot_cannot_be_evaluated(place, y):
    refused(
        make(), lambda network: ACCEPT[place](network, (X, y)), ValueError, "one-hot rows.* row 0 is .*npnet.one_hot"
    )


@pytest.mark.parametrize("row", [0, 7, 4999])
@pytest.mark.parametrize(
    ("values", "shown"), [([NAN], "nan"), ([INF], "inf"), ([-INF, NAN], "-inf"), ([INF, -INF], "inf")]
)
@pytest.mark.parametrize(("place", "which"), [("training_data", 0), ("training_data", 1), ("test_data", 0)])
def test_the_first_value_that_is_not_finite_is_named(row, values, shown, place, which):
    pair = [np.tile(array, (500, 1)) for array in (X, Y)]
    pair[which][row, 1 : 1 + len(values)] = values
    message = rf"^{place}: {'xy'[which]}: the value at \[{row}, 1\] is {shown}, expected finite numbers"
    refused(make(), lambda network: ACCEPT[place](network, pair), ValueError, message)


def test_huge_values_are_data_unless_float32_cannot_hold_them():
    make().SGD((np.full_like(X, 1.7e308), Y), 1, 4, 3.0, (np.full_like(X, -1.7e308), Y), log=False)
    network = make(dtype=np.float32)
    refused(
        network, lambda network: network.SGD((X * 1e300, Y), 1, 4, 3.0), ValueError, r"x: the value at \[0, 0\] is inf"
    )


BAD_ARGUMENTS = {
    "epochs: expected a whole number, at least 0, got": [{"epochs": epochs} for epochs in NO_NUMBERS],
    "mini_batch_size: expected a whole number, at least 1, got": [{"mini_batch_size": n} for n in (0, *NO_NUMBERS)],
    "mini_batch_size: 13 is more than the 12 training samples": [{"mini_batch_size": 13}],
    "eta: expected a finite number, at least 0, got": [{"eta": e} for e in (NAN, INF, -1, None, "3", [1], 1j, 10**400)],
}


@pytest.mark.parametrize(("message", "bad"), [(m, bad) for m, some in BAD_ARGUMENTS.items() for bad in some])
def test_bad_arguments_of_sgd(message, bad, capsys):
    good = {"epochs": 1, "mini_batch_size": 4, "eta": 3.0}
    refused(make(), lambda network: network.SGD((X, Y), **good | bad), (TypeError, ValueError), f"^{message}")
    assert capsys.readouterr().out == ""


BAD_COLUMNS = [
    (X, Y.T, r"x\.T \(backprop takes columns\): expected rows of shape \(samples, 4\), got \(4, 12\)"),
    (X.T, Y, r"y\.T \(backprop takes columns\): expected rows of shape \(samples, 3\), got \(3, 12\)"),
    (X.T, Y.T[:, :5], "x and y must have a row per sample each, got 12 and 5 rows"),
    (X.T * 1j, Y.T, "expected real numbers, got dtype complex128"),
    (X.tolist(), Y.T, "expected"),
]


@pytest.mark.parametrize(("x", "y", "message"), BAD_COLUMNS)
def test_bad_columns_of_backprop(x, y, message):
    refused(make(), lambda network: network.backprop(x, y), (TypeError, ValueError), message)
