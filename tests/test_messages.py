"""What `fit` says of data that people have as they are: tables, images, labels, outputs that are squashed already."""

import warnings
from functools import partial

import numpy as np
import pytest

import npnet
from npnet import BCEWithLogits, Linear, MeanSquaredError, Quadratic, Sequential, Sigmoid, Softmax, SoftmaxCrossEntropy
from npnet.checkpoint import checkpoint
from npnet.datasets import scaled
from tests.guard import install_guard

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (64, 4, 2), np.uint8)  # as they are stored
X, CLASSES = IMAGES.reshape(64, 8).astype(np.float32) / 255, np.arange(64) % 3
Y = npnet.one_hot(CLASSES, 3, np.float32)
AS_ROWS = partial(scaled, dtype=np.float32)


def model(outputs=3, output="identity", **options):
    return npnet.mlp([8, 6, outputs], output=output, rng=0, **options)


def fit(data, trained=None, loss=None, **options):
    """The weights after it, and its history."""
    trained, loss = trained or model(), loss or SoftmaxCrossEntropy()
    defaults = {"optimizer": npnet.Adam(0.01), "epochs": 2, "batch_size": 24, "rng": 0, "log": False}
    history = npnet.fit(trained, data, loss=loss, **(defaults | options))
    return [parameter.value for parameter in trained.parameters()], history


def same(a, b):
    return all(map(np.array_equal, a[0], b[0])) and a[1].accuracy == b[1].accuracy


# Images as they are stored.


@pytest.mark.parametrize(
    "options",
    [{}, {"capture": True}, {"schedule": "sqrt"}, {"accumulation_steps": 2}, {"memory_budget": "1 MB"}],
    ids=str,
)
def test_images_are_made_rows_by_the_transform(options):
    images = fit((IMAGES, Y), transform=AS_ROWS, test_data=(IMAGES, Y), **options)
    assert same(images, fit((X, Y), test_data=(X, Y), **options))
    assert images[1].accuracy is not None


def test_images_of_a_run_that_is_saved_and_resumed(tmp_path):
    def resumed(epochs, resume):
        saver = npnet.Saver(tmp_path / "run.npz", resume=resume)
        return fit((IMAGES, Y), transform=AS_ROWS, saver=saver, epochs=epochs)

    resumed(1, False)
    assert same(resumed(2, True), fit((X, Y)))


def test_images_on_a_device():
    with install_guard():
        device = model(backend="guard")
        options = {"transform": AS_ROWS, "test_data": (IMAGES, Y)}
        weights, history = fit((IMAGES, Y), device, **options)
        expected = fit((X, Y), test_data=(X, Y))
        assert all(map(np.array_equal, map(npnet.to_host, weights), expected[0]))
        assert history.accuracy == expected[1].accuracy


@pytest.mark.parametrize(
    ("x", "transform", "message"),
    [
        (
            IMAGES,
            None,
            r"^training data: expected x of shape .*, got \(64, 4, 2\); x\.reshape\(len\(x\), -1\) makes rows",
        ),
        (IMAGES, lambda x: x.astype("f4"), r"^training data: layer 0, .*expected rows .*, got \(1, 4, 2\)"),
        (IMAGES, lambda x: x[:0], r"^transform: expected a row for each row of x, of 1 it made shape \(0, 4, 2\)"),
        (IMAGES[:0], AS_ROWS, r"^training data: expected x of shape .*, got \(0, 4, 2\)"),
        (X[:, 0], AS_ROWS, r"^training data: expected x of shape \(samples, features\), got \(64,\)"),
    ],
)
def test_what_is_not_made_rows_is_refused(x, transform, message):
    with pytest.raises(ValueError, match=message):
        fit((x, Y[: len(x)]), transform=transform)


# Tables.


class Table:
    """What npnet knows of a DataFrame or a Series."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array, dtype)

    def __len__(self):
        return len(self.array)


def test_tables_are_taken_as_arrays():
    tables = fit((Table(X), Table(Y)), test_data=(Table(X), Table(Y)))
    assert same(tables, fit((X, Y), test_data=(X, Y)))
    assert np.array_equal(npnet.one_hot(Table(CLASSES), 3), Y)


def test_dataframes_are_taken_and_what_does_not_fit_is_named():
    pandas = pytest.importorskip("pandas")
    x, y = pandas.DataFrame(X, index=range(64, 0, -1)), pandas.DataFrame(Y)
    assert same(fit((x, y), test_data=(x, y)), fit((X, Y), test_data=(X, Y)))
    assert np.array_equal(npnet.one_hot(pandas.Series(CLASSES), 3), Y)
    with pytest.raises(ValueError, match=r"training data: targets: .*one_hot"):
        fit((x, pandas.Series(CLASSES)))
    with pytest.raises(TypeError, match=r"labels: .*numpy\.unique"):
        npnet.one_hot(pandas.Series(["cat", "dog"]), 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((Table(X.astype(object)), Y), r"training data: .* has dtype object.* convert with x\.astype\('float32'\)"),
        ((Table(X), Table(CLASSES.astype(str))), r"training data: targets: .* dtype <U\d+; names .*numpy\.unique"),
        ((X.tolist(), Y), "^training data: x: expected an array of .*, got list"),
        ((X, Y.tolist()), "^training data: y: expected an array of .*, got list"),
        ((np.ma.masked_array(X), Y), "^training data: x: expected a plain array, got a MaskedArray"),
        ((Table, Y), "^training data"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused_by_name(data, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fit(data)


# Targets of shape (samples,).

COLUMN, ONE_HOT = r"; targets, one a sample, become a column with y\.reshape\(-1, 1\)", "; class numbers become rows"
NUMBERS = X[:, 0]


@pytest.mark.parametrize(
    ("loss", "outputs", "y", "message"),
    [
        (Quadratic, 1, NUMBERS, rf"got \(64,\){COLUMN}$"),
        (MeanSquaredError, 1, NUMBERS, rf"got \(64,\){COLUMN}$"),
        (MeanSquaredError, 1, CLASSES, rf"got \(64,\){COLUMN}$"),
        (Quadratic, 3, NUMBERS, rf"got \(64,\){COLUMN}, for a network with one output$"),
        (Quadratic, 3, CLASSES, rf"got \(64,\){ONE_HOT} with .*{COLUMN}, for a network with one output$"),
        (BCEWithLogits, 1, CLASSES, rf"got \(64,\){COLUMN}$"),
        (BCEWithLogits, 3, CLASSES, rf"got \(64,\){COLUMN}, for a network with one output$"),
        (SoftmaxCrossEntropy, 3, CLASSES, rf"got \(64,\){ONE_HOT} with npnet\.one_hot\(labels, classes\)$"),
        (SoftmaxCrossEntropy, 1, CLASSES, rf"got \(64,\){ONE_HOT} with .*, for a network with an output for each$"),
    ],
)
def test_a_number_for_each_sample_becomes_a_row_as_the_loss_needs_it(loss, outputs, y, message):
    with pytest.raises(ValueError, match=f"^training data: targets: .*{message}"):
        fit((X, y), model(outputs), loss())


def test_a_step_says_it_too():
    with pytest.raises(ValueError, match=rf"got \(64, 1\) and \(64,\).*{COLUMN}$"):
        npnet.train_step(model(1), MeanSquaredError(), npnet.SGD(0.1), "none", X, NUMBERS)


# Labels that are none.


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog"], r"got dtype <U3; names, labels = numpy\.unique\(labels, return_inverse=True\)"),
        (np.array(["cat", None], object), r"got dtype object; names, labels = numpy\.unique"),
        ([1.0, 2.0], r"got dtype float64; labels\.astype\(int\)"),
    ],
)
def test_one_hot_says_how_names_become_numbers(labels, message):
    with pytest.raises(TypeError, match=f"^labels: expected whole numbers, {message}"):
        npnet.one_hot(labels, 3)
    numbers = np.unique(["cat", "dog"], return_inverse=True)[1]
    assert npnet.one_hot(numbers, 2).tolist() == [[1, 0], [0, 1]]


# Outputs that are squashed already.

SQUASHED = {
    "softmax": (lambda: model(output="softmax"), SoftmaxCrossEntropy, "ends with softmax, but SoftmaxCrossEntropy"),
    "sigmoid": (lambda: model(output="sigmoid"), BCEWithLogits, "ends with sigmoid, but BCEWithLogits applies sigmoid"),
    "a layer of its own": (lambda: Sequential(Linear(8, 3), Softmax()), SoftmaxCrossEntropy, "ends with softmax"),
    "nested": (
        lambda: Sequential(Linear(8, 4), checkpoint(Sequential(Linear(4, 3), Sigmoid()))),
        BCEWithLogits,
        "ends with sigmoid",
    ),
    "stored in half": (
        lambda: npnet.mixed_precision(model(output="softmax")),
        SoftmaxCrossEntropy,
        "ends with softmax",
    ),
}


@pytest.mark.parametrize("name", SQUASHED)
def test_an_output_that_is_squashed_already_is_warned_of_once_at_the_call(name):
    make, loss, message = SQUASHED[name]
    with pytest.warns(UserWarning, match=rf'^the model {message}.* use "identity" as the last activation') as caught:
        npnet.fit(
            make(), (X, Y), loss=loss(), optimizer=npnet.SGD(0.1), epochs=2, batch_size=32, test_data=(X, Y), log=False
        )
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (model, SoftmaxCrossEntropy),
        (model, BCEWithLogits),
        (lambda: model(output="sigmoid"), Quadratic),
        (lambda: model(output="softmax"), MeanSquaredError),
        (lambda: Sequential(Linear(8, 3), npnet.Residual(Sigmoid())), SoftmaxCrossEntropy),  # a sum, without bounds
        (lambda: Sequential(Linear(8, 8, rng=0), Sigmoid(), Linear(8, 3)), SoftmaxCrossEntropy),
    ],
)
def test_other_outputs_are_not_warned_of(make, loss):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit((X, Y), make(), loss())
