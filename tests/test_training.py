"""The training loop: the same numbers under every schedule, and a history that survives whatever breaks it off."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import schedules
from npnet.run import Epoch, History
from npnet.training import fit

SIZES = [6, 8, 7, 8, 7, 8, 4]
DEPTH = len(SIZES) - 1
SCHEDULES: dict[str, Any] = {
    "none": "none",
    "sqrt": "sqrt",
    **{f"every {n}": lambda depth, n=n: schedules.every_nth(depth, n) for n in (1, 2, 3, 5)},
    "list": list(schedules.every_nth(DEPTH, 4)),
}


def problem(samples: int = 50, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around one of four centres each, and which, one-hot."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=samples)
    centres = np.random.default_rng(99).standard_normal((4, SIZES[0])) * 3
    x = centres[labels] + rng.standard_normal((samples, SIZES[0]))
    return x.astype(np.float32), np.eye(4, dtype=np.float32)[labels]


def model(seed: int = 0) -> npnet.Sequential:
    return npnet.mlp(SIZES, rng=seed)


def weights(trained: npnet.Sequential) -> list[np.ndarray]:
    return [parameter.value.copy() for parameter in trained.parameters()]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def run(trained: npnet.Sequential | None = None, data: Any = None, **options: Any) -> tuple[list[np.ndarray], History]:
    """The weights after `fit`, and its history."""
    trained = model() if trained is None else trained
    defaults: dict[str, Any] = {
        "loss": npnet.SoftmaxCrossEntropy(),
        "optimizer": npnet.Adam(0.01),
        "epochs": 3,
        "batch_size": 16,
        "rng": 0,
        "log": False,
    }
    history = fit(trained, problem() if data is None else data, **defaults | options)
    return weights(trained), history


def numbers(history: History) -> list[Any]:
    return [(epoch.epoch, epoch.steps, epoch.loss, epoch.accuracy) for epoch in history.epochs]


# What training comes to.


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("optimizer", [lambda: npnet.SGD(0.1), lambda: npnet.SGD(0.1, 0.9), lambda: npnet.Adam(0.01)])
def test_the_schedule_changes_no_weight_and_no_loss(name: str, optimizer: Callable[[], npnet.Optimizer]) -> None:
    options: dict[str, Any] = {"test_data": problem(30, 1), "decay": True}
    plain, plain_history = run(optimizer=optimizer(), **options)
    other, other_history = run(optimizer=optimizer(), schedule=SCHEDULES[name], **options)
    assert same(other, plain)
    assert numbers(other_history) == numbers(plain_history)
    assert not any(map(np.array_equal, plain, weights(model())))


@pytest.mark.parametrize("name", SCHEDULES)
def test_capturing_changes_no_weight_and_no_loss(name: str) -> None:
    options: dict[str, Any] = {"schedule": SCHEDULES[name], "test_data": problem(30, 1), "decay": True}
    plain, plain_history = run(**options)
    captured, history = run(**options, capture=True)
    assert same(captured, plain)
    assert numbers(history) == numbers(plain_history)


def test_a_captured_run_goes_on_with_a_save_of_one_that_was_not(tmp_path: Path) -> None:
    straight, _ = run(epochs=4)
    for first, second in ((False, True), (True, False)):
        path = tmp_path / f"{first}.npz"
        run(epochs=2, capture=first, saver=npnet.Saver(path))
        found, _ = run(model(5), epochs=4, capture=second, saver=npnet.Saver(path, resume=True))
        assert same(found, straight)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulation_steps": 2},
        {"clip_norm": 1.0},
        {"scaler": npnet.GradScaler()},
        {"determinism_check": True},
        {"streaming": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_captured_is_refused(options: dict[str, Any]) -> None:
    trained = model()
    with pytest.raises(ValueError, match="capture: a step is recorded without"):
        run(trained, capture=True, **options)
    assert same(weights(trained), weights(model()))


def test_it_learns() -> None:
    _, history = run(data=problem(200), epochs=30, test_data=problem(100, 1))
    assert history.accuracy is not None
    assert history.accuracy > 0.95
    assert history.epochs[-1].loss < 0.1 * history.epochs[0].loss


def test_the_seed_decides_the_order() -> None:
    assert same(run(rng=1)[0], run(rng=1)[0])
    assert same(run(rng=1)[0], run(rng=np.random.default_rng(1))[0])
    assert not same(run(rng=1)[0], run(rng=2)[0])
    assert same(run(rng=1, shuffle=False)[0], run(rng=2, shuffle=False)[0])
    assert not same(run(rng=1)[0], run(rng=1, shuffle=False)[0])
    state = np.random.get_state()[1].copy()
    run(rng=None)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # NumPy's global stream is left alone


def test_fit_is_its_steps_one_after_another() -> None:
    """By hand: in order, 16 + 16 + 16 + 2 samples, a step each."""
    x, y = problem()
    trained, loss, optimizer, plan = model(), npnet.SoftmaxCrossEntropy(), npnet.Adam(0.01), schedules.none(DEPTH)
    losses = [
        npnet.train_step(trained, loss, optimizer, plan, x[start : start + 16], y[start : start + 16])
        for _ in range(2)
        for start in (0, 16, 32, 48)
    ]
    by_fit, history = run(shuffle=False, epochs=2)
    assert same(by_fit, weights(trained))
    assert [epoch.steps for epoch in history.epochs] == [4, 4]
    rows = [16, 16, 16, 2]  # each sample counts once, whatever step it was in
    means = [np.average(losses[i : i + 4], weights=rows) for i in (0, 4)]
    assert [epoch.loss for epoch in history.epochs] == [pytest.approx(mean) for mean in means]


def test_a_step_returns_the_loss_before_it() -> None:
    x, y = problem()
    trained, loss = model(), npnet.SoftmaxCrossEntropy()
    before = float(loss(trained.predict(x), y))
    assert npnet.train_step(trained, loss, npnet.SGD(0.1), schedules.none(DEPTH), x, y) == before
    assert float(loss(trained.predict(x), y)) < before


def test_history_says_what_happened() -> None:
    trained = model()
    _, history = run(trained, epochs=2, test_data=problem(30, 1))
    assert [epoch.epoch for epoch in history.epochs] == [1, 2]
    assert all(isinstance(epoch.loss, float) and epoch.seconds > 0 for epoch in history.epochs)
    assert history.seconds == sum(epoch.seconds for epoch in history.epochs)
    x, y = problem(30, 1)
    assert history.accuracy == history.epochs[-1].accuracy
    assert history.accuracy == np.mean(trained.predict(x).argmax(axis=1) == y.argmax(axis=1))
    assert history.rows()[1] == {
        "epoch": 2,
        "steps": 4,
        "loss": history.epochs[1].loss,
        "accuracy": history.accuracy,
        "seconds": history.epochs[1].seconds,
    }
    given = history
    _, history = run(trained, epochs=1, history=given)  # and goes on in the one that is given
    assert history is given
    assert [epoch.epoch for epoch in history.epochs] == [1, 2, 3]
    assert history.epochs[2].accuracy is None
    assert history.accuracy == history.epochs[1].accuracy  # the last that was measured
    assert (History().accuracy, History().seconds, History().rows()) == (None, 0, [])
    assert run(epochs=0)[1] == History()


# The learning rate.


class Recorder(npnet.SGD):
    """Keeps the learning rate of each update, and breaks off at one of them if told to."""

    def __init__(self, break_at: int | None = None) -> None:
        super().__init__(0.1)
        self.rates: list[float] = []
        self.break_at = break_at

    def step(self, parameters: Any) -> None:
        self.rates.append(self.learning_rate)
        if len(self.rates) == self.break_at:
            raise RuntimeError("broken off")
        super().step(parameters)


def test_decay_falls_linearly_towards_zero_and_is_undone() -> None:
    optimizer = Recorder()
    run(optimizer=optimizer, epochs=3, decay=True)
    rates = optimizer.rates[::DEPTH]  # an update for each layer
    assert len(optimizer.rates) == 3 * 4 * DEPTH
    assert rates == [pytest.approx(0.1 * (12 - step) / 12) for step in range(12)]
    assert optimizer.learning_rate == 0.1
    run(optimizer=optimizer, epochs=1, decay=True, history=History([Epoch(7, 1, 1.0, None, 1.0)]))
    assert optimizer.rates[-4 * DEPTH :: DEPTH] == [pytest.approx(0.1 * (4 - step) / 4) for step in range(4)]


def test_without_decay_the_rate_stays() -> None:
    optimizer = Recorder()
    run(optimizer=optimizer)
    assert set(optimizer.rates) == {0.1}


def test_the_rate_is_restored_after_an_exception() -> None:
    optimizer = Recorder(break_at=7 * DEPTH)
    with pytest.raises(RuntimeError, match="broken off"):
        run(optimizer=optimizer, decay=True)
    assert optimizer.rates[-1] < 0.1
    assert optimizer.learning_rate == 0.1


# Broken off.


class Stops(npnet.SoftmaxCrossEntropy):
    """Does something with its value at the n-th call, from 1."""

    def __init__(self, at: int, what: Callable[[Any], Any]) -> None:
        self.at, self.what = at, what
        self.values: list[float] = []

    def value_and_gradient(self, output: Any, target: Any) -> tuple[Any, Any]:
        value, gradient = super().value_and_gradient(output, target)
        self.values.append(float(value))
        return (self.what(value) if len(self.values) == self.at else value), gradient


def interrupt(_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("at", "steps"), [(1, []), (2, [1]), (4, [3]), (5, [4]), (7, [4, 2])])
def test_ctrl_c_leaves_a_history_of_what_was_done(at: int, steps: list[int]) -> None:
    loss, history = Stops(at, interrupt), History()
    with pytest.raises(KeyboardInterrupt):
        run(loss=loss, history=history, test_data=problem(30, 1))
    assert [epoch.steps for epoch in history.epochs] == steps
    assert [epoch.accuracy is not None for epoch in history.epochs] == [count == 4 for count in steps]
    for epoch in history.epochs:
        first = 4 * (epoch.epoch - 1)
        rows = [16, 16, 16, 2][: epoch.steps]
        assert epoch.loss == pytest.approx(np.average(loss.values[first : first + epoch.steps], weights=rows))
        assert epoch.seconds > 0


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["none", "every 2"])
def test_divergence_names_epoch_and_step_and_changes_nothing(bad: float, name: str) -> None:
    trained, history = model(), History()
    expected = model()
    loss = npnet.SoftmaxCrossEntropy()
    run(expected, epochs=1, shuffle=False, loss=loss, optimizer=(optimizer := npnet.SGD(0.1)))
    x, y = problem()
    npnet.train_step(expected, loss, optimizer, schedules.none(DEPTH), x[:16], y[:16])
    with pytest.raises(npnet.TrainingDiverged, match=r"epoch 2, step 2 of 4: the loss.* -?(inf|nan).*learning rate"):
        run(
            trained,
            loss=Stops(6, lambda value: value * 0 + bad),
            optimizer=npnet.SGD(0.1),
            schedule=SCHEDULES[name],
            shuffle=False,
            history=history,
        )
    assert same(weights(trained), weights(expected))  # after five steps
    assert [epoch.steps for epoch in history.epochs] == [4, 1]
    assert all(np.isfinite(epoch.loss) for epoch in history.epochs)


def test_a_training_that_really_diverges_is_stopped() -> None:
    trained = npnet.mlp([6, 8, 4], rng=0)
    with (
        np.errstate(all="ignore"),
        pytest.raises(npnet.TrainingDiverged, match=r"epoch \d+, step \d+ of 4: the loss.* (inf|nan)"),
    ):
        run(trained, loss=npnet.MeanSquaredError(), optimizer=npnet.SGD(1e6), epochs=50)
