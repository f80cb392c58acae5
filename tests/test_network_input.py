"""What goes into a network: data of every kind, bad input with a message that helps, and training that diverges."""

import copy
import re
from pathlib import Path
from traceback import extract_tb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import npnet
from npnet import Network, NetworkWithCheckpointing, TrainingDiverged
from npnet.schedules import every_nth
from tests.test_network import KINDS, SIZES, UPDATES, Watched, X, Y, arrays_of, copies, make, same

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = [-1, 1.5, True, "2", None, [2], 2j]
RAGGED = [[1, 2], [3]]
ACCEPT = {
    "training_data": lambda network, pair: network.SGD(pair, 1, 4, 3.0),
    "test_data": lambda network, pair: network.SGD((X, Y), 1, 4, 3.0, pair),
    "mini_batch": lambda network, pair: network.update_mini_batch(pair, 3.0),
    "evaluate": lambda network, pair: network.evaluate(pair),
}


def refused(network, call, error, message):
    """``call(network)`` raises the error with npnet's message, and changes nothing."""
    before = copies(arrays_of(network))
    with pytest.raises(error, match=message):
        call(network)
    assert same(arrays_of(network), before)


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
    "schedule: expected a Schedule, a name or a list": [{"schedule": 7}, {"schedule": [1]}],
    "checkpoint_every_nth_layer or schedule, not both": [{"schedule": "sqrt", "checkpoint_every_nth_layer": 2}],
    "dtype": [{"dtype": kind} for kind in (int, complex, object, bool, str)],
    "rng": [{"rng": rng} for rng in ("a", True, 1.5, -1, np.random.RandomState(0))],
    "unknown backend 'abacus'; choose one of": [{"backend": "abacus"}],
}


@pytest.mark.parametrize(("message", "options"), [(m, o) for m, some in BAD_OPTIONS.items() for o in some])
def test_bad_options(message, options):
    with pytest.raises((TypeError, ValueError), match=message):
        make(**options)


W, B = make().weights, make().biases
BAD_PARAMETERS = [
    ("weights", W[:-1], ValueError, "weights: expected 4 arrays, one a layer, got 3"),
    ("biases", [], ValueError, "biases: expected 4 arrays, one a layer, got 0"),
    ("weights", [*W[:-1], W[-1].T], ValueError, r"weights\[3\]: expected shape \(3, 5\), got \(5, 3\)"),
    ("biases", [*B[:-1], B[-1].ravel()], ValueError, r"biases\[3\]: expected shape \(3, 1\), got \(3,\)"),
    ("weights", [*W[:-1], "w"], TypeError, r"weights\[3\]: expected real numbers"),
    ("weights", [*W[:-1], W[-1] * 1j], TypeError, r"weights\[3\]: expected real numbers"),
    ("biases", [*B[:-1], None], TypeError, r"biases\[3\]: expected real numbers"),
    ("biases", [*B[:-1], RAGGED], TypeError, r"biases\[3\]: expected an array of numbers, got a ragged list"),
    ("weights", None, TypeError, "weights: expected"),
    ("weights", 5, TypeError, "weights: expected"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_PARAMETERS)
def test_parameters_that_do_not_fit_change_nothing(name, value, error, message):
    refused(make(), lambda network: setattr(network, name, value), error, message)
    if isinstance(value, list) and len(value) == 4:
        refused(make(), lambda network: getattr(network, name).__setitem__(-1, value[-1]), error, message)


@pytest.mark.parametrize(
    "change", ["append(1)", "pop()", "clear()", "reverse()", "extend([1])", "__setitem__(slice(1), [1])"]
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
    message = rf"^{name}: expected a pair \(x, y\), got {type(pair).__name__}"
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
    (X.T.tolist(), Y.T, "expected"),
]


@pytest.mark.parametrize(("x", "y", "message"), BAD_COLUMNS)
def test_bad_columns_of_backprop(x, y, message):
    refused(make(), lambda network: network.backprop(x, y), (TypeError, ValueError), message)


@pytest.mark.parametrize("answer", [lambda d: d.T, lambda d: d[:1], lambda d: d.sum(), lambda d: None])
def test_cost_derivative_of_another_shape_is_refused(answer):
    network = make()
    network.cost_derivative = lambda a, y: answer(a - y)
    refused(network, UPDATES["SGD"], (TypeError, ValueError), r"cost_derivative: expected shape \(3, 4\)")


@pytest.mark.parametrize("answer", [lambda a: a[1:], lambda a: [b.T for b in a], lambda a: [*a, a[0]], lambda a: None])
def test_forward_between_checkpoints_of_other_shapes_is_refused(answer):
    message = r"forward_between_checkpoints\(0, 1\): expected activations of shapes \[\(4, 12\), \(5, 12\)\], got"
    refused(Watched(SIZES, 2, answer), lambda network: network.backprop(X.T, Y.T), (TypeError, ValueError), message)


@pytest.mark.parametrize("value", [INF, NAN, 1e300])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_divergence_names_epoch_and_step_and_leaves_the_weights_of_the_step_before(options, value):
    network, expected, steps = make(**options), make(**options), []
    network.cost_derivative = lambda a, y: (a - y) * (value if len(steps) == 5 else 1, steps.append(0))[0]
    expected.SGD((X, Y), 1, 4, 3.0, log=False)
    expected.SGD((X[:8], Y[:8]), 1, 4, 3.0, log=False)
    with (
        np.errstate(over="ignore"),
        pytest.raises(TrainingDiverged, match=r"^epoch 1, step 2, eta 3\.0: .*lower learning rate"),
    ):
        network.SGD((X, Y), 9, 4, 3.0, log=False)
    assert len(steps) == 6
    assert same(arrays_of(network), arrays_of(expected))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_overflow_forward_is_divergence_and_leaves_the_weights():
    network = make([2, 2, 3])
    network.weights[0] = np.array([[1e200, -1e200], [-1e200, 1e200]])
    x = np.full((12, 2), 1e200)  # inf - inf
    refused(network, lambda network: network.SGD((x, Y), 1, 4, 3.0), TrainingDiverged, "epoch 0, step 0")


@pytest.mark.filterwarnings("ignore:invalid value")
def test_overflow_backward_is_divergence_and_leaves_the_weights():
    network = make([2, 2, 2, 1])
    saddle = 1e200 * np.array([[1, -1], [-1, 1]])
    network.weights = [np.zeros((2, 2)), saddle, saddle[:1]]  # from a = 0.5 everywhere: z = 0, and dx = inf
    network.biases = [0 * bias for bias in network.biases]
    refused(network, lambda network: network.SGD((X[:, :2], Y[:, :1]), 1, 4, 3.0), TrainingDiverged, "epoch 0, step 0")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda b, w: (b, [NAN * nabla for nabla in w]), TrainingDiverged, "epoch 0, step 0"),
        (lambda b, w: ([nabla.T for nabla in b], w), ValueError, "expected shape"),
    ],
)
def test_backprop_of_a_subclass_that_goes_wrong_changes_nothing(change, error, message):
    network = make()
    network.backprop = lambda x, y: change(*Network.backprop(network, x, y))
    refused(network, UPDATES["SGD"], error, message)


JUNK = st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.integers(-3, 5) | st.complex_numbers()
ELSE = st.recursive(JUNK, lambda inner: st.lists(inner, max_size=5), max_leaves=12)
DTYPES = st.sampled_from(["f8", "f8", "f4", "f2", "i8", "u1", "?", "c16", "U3", "M8[s]", "m8[s]"])
SHAPES = st.sampled_from([(1, 4), (1, 3), (5, 4), (5, 3)]) | hnp.array_shapes(
    min_dims=0, max_dims=3, min_side=0, max_side=6
)
ARRAYS = hnp.arrays(DTYPES, SHAPES) | hnp.arrays(DTYPES, SHAPES).map(lambda array: array.tolist()) | ELSE


def assert_said_by_npnet(error):
    """The message is one of npnet's checks, not NumPy's complaint about operands."""
    assert Path(extract_tb(error.__traceback__)[-1].filename).parent == Path(npnet.__file__).parent, repr(error)
    assert re.search("expected|must have|diverged", str(error)), repr(error)
    assert not re.search("broadcast|aligned|operand|output array|casting", str(error)), repr(error)


@given(ELSE)
def test_whatever_sizes_get_a_network_or_an_explanation(sizes):
    try:
        Network(sizes)
    except (TypeError, ValueError) as error:
        assert_said_by_npnet(error)


@given(st.sampled_from(["feedforward", "backprop", *ACCEPT]), ARRAYS, ARRAYS, st.sampled_from(KINDS))
def test_whatever_batches_get_an_answer_or_an_explanation(place, x, y, options):
    network = make(**options)
    try:
        with np.errstate(all="ignore"):
            if place in ACCEPT:
                ACCEPT[place](network, (x, y))
            elif place == "feedforward":
                network.feedforward(x)
            else:
                network.backprop(np.transpose(x) if isinstance(x, np.ndarray) else X.T, np.asarray(y).T)
    except (TypeError, ValueError, TrainingDiverged) as error:
        assert_said_by_npnet(error)
