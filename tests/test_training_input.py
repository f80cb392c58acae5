"""What `fit` refuses, what it shows, and what a step costs in memory."""

from typing import Any

import numpy as np
import pytest

import npnet
from npnet import schedules
from npnet.measuring import StepCost, step_costs
from tests.guard import install_guard
from tests.test_training import Stops, interrupt, model, problem, run, same, weights

MB = 1_000_000


# Refused before the first step, with what was wrong.


def spoiled(place: tuple[int, int], value: float, of: str = "x", samples: int = 50) -> Any:
    """The problem with one number replaced."""
    x, y = problem(samples)
    (x if of == "x" else y)[place] = value
    return x, y


X, Y = problem()
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "NaN in x": ({"data": spoiled((7, 3), np.nan)}, r"training data: x: the value at \[7, 3\] is nan, expected finite"),
    "infinity in x": ({"data": spoiled((49, 0), -np.inf)}, r"training data: x: the value at \[49, 0\] is -inf"),
    "NaN in y": (
        {"data": spoiled((0, 1), np.nan, "y"), "loss": npnet.Quadratic()},
        r"training data: y: .*\[0, 1\] is nan",
    ),
    "NaN in y, softmax": ({"data": spoiled((0, 1), np.nan, "y")}, "training data: y: .*nan|probabilities"),
    "NaN in the test data": ({"test_data": spoiled((1, 2), np.nan)}, r"test data: x: the value at \[1, 2\] is nan"),
    "batch larger than the data": ({"batch_size": 51}, "batch_size: 51 is more than the 50 training samples"),
    "no samples in a batch": ({"batch_size": 0}, "batch_size: expected a whole number, at least 1, got 0"),
    "negative epochs": ({"epochs": -1}, "epochs: expected a whole number, at least 0, got -1"),
    "two ones": ({"data": spoiled((3, slice(0, 2)), 1.0, "y")}, "targets: softmax cross-entropy needs.*npnet.one_hot"),
    "no ones": ({"data": (X, Y * 0)}, "targets: softmax cross-entropy needs rows of probabilities"),
    "a negative target": ({"data": (X, Y * 3 - 0.5)}, "targets: softmax cross-entropy needs rows of probabilities"),
    "class numbers": (
        {"data": (X, Y.argmax(axis=1))},
        r"targets: expected rows of shape \(samples, 4\), got \(50,\).*one_hot",
    ),
    "class numbers in a column": (
        {"data": (X, Y[:, :1])},
        r"targets: expected rows of shape \(samples, 4\), got \(50, 1\)",
    ),
    "too many classes": (
        {"data": (X, np.eye(5, dtype=np.float32)[Y.argmax(1)])},
        r"targets: .*\(samples, 4\), got \(50, 5\)",
    ),
    "too few features": (
        {"data": (X[:, 1:], Y)},
        r"Dense\(6, 8, relu\): expected rows of shape \(batch, 6\), got \(1, 5\)",
    ),
    "features of the test data": (
        {"test_data": (X[:, 1:], Y)},
        r"^test data: layer 0, .*expected rows of shape \(batch, 6\), got \(1, 5\)",
    ),
    "class numbers of the test data": ({"test_data": (X, Y.argmax(axis=1))}, r"^test data: targets: .*one_hot"),
    "columns": ({"data": (X.T, Y)}, "training data: x and y must have a row per sample each, got 6 and 50 rows"),
    "a single sample": (
        {"data": (X[0], Y[0])},
        r"training data: expected x of shape \(samples, features\), got \(6,\)",
    ),
    "no data": ({"data": (X[:0], Y[:0])}, r"training data: expected x of shape \(samples, features\), got \(0, 6\)"),
    "fewer targets": ({"data": (X, Y[:-1])}, "training data: x and y must have .* got 50 and 49 rows"),
    "fewer test targets": ({"test_data": (X, Y[:-1])}, "test data: x and y must have .* got 50 and 49 rows"),
    "test labels not one-hot": ({"test_data": (X, Y / 2 + 0.125)}, "test data.*: expected one-hot rows"),
    "unknown schedule": ({"schedule": "every 2"}, "unknown schedule 'every 2'; choose one of 'none', 'sqrt'"),
    "schedule of another depth": ({"schedule": schedules.none(3)}, "'plain' is for 3 layers, the network has 6"),
    "negative seed": ({"rng": -1}, "rng .*: expected a whole number, at least 0, got -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_the_first_step(name: str) -> None:
    options, message = REFUSED[name]
    trained, history = model(), npnet.History()
    with pytest.raises(ValueError, match=message):
        run(trained, history=history, **options)
    assert same(weights(trained), weights(model()))
    assert not history.epochs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data": (X.astype(np.float64), Y)},
            r"the input has dtype float64, the weights float32; convert with x\.astype",
        ),
        ({"batch_size": 2.5}, "batch_size: expected a whole number"),
        ({"epochs": True}, "epochs: expected a whole number"),
        ({"rng": "0"}, "rng .*: expected a whole number"),
        ({"schedule": 3}, "schedule: expected a Schedule .* list of"),
    ],
)
def test_what_is_of_another_type_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        run(**options)


def test_data_on_another_backend_are_refused() -> None:
    with install_guard():
        device = tuple(npnet.to_backend(array, "guard") for array in problem())
        with pytest.raises(TypeError, match=r"input is on backend 'guard', the weights on 'numpy'.*npnet\.to_backend"):
            run(data=device)


# What is shown.


def test_nothing_is_shown_without_log(capfd: pytest.CaptureFixture[str]) -> None:
    run(test_data=problem(30, 1), log=False)
    assert capfd.readouterr() == ("", "")


def test_the_bar_shows_loss_accuracy_and_what_else_there_is(capfd: pytest.CaptureFixture[str]) -> None:
    _, history = run(test_data=problem(30, 1), log=True, show={"peak": "1.23 MB"})
    out, err = capfd.readouterr()
    assert out == ""
    last = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("epoch 3: 100%")][-1]
    final = history.epochs[-1]
    for text in ("4/4", f"loss={final.loss:.4f}", f"accuracy={final.accuracy:.4f}", "peak=1.23 MB"):
        assert text in last
    assert err.count("\n") == 3  # a line per epoch


def test_without_test_data_the_bar_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    run(epochs=1, log=True)
    assert "accuracy=-" in capfd.readouterr().err


def test_the_bar_is_closed_when_training_is_broken_off(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(loss=Stops(3, interrupt), log=True)
    assert capfd.readouterr().err.endswith("\n")


# What a step costs.


def test_step_costs_of_a_deep_network() -> None:
    x, y = problem(2000)
    deep = npnet.mlp([6, *[32] * 24, 4], rng=0)
    plans = [schedules.none(25), schedules.every_nth(25, 5), schedules.sqrt(25), schedules.every_nth(25, 2)]
    optimizer = npnet.Adam(0.01)
    before = weights(deep)
    costs = step_costs(deep, npnet.SoftmaxCrossEntropy(), optimizer, plans, x, y, rounds=3)
    assert [cost.schedule for cost in costs] == ["plain", "every 5", "every 5", "every 2"]
    assert [cost.extra_forwards for cost in costs] == [0, 16, 16, 12]
    plain, every_5, again, every_2 = (cost.peak_bytes for cost in costs)
    activation = 2000 * 32 * 4
    assert plain > 24 * activation  # all of them at once
    assert every_5 < 13 * activation  # 4 checkpoints, 5 activations of a segment, gradients, parameters
    assert every_5 < every_2 < 0.75 * plain
    assert abs(again - every_5) < 0.01 * every_5
    assert all(cost.seconds > 0 for cost in costs)
    assert same(weights(deep), before)  # measured on copies
    assert not optimizer._state
    assert all(parameter.gradient is None for parameter in deep.parameters())


def step_costs_within(seconds: float | None, log: bool = False) -> list[StepCost]:
    model, plans = npnet.mlp([6, 9, 4], rng=0), [schedules.none(2), schedules.sqrt(2)]
    return step_costs(model, npnet.Quadratic(), npnet.SGD(0.1), plans, *problem(16), rounds=9, seconds=seconds, log=log)


def test_measuring_ends_when_its_time_is_over() -> None:
    for seconds, rounds in ((0, 1), (None, 9), (60, 9)):
        costs = step_costs_within(seconds)
        assert [cost.rounds for cost in costs] == [rounds, rounds]
        assert costs[0].ratio == 1
        assert all(cost.seconds > 0 for cost in costs)


def test_measuring_shows_its_progress(capfd: pytest.CaptureFixture[str]) -> None:
    for log in (False, True):
        step_costs_within(None, log)
        assert ("measuring steps" in capfd.readouterr().err) == log


def test_peak_of_a_step_counts_parameters_optimizer_and_activations() -> None:
    x, y = problem(16)
    wide = npnet.mlp([6, 1000, 500, 4], rng=0)
    parameters = sum(parameter.value.nbytes for parameter in wide.parameters())
    loss, plan = npnet.SoftmaxCrossEntropy(), [schedules.none(3)]
    sgd, adam = (
        step_costs(wide, loss, optimizer, plan, x, y, rounds=1)[0].peak_bytes
        for optimizer in (npnet.SGD(0.1), npnet.Adam(0.1))
    )
    assert 2 * parameters < sgd < 2.3 * parameters  # the parameters, the largest layer's gradient
    assert 4 * parameters < adam < 4.3 * parameters  # and Adam's two averages


def test_gradients_of_all_layers_are_never_alive_together() -> None:
    x, y = problem(16)
    wide = npnet.mlp([6, *[400] * 8, 4], rng=0)
    optimizer, loss, plan = npnet.SGD(0.1), npnet.SoftmaxCrossEntropy(), schedules.none(9)
    gradients = sum(parameter.value.nbytes for parameter in wide.parameters())
    largest = max(parameter.value.nbytes for parameter in wide.parameters())

    def streaming() -> None:
        npnet.train_step(wide, loss, optimizer, plan, x, y)

    def all_at_once() -> None:
        npnet.backpropagate(wide.layers, plan, x, lambda output: loss.value_and_gradient(output, y)[1])
        optimizer.step(wide.parameters())

    streaming()
    assert npnet.measure_peak(streaming).increase_bytes < 2 * largest  # one gradient, and small activations
    assert npnet.measure_peak(all_at_once).increase_bytes > gradients
