"""A run that is broken off anywhere and gone on with is the run that was never broken off, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import Saver, optimizers, run, training
from npnet.archive import read_archive, write_archive
from npnet.losses import accuracy
from tests.small_training import EPOCHS, TRAININGS, Broken, Result, X

AT_ALL = [(name, every) for name in TRAININGS for every in ((1, 2, 3) if name == "adam" else (3,))]


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody pulls the plug here."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.mark.parametrize(("name", "every"), AT_ALL)
def test_broken_off_at_every_step_and_resumed_it_is_the_same_run(name: str, every: int, tmp_path: Path) -> None:
    training = TRAININGS[name]
    whole = training.run().state()
    assert len(whole["history"]) == EPOCHS
    for at in range(1, EPOCHS * training.steps() + 1):
        path = tmp_path / f"{at}{training.suffix}"
        training.broken(path, at, every)
        assert training.resumed(path).state() == whole, at
        assert training.resumed(path).state() == whole, f"{at}: finished, resumed"


@pytest.mark.parametrize("name", ["adam", "scaler, clipped, accumulated", "momentum, decay", "set_seed"])
def test_broken_off_again_and_again_it_is_the_same_run(name: str, tmp_path: Path) -> None:
    """Each time some calls after it went on, so that now and then nothing new was saved."""
    training, path = TRAININGS[name], tmp_path / "save.npz"
    whole, resumes = training.run().state(), 0
    rng = np.random.default_rng(5)
    while True:
        try:
            training.broken(path, int(rng.integers(1, 8)), 2, seed=resumes if path.exists() else 0, resume=True)
        except AssertionError:  # it came to its end
            break
        resumes += 1
    assert resumes >= 4
    assert training.resumed(path).state() == whole


@pytest.mark.parametrize("every", [1, 3, 100])
def test_broken_off_in_evaluation(every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of the epoch are done, its accuracy and its place in the history are not."""
    whole = TRAININGS["adam"].run().state()
    for at in range(1, EPOCHS + 1):
        calls, path = 0, tmp_path / f"{at}.npz"

        def broken(*arguments: Any, at: int = at) -> float:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Broken
            return accuracy(*arguments)

        monkeypatch.setattr(training, "accuracy", broken)
        with pytest.raises(Broken):
            TRAININGS["adam"].run(saver=Saver(path, every))
        monkeypatch.setattr(training, "accuracy", accuracy)
        assert TRAININGS["adam"].resumed(path).state() == whole


def test_going_on_with_the_same_objects(tmp_path: Path) -> None:
    """As in a notebook: what the broken run left in them does not matter, nor the epoch that it left in the history."""
    for name in ("adam", "scaler, clipped, accumulated"):
        training, path = TRAININGS[name], tmp_path / f"{name}.npz"
        whole = training.run().state()
        npnet.set_seed(0)
        result = Result(training.model(0), training.optimizer(), training.scaler and training.scaler(), None)
        result.generator = np.random.Generator(np.random.PCG64(0))
        loss = npnet.SoftmaxCrossEntropy()
        options = {"epochs": EPOCHS, "batch_size": 4, "loss": loss} | training.options
        for at in (5, 8, 0):
            left = iter(range(at - 1))

            def value_and_gradient(*pair: Any, left: Any = left, at: int = at, loss: npnet.Loss = loss) -> Any:
                if at and next(left, None) is None:
                    raise KeyboardInterrupt
                return type(loss).value_and_gradient(loss, *pair)

            loss.value_and_gradient = value_and_gradient  # type: ignore[method-assign]
            try:
                result.fit(**options, saver=Saver(path, 1, resume=True))
            except KeyboardInterrupt:
                assert result.history.epochs[-1].accuracy is None
        assert result.state() == whole


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "sqrt"},
        {"schedule": npnet.schedules.every_nth(5, 2, frozenset({2, 4}))},
        {"memory_budget": "1 MB"},
        {"streaming": False},
        {"determinism_check": True},
    ],
)
def test_what_decides_no_number_may_change(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = TRAININGS["adam"].run().state()
    TRAININGS["adam"].broken(tmp_path / "save.npz", 8)
    assert TRAININGS["adam"].resumed(tmp_path / "save.npz", **changes).state() == whole


def test_the_history_of_before_is_there_again(tmp_path: Path) -> None:
    training, path = TRAININGS["adam"], tmp_path / "save.npz"
    before = [run.Epoch(1, 9, 0.5, 0.25, 1.5), run.Epoch(2, 9, 0.25, None, 1.0)]
    whole = training.run(history=npnet.History([*before])).history
    with pytest.raises(Broken):
        training.run(at=8, saver=Saver(path, 1), history=npnet.History([*before]))
    history = npnet.History()
    training.resumed(path, history=history)
    assert [epoch.epoch for epoch in history.epochs] == [1, 2, 3, 4, 5]
    assert history.epochs[:2] == before
    assert whole == npnet.History()  # the one that was given is the one that was filled


def test_more_epochs_go_on_and_fewer_change_nothing(tmp_path: Path) -> None:
    training, path = TRAININGS["adam"], tmp_path / "save.npz"
    whole = training.run(epochs=5).state()
    training.run(saver=Saver(path))
    assert training.resumed(path, epochs=5).state() == whole
    content = path.read_bytes()
    assert training.resumed(path, epochs=2).state() == whole
    assert path.read_bytes() == content


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_save_keeps_the_layout_of_arrays(suffix: str, tmp_path: Path) -> None:
    """It decides how products round."""
    arrays = {"c": np.zeros((2, 3)), "f": np.zeros((2, 3), order="F"), "vector": np.zeros(3), "number": np.array(4)}
    write_archive(tmp_path / f"save{suffix}", {}, arrays)
    _, found = read_archive(tmp_path / f"save{suffix}")
    assert all(
        found[name].strides == array.strides and found[name].ndim == array.ndim for name, array in arrays.items()
    )


def test_data_that_a_transform_makes_others_are_others(tmp_path: Path) -> None:
    path, half = tmp_path / "save.npz", np.float32(0.5)
    training = TRAININGS["adam"].changed(transform=lambda rows: rows * half)
    whole = training.run().state()
    training.broken(path, 8)
    with pytest.raises(ValueError, match=r"training data\.x is"):
        TRAININGS["adam"].resumed(path)
    assert training.resumed(path).state() == whole


def test_a_save_loads_as_a_model(tmp_path: Path) -> None:
    for suffix in (".npz", ".safetensors"):
        path = tmp_path / f"save{suffix}"
        result = TRAININGS["adam"].run(saver=Saver(path))
        assert np.array_equal(npnet.load(path).eval().predict(X), result.model.eval().predict(X))


# Negative controls: each part of a save that is not put back is missed.

load = run.TrainingRun.load


def load_without_the_order(self: run.TrainingRun, *said: Any) -> None:
    before = self.generator.bit_generator.state
    load(self, *said)
    self.generator.bit_generator.state = before


def load_without_the_position(self: run.TrainingRun, *said: Any) -> None:
    load(self, *said)
    self.losses = []


@pytest.mark.parametrize(
    ("name", "place", "lost"),
    [
        ("adam", (optimizers.Optimizer, "load_state_dict"), lambda *_: None),
        ("momentum, decay", (optimizers.Optimizer, "load_state_dict"), lambda *_: None),
        ("adam", (run, "set_next_step"), lambda _: None),  # of dropout
        ("adam", (run.TrainingRun, "load"), load_without_the_order),
        ("adam", (run, "put"), lambda *_: None),
        ("scaler, mixed precision", (npnet.GradScaler, "load_state_dict"), lambda *_: None),
        ("adam", (run.TrainingRun, "load"), load_without_the_position),
    ],
)
def test_what_is_not_put_back_is_noticed(
    name: str, place: tuple[Any, str], lost: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TRAININGS[name].run().state()
    TRAININGS[name].broken(tmp_path / "save.npz", 8, every=1)
    monkeypatch.setattr(*place, lost)
    assert TRAININGS[name].resumed(tmp_path / "save.npz").state() != whole
