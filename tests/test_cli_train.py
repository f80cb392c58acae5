"""npnet train: what it prints is what it writes, and checkpoints change no number."""

import csv
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.image
import numpy as np
import pytest

import npnet
from npnet import cli, mnist
from npnet.options import build_parser
from npnet.settings import CLASSIC, MODERN
from tests.small_mnist import first_digits, write

SAMPLES, TEST_SAMPLES = 650, 200
OPTIONS = ["--quiet", "--arch", "784,16x6,10", "--epochs", "2", "--batch-size", "100"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small MNIST file."""
    return write(tmp_path_factory.mktemp("small"), first_digits(SAMPLES, TEST_SAMPLES)).parent


@pytest.fixture
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these trainings."""
    monkeypatch.setattr(mnist, "save_figure", lambda *_: None)


def train(small: Path, *options: Any, out: Path | None = None, expected: int = 0) -> dict[str, Any]:
    """What npnet train, run in this process, writes to metrics.json."""
    arguments = ["train", "--data", str(small), *OPTIONS, *map(str, options)]
    assert cli.main(arguments + (["--out", str(out)] if out else [])) == expected
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text(encoding="utf-8")) if out else {}
    return metrics


def numbers(metrics: dict[str, Any]) -> list[Any]:
    """What must not depend on the machine."""
    return [(epoch["epoch"], epoch["steps"], epoch["loss"], epoch["accuracy"]) for epoch in metrics["epochs"]]


# What it prints and writes.


def test_printed_and_written_results_agree(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = train(small, "--checkpoint-every", 3, "--seed", 5, out=tmp_path / "new" / "folder")
    out, err = capsys.readouterr()
    assert err == ""
    title = "784,16x6,10 relu, softmax_cross_entropy, adam 0.001, batch 100, float32, checkpoints: every 3"
    assert out.startswith(f"loading MNIST\n{title}\n")
    accuracy, seconds = metrics["test_accuracy"], metrics["seconds"]
    assert f"test accuracy {100 * accuracy:.2f} %, {seconds:.1f} s in training steps (finished)" in out
    assert out.endswith(f"results in {tmp_path / 'new' / 'folder'}\n")

    plain, checkpointed = metrics["costs"]
    assert (plain["checkpoints"], checkpointed["checkpoints"]) == ("plain", "every 3")
    assert (plain["extra forwards"], checkpointed["extra forwards"]) == (0, 4)
    assert (plain["time ratio"], plain["memory ratio"]) == (1, 1)
    assert checkpointed["memory ratio"] == round(checkpointed["peak bytes"] / plain["peak bytes"], 3)
    lines = [re.split("  +", line.strip()) for line in out.splitlines()]
    for cost in (plain, checkpointed):
        assert [f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cost.values()] in lines

    assert metrics["outcome"] == "finished"
    assert [(epoch["epoch"], epoch["steps"]) for epoch in metrics["epochs"]] == [(1, 7), (2, 7)]
    assert accuracy == metrics["epochs"][-1]["accuracy"]
    assert seconds == pytest.approx(sum(epoch["seconds"] for epoch in metrics["epochs"]))
    assert metrics["versions"]["npnet"] == npnet.__version__
    with (tmp_path / "new" / "folder" / "metrics.csv").open(newline="") as file:
        rows = [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    assert rows == metrics["epochs"]
    picture = matplotlib.image.imread(tmp_path / "new" / "folder" / "training.png")
    assert min(picture.shape[:2]) > 300
    assert picture.std() > 0.05  # something is drawn


def test_without_out_nothing_is_written(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(small)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_no_picture")
def test_options_reach_the_training(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = "--activation tanh --loss mean_squared_error --optimizer momentum --eta 0.25 --decay none --dtype float64 "
    metrics = train(small, *f"{given} --seed 7 --samples 300 --checkpoint-every 0".split(), out=tmp_path)
    assert metrics["settings"] == {
        "arch": [784, *[16] * 6, 10],
        "activation": "tanh",
        "loss": "mean_squared_error",
        "optimizer": "momentum",
        "learning_rate": 0.25,
        "decay": "none",
        "batch_size": 100,
        "epochs": 2,
        "dtype": "float64",
        "exercise": False,
        "seed": 7,
        "samples": 300,
        "backend": "numpy",
        "checkpoint_every": 0,
        "memory_budget": None,
        "offload": None,
        "capture": False,
        "measure": True,
        "save_every": None,
        "stop_on_save_error": False,
    }
    assert [epoch["steps"] for epoch in metrics["epochs"]] == [3, 3]
    assert len(metrics["costs"]) == 1  # plain is what there is to compare with plain
    assert "momentum 0.25, batch 100, float64, checkpoints: plain" in capsys.readouterr().out


def test_progress_is_on_the_error_stream(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [argument for argument in OPTIONS if argument != "--quiet"]
    assert cli.main(["train", "--data", str(small), *arguments]) == 0
    out, err = capsys.readouterr()
    shown = re.search(r"epoch 2: 100%.*loss=[\d.]+, test accuracy=([\d.]+), peak memory=[\d.]+ [kM]B", err)
    assert shown is not None
    assert f"test accuracy {100 * float(shown[1]):.2f} %" in out


# What it comes to.


@pytest.mark.usefixtures("_no_picture")
def test_checkpoints_change_no_number(small: Path, tmp_path: Path) -> None:
    runs = {n: train(small, "--checkpoint-every", n, out=tmp_path / f"{n}") for n in ("0", "1", "2", "5", "sqrt")}
    names = [metrics["costs"][-1]["checkpoints"] for metrics in runs.values()]
    assert names == ["plain", "plain", "every 2", "every 5", "every 3"]
    assert all(numbers(metrics) == numbers(runs["0"]) for metrics in runs.values())
    assert numbers(train(small, "--seed", 1, out=tmp_path / "seed")) != numbers(runs["0"])
    assert numbers(train(small, "--dtype", "float64", out=tmp_path / "double")) != numbers(runs["0"])


def exercise(source: ModuleType, small: Path, n: int, seed: int, capsys: pytest.CaptureFixture[str]) -> list[float]:
    """The accuracies that the lab exercise prints."""
    train_data, test_data = npnet.load_mnist(small)
    np.random.seed(seed)
    network = source.NetworkWithCheckpointing([784, 30, 30, 30, 10], n)
    capsys.readouterr()
    network.SGD(train_data, 3, 10, 3.0, test_data=test_data)
    return [float(accuracy) for accuracy in re.findall(r"Accuracy: ([\d.]+)", capsys.readouterr().out)]


@pytest.mark.usefixtures("_no_picture")
@pytest.mark.parametrize("source", ["npnet", "classic"])
@pytest.mark.parametrize(("seed", "n"), [(0, 0), (3, 3)])
def test_classic_is_the_lab_exercise(
    source: str, seed: int, n: int, small: Path, tmp_path: Path, request: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--arch", "784,30x3,10", "--batch-size", 10, "--epochs", 3, "--seed", seed, "--checkpoint-every", n]
    metrics = train(small, "--classic", *options, out=tmp_path)
    accuracies = [epoch["accuracy"] for epoch in metrics["epochs"]]
    assert len(set(accuracies)) > 1
    module = npnet if source == "npnet" else request.getfixturevalue("classic")
    assert accuracies == exercise(module, small, n, seed, capsys)


@pytest.mark.usefixtures("_no_picture")
def test_an_option_of_zero_is_an_option(small: Path, tmp_path: Path) -> None:
    metrics = train(small, "--learning-rate", 0, out=tmp_path)
    assert metrics["settings"]["learning_rate"] == 0
    assert metrics["epochs"][0]["accuracy"] == metrics["epochs"][1]["accuracy"]


@pytest.mark.usefixtures("_no_picture")
def test_classic_takes_whole_batches_only_in_order(small: Path, tmp_path: Path) -> None:
    metrics = train(small, "--classic", out=tmp_path)
    assert [epoch["steps"] for epoch in metrics["epochs"]] == [6, 6]  # 650 samples
    assert metrics["settings"]["exercise"]
    assert metrics["settings"]["dtype"] == "float64"


def test_the_defaults_are_deep_modern_and_checkpointed() -> None:
    settings = cli.settings_of(build_parser().parse_args(["train"]))
    assert settings == MODERN
    assert npnet.plan(npnet.mlp(settings.arch), 1, **settings.strategy).schedule.name == "every 5"
    assert len(MODERN.arch) == 22
    assert (MODERN.activation, MODERN.optimizer, MODERN.dtype) == ("relu", "adam", "float32")
    assert (CLASSIC.activation, CLASSIC.loss, CLASSIC.learning_rate) == ("sigmoid", "quadratic", 3.0)
