"""npnet train --resume: it goes on as it was told to; what is saved is not overwritten; the model is written."""

import json
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import cli, mnist
from npnet.archive import read_archive, write_archive
from npnet.settings import FREE, MODERN, Settings
from tests.test_cli_train import _no_picture as _no_picture
from tests.test_cli_train import numbers, train
from tests.test_cli_train import small as small

pytestmark = pytest.mark.usefixtures("_no_picture")


def resumed(small: Path, out: Path, *options: Any, expected: int = 0) -> dict[str, Any]:
    """What ``npnet train --resume`` without another setting writes to metrics.json."""
    arguments = ["train", "--data", small, "--quiet", "--resume", "--out", out, *options]
    assert cli.main([str(each) for each in arguments]) == expected
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def broken(small: Path, out: Path, *options: Any) -> dict[str, Any]:
    """One that is ended by Ctrl-C in its second epoch, after the step under way."""
    step_done, before = npnet.Saver.step_done, signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(saver: npnet.Saver, run: Any, ending: bool = False) -> None:
        step_done(saver, run, ending)
        if (run.epoch, len(run.losses)) == (1, 3):
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(npnet.Saver, "step_done", interrupted)
            return train(small, "--save-every", 2, *options, out=out, expected=130)
    finally:
        signal.signal(signal.SIGINT, before)


# As it was told to.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--checkpoint-every", 4], {"checkpoint_every": 4}),
        (["--checkpoint-every", "revolve"], {"checkpoint_every": "revolve"}),
        (["--memory-budget", "240 kB", "--no-measure"], {"memory_budget": 240_000, "measure": False}),
        (["--offload", "disk", "--memory-budget", "300 kB"], {"memory_budget": 300_000, "offload": "disk"}),
        (["--capture", "--stop-on-save-error"], {"capture": True, "stop_on_save_error": True}),
        (["--backend", "numpy"], {"backend": "numpy"}),
    ],
)
def test_a_resumed_training_goes_on_as_it_was_told_to(
    options: list[Any], said: dict[str, Any], small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = broken(small, tmp_path / "broken", *options)
    title = capsys.readouterr().out.splitlines()[1]
    assert "checkpoints: " in title
    metrics = resumed(small, tmp_path / "broken")
    assert capsys.readouterr().out.splitlines()[1] == title
    assert metrics["settings"] == first["settings"]
    assert metrics["settings"].items() >= {**said, "save_every": 2}.items()
    assert [cost["checkpoints"] for cost in metrics["costs"]] == [cost["checkpoints"] for cost in first["costs"]]
    assert numbers(metrics) == numbers(train(small, "--no-measure", out=tmp_path / "whole"))


def test_another_schedule_may_be_given(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken(small, tmp_path / "a", "--memory-budget", "240 kB")
    metrics = resumed(small, tmp_path / "a", "--checkpoint-every", 2)
    assert metrics["settings"]["memory_budget"] is None
    assert "checkpoints: every 2\n" in capsys.readouterr().out
    broken(small, tmp_path / "b", "--checkpoint-every", 2, "--capture")
    metrics = resumed(small, tmp_path / "b", "--memory-budget", "240 kB", "--no-capture")
    assert (metrics["settings"]["memory_budget"], metrics["settings"]["capture"]) == (240_000, False)
    assert "budget 240 kB" in capsys.readouterr().out
    broken(small, tmp_path / "c", "--offload", "disk")
    assert resumed(small, tmp_path / "c", "--checkpoint-every", 2)["settings"]["offload"] is None
    assert "checkpoints: every 2\n" in capsys.readouterr().out


def test_every_setting_is_kept_or_free(small: Path, tmp_path: Path) -> None:
    """A setting that is not free is refused when it is given otherwise."""
    assert set(FREE) < {field.name for field in fields(Settings)}
    broken(small, tmp_path)
    for option in (["--seed", 3], ["--batch-size", 50], ["--classic"], ["--samples", 300], ["--optimizer", "sgd"]):
        resumed(small, tmp_path, *option, expected=2)


def test_a_save_that_says_nothing_of_a_schedule_gets_the_default(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As npnet wrote them before; so it would be if a save forgot its schedule: the tests above can fail."""
    broken(small, tmp_path, "--checkpoint-every", 2)
    description, arrays = read_archive(tmp_path / "save.npz")
    for name in FREE:
        del description["about"]["settings"][name]
    write_archive(tmp_path / "save.npz", description, arrays)
    capsys.readouterr()
    resumed(small, tmp_path)
    assert "checkpoints: every 3\n" in capsys.readouterr().out


def test_epochs_may_be_added_where_the_learning_rate_does_not_fall(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(small, tmp_path / "falls")
    capsys.readouterr()
    resumed(small, tmp_path / "falls", "--epochs", 3, expected=2)
    assert capsys.readouterr().err == (
        f"npnet train: error: --resume: {tmp_path / 'falls' / 'save.npz'} was saved with epochs 2, over which the "
        "learning rate falls to zero, not 3; leave the option out, or train anew in another --out\n"
    )
    broken(small, tmp_path / "stays", "--decay", "none")
    assert len(resumed(small, tmp_path / "stays", "--epochs", 3)["epochs"]) == 3


# What is there is not lost.


@pytest.mark.parametrize("options", [[], ["--save-every", 2]])
def test_the_folder_of_another_training_is_refused(
    options: list[Any], small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(small, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    train(small, *options, out=tmp_path, expected=2)
    assert capsys.readouterr().err == (
        f"npnet train: error: {tmp_path / 'save.npz'} is the save of a training: go on with it (--resume), or train in "
        "another --out\n"
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "options",
    [["--seed", 3], ["--checkpoint-every", 2], ["--offload", "disk"], ["--epochs", 1, "--save-every", 2, "--resume"]],
)
def test_the_report_of_another_training_is_not_written_over(
    options: list[Any], small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(small, out=tmp_path)
    for again in ([], ["--no-measure", "--save-every", 2, "--resume"]):  # the same numbers
        assert numbers(train(small, *again, out=tmp_path)) == numbers(first)
    (tmp_path / "save.npz").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    train(small, *options, out=tmp_path, expected=2)
    name = options[0][2:].replace("-", " ")
    was = {"seed": 0, "checkpoint every": "sqrt", "offload": None, "epochs": 2}[name]
    assert capsys.readouterr().err == (
        f"npnet train: error: {tmp_path / 'metrics.json'} is the report of another training, with {name} {was}, not "
        f"{options[1]}: take another --out\n"
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", ["[]", "{}", '"my notes"', '{"settings": 3}'])
def test_a_file_of_that_name_is_not_written_over(
    content: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.json").write_text(content)
    train(small, out=tmp_path, expected=2)
    assert "metrics.json is no report of npnet train: take another --out\n" in capsys.readouterr().err
    assert (tmp_path / "metrics.json").read_text() == content
    (tmp_path / "metrics.json").write_text("not JSON")
    with pytest.raises(ValueError, match="is no report of npnet train"):
        MODERN.check_report(tmp_path / "metrics.json")


def test_nothing_is_measured_where_nothing_is_left_to_do(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = train(small, "--save-every", 2, out=tmp_path)
    model = (tmp_path / "model.npz").read_bytes()
    (tmp_path / "model.npz").unlink()
    monkeypatch.setattr(mnist, "step_costs", lambda *_, **__: pytest.fail("measured"))
    assert resumed(small, tmp_path) == metrics  # with the costs that were measured
    out = capsys.readouterr().out
    assert "nothing is left to do: 2 of 2 epochs are done\n" in out
    assert f"test accuracy {100 * metrics['test_accuracy']:.2f} %" in out
    assert (tmp_path / "model.npz").read_bytes() == model
    (tmp_path / "metrics.json").unlink()  # as after kill -9 before it was written
    again = resumed(small, tmp_path)
    assert numbers(again) == numbers(metrics)
    assert again["costs"] == []
    with pytest.raises(pytest.fail.Exception):  # negative control: where something is left
        broken(small, tmp_path / "broken")


@pytest.mark.parametrize("damage", ["not a save", "truncated", "contradicts itself"])
def test_a_damaged_save_comes_with_advice(
    damage: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(small, tmp_path)
    save = tmp_path / "save.npz"
    description, arrays = read_archive(save)
    if damage == "not a save":
        save.write_text("my weights")
    elif damage == "truncated":
        save.write_bytes(save.read_bytes()[:-100])
    else:
        arrays.pop("0.weight")
        write_archive(save, description, arrays)
    capsys.readouterr()
    resumed(small, tmp_path, expected=1)
    err = capsys.readouterr().err
    assert err.startswith(f"npnet train: {save}: ")
    assert err.endswith("; to begin anew, name another --out\n")


# The model.


def test_the_model_is_written(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = train(small, "--checkpoint-every", 2, out=tmp_path)
    assert metrics["model"] == "model.npz"
    file = tmp_path / "model.npz"
    assert f"the model is in {file}: npnet.load({str(file)!r})\n" in capsys.readouterr().out
    images, labels = npnet.load_mnist(small)[1]
    right = (npnet.load(file).predict(images.astype("f4")).argmax(1) == labels.argmax(1)).mean()
    assert right == pytest.approx(metrics["test_accuracy"])


def test_the_model_is_that_of_the_save(small: Path, tmp_path: Path) -> None:
    broken(small, tmp_path)
    for _ in range(2):  # broken off, and finished
        models = [npnet.load(tmp_path / name).state_dict() for name in ("save.npz", "model.npz")]
        assert all(np.array_equal(models[0][name], models[1][name]) for name in models[0])
        resumed(small, tmp_path)


# Measuring.


def test_without_measuring(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = train(small, "--no-measure", out=tmp_path)
    assert (metrics["costs"], metrics["rounds"]) == ([], 0)
    assert "A training step" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "plan"])
def test_measuring_is_shown_ends_in_time_and_says_how_often(
    command: str, small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--arch", "784,16x6,10", "--batch-size", "100", *(["--measure"] if command == "plan" else [])]
    options += ["--data", str(small), "--epochs", "1"] if command == "train" else []
    for seconds, rounds in ((20.0, 60 if command == "train" else 20), (0.0, 1)):
        monkeypatch.setattr(mnist, "MEASURING", seconds)
        monkeypatch.setattr("npnet.plan_report.MEASURING", seconds)
        assert cli.main([command, *options]) == 0
        out, err = capsys.readouterr()
        assert f"rounds: {rounds}\n" in out
        assert "measuring steps" in err
    assert cli.main([command, *options, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize(("n", "kept"), [(6, False), (7, True), (30, True), (1, False), ("sqrt", False)])
def test_an_interval_beyond_the_depth_is_remarked_on(
    command: str, n: Any, kept: bool, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(small), "--epochs", "1", "--no-measure"] if command == "train" else []
    arch = ["--arch", "784,16x6,10", "--batch-size", "100"]
    assert cli.main([command, "--quiet", *arch, *options, "--checkpoint-every", str(n)]) == 0
    remark = f"a checkpoint every {n} layers: the network has 7, so there is none, and everything is kept\n"
    assert (remark in capsys.readouterr().out) == kept
