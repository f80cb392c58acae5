"""npnet train, broken off by Ctrl-C or because it diverges: what was measured until then is printed and written."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npnet import mnist
from npnet.training import fit
from tests.test_cli_train import small as small
from tests.test_cli_train import train


class Breaks:
    """`fit` with a loss that does something at its n-th step."""

    def __init__(self, at: int, what: Callable[[], Any]) -> None:
        self.at, self.what, self.steps = at, what, 0

    def __call__(self, *arguments: Any, loss: Any, **options: Any) -> Any:
        gradient_of = loss.value_and_gradient

        def value_and_gradient(output: Any, target: Any) -> Any:
            self.steps += 1
            value, gradient = gradient_of(output, target)
            return (self.what() if self.steps == self.at else value), gradient

        loss.value_and_gradient = value_and_gradient
        return fit(*arguments, loss=loss, **options)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("at", "steps"), [(1, []), (4, [3]), (8, [7]), (11, [7, 3])])
@pytest.mark.parametrize(
    ("what", "code", "outcome"),
    [(interrupt, 130, "interrupted"), (lambda: np.nan, 1, "diverged: epoch {}, step {} of 7")],
)
def test_what_was_measured_until_then_is_written(
    what: Callable[[], Any],
    code: int,
    outcome: str,
    at: int,
    steps: list[int],
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(mnist, "fit", Breaks(at, what))
    metrics = train(small, out=tmp_path, expected=code)
    assert metrics["outcome"].startswith(outcome.format((at - 1) // 7 + 1, (at - 1) % 7 + 1))
    assert [epoch["steps"] for epoch in metrics["epochs"]] == steps
    assert [epoch["accuracy"] is not None for epoch in metrics["epochs"]] == [count == 7 for count in steps]
    assert metrics["test_accuracy"] == (metrics["epochs"][0]["accuracy"] if 7 in steps else None)
    assert len(metrics["costs"]) == 2
    out, err = capsys.readouterr()
    assert "A training step, measured before the training" in out
    assert ("test accuracy" in out) == (7 in steps)
    if code == 130:
        assert err == "interrupted\n"
    else:
        assert err == f"npnet train: {metrics['outcome'].removeprefix('diverged: ')}\n"
    written = {path.name for path in tmp_path.iterdir()}
    model = "model.npz" if steps and code == 130 else None  # of a training that diverged there is none
    assert metrics["model"] == model
    assert written - {model} == {"metrics.json", *(["metrics.csv", "training.png"] if steps else [])}
    assert ("model.npz" in written) == (model is not None)
    if steps:
        with (tmp_path / "metrics.csv").open(newline="") as file:
            assert [int(row["steps"]) for row in csv.DictReader(file)] == steps


def test_without_a_folder_an_interrupted_training_says_that_it_is_lost(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mnist, "fit", Breaks(4, interrupt))
    train(small, expected=130)
    assert "the weights are lost; --out DIR keeps them, and with --save-every 100 " in capsys.readouterr().out
    monkeypatch.setattr(mnist, "fit", fit)
    train(small)
    assert "lost" not in capsys.readouterr().out


def test_weights_that_are_not_finite_are_not_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C after the step that made them, and before the loss that would show them."""

    def poisoned(model: Any, *arguments: Any, **options: Any) -> Any:
        def poison() -> None:
            model.parameters()[0].value[0, 0] = np.nan
            raise KeyboardInterrupt

        return Breaks(4, poison)(model, *arguments, **options)

    monkeypatch.setattr(mnist, "fit", poisoned)
    assert train(small, out=tmp_path, expected=130)["model"] is None
    assert "the model is lost: not saved: 0.weight holds infinities or NaN" in capsys.readouterr().out
    assert not (tmp_path / "model.npz").exists()


@pytest.mark.parametrize(
    "options", ["--optimizer sgd --eta 1e30", "--loss mean_squared_error --optimizer sgd --eta 100"]
)
def test_a_training_that_diverges_by_itself_says_where(
    options: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = train(small, *options.split(), "--activation", "identity", "--epochs", 9, out=tmp_path, expected=1)
    assert re.match(r"diverged: epoch \d, step \d of 7: ", metrics["outcome"])
    err = capsys.readouterr().err
    assert re.match(r"npnet train: epoch \d, step \d of 7: .*start again with a lower learning rate", err)
    assert err.count("\n") == 1  # and no warnings of NumPy's


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send")
def test_ctrl_c_in_a_process_writes_what_was_measured(small: Path, tmp_path: Path) -> None:
    """`python -m npnet train`, as typed; only that Ctrl-C works even where the tests run with SIGINT ignored."""
    code = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('npnet', run_name='__main__', alter_sys=True)"
    )
    options = ["--data", str(small), "--arch", "784,16x6,10", "--epochs", "1000000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", *options, "--batch-size", "100"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    third_epoch, said = threading.Event(), []

    def listen() -> None:
        for line in process.stderr:
            said.append(line)
            if "epoch 3:" in line:
                third_epoch.set()

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        assert third_epoch.wait(120), said
        process.send_signal(signal.SIGINT)
        out = process.stdout.read()  # until it ends
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        listener.join()
        process.stdout.close()
        process.stderr.close()
    assert said[-1].endswith("interrupted\n")
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["outcome"] == "interrupted"
    assert len(metrics["epochs"]) >= 2
    assert f"test accuracy {100 * metrics['test_accuracy']:.2f} %" in out
    assert "(interrupted)" in out
    assert {"metrics.csv", "training.png", "model.npz"} <= {path.name for path in tmp_path.iterdir()}
