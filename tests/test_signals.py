"""Ctrl-C and SIGTERM: the step under way is done, what it gave is saved, and going on gives the same run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import Saver
from npnet.interrupts import Interrupts
from tests.small_training import TRAININGS, Training, small_model
from tests.test_cli_train import small as small

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
ROOT = Path(__file__).parents[1]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(autouse=True)
def _usual_handlers() -> Any:
    """As in a terminal, wherever the tests run; afterwards as they were."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    assert {number: signal.getsignal(number) for number in usual} == usual, "fit leaves the handlers as it found them"
    for number, handler in before.items():
        signal.signal(number, handler)


def signalling(at: int, *numbers: int) -> tuple[type[npnet.Dense], list[str]]:
    """A layer in whose forward pass, in the given step, signals come in; and what became of the step."""
    said: list[str] = []

    class Layer(npnet.Dense):
        def backward_(self, *given: Any) -> Any:
            said.append("begun")
            if said.count("begun") == at:
                for number in numbers:
                    os.kill(os.getpid(), number)
                    time.sleep(0.001)  # for Python to see it
            said.append("done")
            return super().backward_(*given)

    Layer.__name__, Layer.__module__ = "Dense", npnet.Dense.__module__  # by which a save calls it
    return Layer, said


def with_layer(kind: type[npnet.Dense]) -> Training:
    def model(seed: int) -> npnet.Sequential:
        return npnet.Sequential(*small_model(seed).layers[:-1], kind(8, 3, "identity", rng=seed + 2))

    return Training(model=model)


# Sent to oneself, in the middle of the backward pass of step 8; the first pass is the rehearsal.


@pytest.mark.parametrize("number", CODES)
def test_the_step_under_way_is_done_and_saved(number: signal.Signals, tmp_path: Path) -> None:
    whole = TRAININGS["adam"].run().state()
    kind, said = signalling(9, number)
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with pytest.raises(expected) as error:
        with_layer(kind).run(saver=Saver(tmp_path / "save.npz", 100))
    assert getattr(error.value, "code", 130) == CODES[number]
    assert (said.count("begun"), said.count("done")) == (9, 9)
    saver = Saver(tmp_path / "save.npz", resume=True)
    assert TRAININGS["adam"].run(3, saver=saver).state() == whole
    assert npnet.load(tmp_path / "save.npz").layers[0].in_features == 5


def test_where_it_was(tmp_path: Path) -> None:
    """A save of eight steps exactly."""
    kind, _ = signalling(9, signal.SIGINT)
    saver = Saver(tmp_path / "save.npz", 100)
    with pytest.raises(KeyboardInterrupt):
        with_layer(kind).run(saver=saver)
    assert saver.last.endswith("save.npz: 1 epochs and 2 steps")


@pytest.mark.parametrize("second", CODES)
@pytest.mark.parametrize("first", CODES)
def test_a_second_signal_ends_at_once(first: int, second: int, tmp_path: Path) -> None:
    kind, said = signalling(9, first, second)
    with pytest.raises(KeyboardInterrupt if second == signal.SIGINT else SystemExit):
        with_layer(kind).run(saver=Saver(tmp_path / "save.npz", 5))
    assert (said.count("begun"), said.count("done")) == (9, 8)
    whole = TRAININGS["adam"].run().state()  # from the save after step 5
    assert TRAININGS["adam"].resumed(tmp_path / "save.npz").state() == whole


def test_without_the_noting_the_step_is_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(Interrupts, "__enter__", lambda self: self)
    kind, said = signalling(9, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with_layer(kind).run(saver=Saver(tmp_path / "save.npz", 100))
    assert said.count("done") == 8
    assert not (tmp_path / "save.npz").exists()


def test_a_signal_in_the_very_last_step_and_in_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TRAININGS["adam"].run().state()
    kind, _ = signalling(19, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with_layer(kind).run(saver=Saver(tmp_path / "last.npz", 100))
    assert TRAININGS["adam"].resumed(tmp_path / "last.npz").state() == whole
    accuracy = npnet.losses.accuracy
    for epoch in (1, 3):
        calls: list[None] = []

        def interrupted(*given: Any, calls: list[None] = calls, epoch: int = epoch) -> float:
            calls.append(None)
            if len(calls) == epoch:
                os.kill(os.getpid(), signal.SIGINT)
            return accuracy(*given)

        monkeypatch.setattr("npnet.training.accuracy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            TRAININGS["adam"].run(saver=Saver(tmp_path / f"{epoch}.npz", 100))
        monkeypatch.setattr("npnet.training.accuracy", accuracy)
        assert TRAININGS["adam"].resumed(tmp_path / f"{epoch}.npz").state() == whole


def test_without_a_saver_the_step_is_done_all_the_same(tmp_path: Path) -> None:
    kind, said = signalling(9, signal.SIGTERM)
    training, made = with_layer(kind), []
    model = training.model
    training.model = lambda seed: made.append(model(seed)) or made[-1]
    with pytest.raises(SystemExit):
        training.run()
    assert said.count("done") == 9
    said.clear()
    with pytest.raises(SystemExit):
        training.run(saver=Saver(tmp_path / "save.npz"))
    saved, left = npnet.load(tmp_path / "save.npz").state_dict(), made[0].state_dict()
    assert all(np.array_equal(saved[name], left[name]) for name in saved)


# Who else answers signals.


def test_in_a_thread_signals_are_left_alone() -> None:
    seen: list[Any] = []

    class Looking(npnet.Dense):
        def backward_(self, *given: Any) -> Any:
            seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))
            return super().backward_(*given)

    thread = threading.Thread(target=with_layer(Looking).run)
    thread.start()
    thread.join()
    assert set(seen) == {(signal.default_int_handler, signal.SIG_DFL)}
    seen.clear()
    with_layer(Looking).run()
    assert len({handler for pair in seen for handler in pair}) == 1
    assert signal.default_int_handler not in seen[0]


def test_a_handler_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    came: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        kind, said = signalling(9, signal.SIGTERM, signal.SIGINT)
        own = signal.getsignal(signal.SIGTERM)
        result = with_layer(kind).run(saver=Saver(tmp_path / "save.npz"))
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == (own, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert came == [signal.SIGTERM]
    assert (said.count("done"), len(result.history.epochs)) == (19, 3)


# Sent to npnet train.

COMMAND = (
    "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('npnet', run_name='__main__', alter_sys=True)"
)


def npnet_train(small: Path, out: Path, *options: str) -> "subprocess.Popen[str]":
    arguments = ["--data", str(small), "--arch", "784,16x4,10", "--batch-size", "20", "--epochs", "12", "--quiet"]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "train", *arguments, "--out", str(out), "--save-every", "7", *options],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def results(folder: Path) -> tuple[dict[str, np.ndarray], list[tuple[float, float]]]:
    """The weights, and each epoch's loss and accuracy."""
    epochs = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["epochs"]
    return npnet.load(folder / "save.npz").state_dict(), [(epoch["loss"], epoch["accuracy"]) for epoch in epochs]


@pytest.fixture(scope="module")
def undisturbed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a training gives that nobody interrupts."""
    out = tmp_path_factory.mktemp("undisturbed")
    process = npnet_train(small, out)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    return results(out)


@pytest.mark.parametrize("number", CODES)
def test_npnet_train_is_interrupted_and_resumed(
    number: signal.Signals, small: Path, undisturbed: Any, tmp_path: Path
) -> None:
    process = npnet_train(small, tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "save.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == CODES[number], said
    assert f"the last good save is {tmp_path / 'save.npz'}: " in said
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["outcome"] == "interrupted"
    process = npnet_train(small, tmp_path, "--resume")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    weights, epochs = results(tmp_path)
    assert all(np.array_equal(weights[name], undisturbed[0][name]) for name in undisturbed[0])
    assert epochs == undisturbed[1]
    assert len(epochs) == 12
