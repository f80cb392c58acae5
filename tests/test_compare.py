"""npnet compare: the exercise's three tables, with the right networks in them, and files that say what was printed."""

import contextlib
import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

import npnet
from npnet import cli, compare
from npnet.report import Table
from tests.small_mnist import first_digits, write

NAMES = ["accuracy", "time", "memory"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small MNIST file."""
    return write(tmp_path_factory.mktemp("small"), first_digits(2000, 300)).parent


@dataclass
class Run:
    """What one run of the command printed and wrote, and what it did to NumPy's global random numbers."""

    code: int
    out: str
    folder: Path
    left_random_alone: bool

    @property
    def tables(self) -> dict[str, list[dict[str, Any]]]:
        tables: dict[str, list[dict[str, Any]]] = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        return tables


def run_compare(small: Path, folder: Path, *options: str) -> Run:
    before = repr(np.random.get_state())
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main(["compare", "--quick", "--data", str(small), "--out", str(folder), *options])
    return Run(code, out.getvalue(), folder, repr(np.random.get_state()) == before)


@pytest.fixture(scope="module")
def run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    np.random.seed(12345)
    return run_compare(small, tmp_path_factory.mktemp("report"), "--seed", "4")


def test_it_ends_well(run: Run) -> None:
    assert run.code == 0
    assert run.out.startswith("loading MNIST\n")
    assert run.out.endswith(f"results in {run.folder}\n")
    assert list(run.tables) == NAMES


def test_accuracies_are_equal_in_every_epoch(run: Run, small: Path) -> None:
    rows = run.tables["accuracy"]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4]
    train, test = npnet.load_mnist(small)
    np.random.seed(4)
    network = npnet.Network([784, 30, 30, 30, 30, 10])
    for row in rows:
        network.SGD(train, 1, 100, 3.0, log=False)
        assert list(row) == ["epoch", "plain", "every 1", "every 2", "every 4", "equal"]
        assert {row[name] for name in ("plain", "every 1", "every 2", "every 4")} == {network.evaluate(test)}
        assert row["equal"] is True
    assert "784,30x4,10, seed 4" in run.out


def test_times_are_of_the_exercises_three_networks(run: Run) -> None:
    networks = {
        "784,100,10": {"plain": 0, "every 1": 0, "every 2": 0, "every 4": 0},
        "784,30x6,10": {"plain": 0, "every 1": 0, "every 2": 3, "every 4": 3},
        "784,30x50,10": {"plain": 0, "every 1": 0, "every 2": 25, "every 4": 36, "every 7": 42, "every 10": 45},
    }
    found: dict[str, dict[str, int]] = {}
    for row in run.tables["time"]:
        found.setdefault(row["network"], {})[row["checkpoints"]] = row["extra forwards"]
        assert row["ms a step"] > 0
        assert 0.2 < row["ratio"] < 5
        assert row["checkpoints"] != "plain" or row["ratio"] == 1
    assert found == networks


def test_memory_is_of_the_exercises_two_networks(run: Run) -> None:
    found: dict[str, dict[str, int]] = {}
    for row in run.tables["memory"]:
        found.setdefault(row["network"], {})[row["checkpoints"]] = row["peak bytes"]
        plain = found[row["network"]]["plain"]
        assert row["saved bytes"] == plain - row["peak bytes"]
        assert row["ratio"] == round(row["peak bytes"] / plain, 3)
    assert list(found) == ["784,30x5,10", "784,30x50,10"]
    assert {"plain", "every 2", "every 4", "every 10"} <= set(found["784,30x5,10"]) & set(found["784,30x50,10"])
    deep = found["784,30x50,10"]
    assert deep["every 2"] < 0.8 * deep["plain"]
    assert deep["every 10"] < 0.7 * deep["plain"]
    parameters = 8 * sum(n * m + m for n, m in zip(compare.LONG[:-1], compare.LONG[1:], strict=True))
    activations = 8 * 100 * sum(compare.LONG[1:])
    assert parameters + activations < deep["plain"] < 1.3 * (parameters + activations)


def test_text_json_csv_and_pictures_agree(run: Run) -> None:
    text = (run.folder / "report.txt").read_text(encoding="utf-8")
    assert text.strip() in run.out.replace("\n\n\n", "\n\n")
    printed = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    for name, rows in run.tables.items():
        assert list(rows[0]) in printed
        for row in rows:
            cells = ["yes" if v is True else f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()]
            assert cells in printed
        with (run.folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            assert list(csv.DictReader(file)) == [{key: str(value) for key, value in row.items()} for row in rows]
        picture = matplotlib.image.imread(run.folder / f"{name}.png")
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 0.05  # something is drawn
    assert {path.name for path in run.folder.iterdir()} == {
        "report.txt",
        "report.json",
        *(f"{name}.{kind}" for name in NAMES for kind in ("csv", "png")),
    }


def test_numpys_global_random_numbers_are_left_alone(run: Run) -> None:
    assert run.left_random_alone


def few(small: Path) -> tuple[Any, Any]:
    """Data for a training of a moment."""
    (x, y), (x_test, y_test) = npnet.load_mnist(small)
    return (x[:300], y[:300]), (x_test, y_test)


def test_a_network_that_differs_is_found(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mistaken(npnet.NetworkWithCheckpointing):
        """Says another accuracy where it checkpoints every second layer."""

        def evaluate(self, test_data: Any) -> float:
            return super().evaluate(test_data) + (0.01 if self.checkpoint_every_nth_layer == 2 else 0)

    monkeypatch.setattr(compare, "NetworkWithCheckpointing", Mistaken)
    rows = list(compare.accuracy_rows(*few(small), 2, 0))
    assert [row["equal"] for row in rows] == [False, False]
    printed = str(Table("accuracy", "title", rows))
    assert [line.split()[-1] for line in printed.splitlines()[2:]] == ["equal", "NO", "NO"]


def test_a_gradient_that_differs_is_found(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mistaken(npnet.NetworkWithCheckpointing):
        """Restores its activations wrongly."""

        def forward_between_checkpoints(self, *arguments: Any) -> Any:
            first, *others = super().forward_between_checkpoints(*arguments)
            return [first, *(0.9 * activation for activation in others)]

    monkeypatch.setattr(compare, "NetworkWithCheckpointing", Mistaken)
    monkeypatch.setattr(compare, "BATCH", 10)
    *_, row = compare.accuracy_rows(*few(small), 3, 0)
    assert row["plain"] == row["every 1"] != row["every 2"]
    assert row["equal"] is False


@pytest.mark.parametrize(("stop", "rows"), [("time", {"accuracy": 5}), ("time row", {"accuracy": 5, "time": 4})])
def test_ctrl_c_loses_nothing_that_was_measured(
    stop: str, rows: dict[str, int], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compare.time_rows

    def interrupted(*arguments: Any) -> Any:
        if stop == "time row":
            measured = real(*arguments)
            yield from (next(measured) for _ in range(4))
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "time_rows", interrupted)
    run = run_compare(small, tmp_path)
    assert run.code == 130
    assert {name: len(table) for name, table in run.tables.items()} == rows
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.txt",
        "report.json",
        *(f"{name}.{kind}" for name in rows for kind in ("csv", "png")),
    }
    assert "Accuracy after each epoch" in (tmp_path / "report.txt").read_text(encoding="utf-8")
    assert run.left_random_alone


def test_ctrl_c_before_anything_was_measured_writes_nothing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(compare, "accuracy_rows", interrupt)
    assert run_compare(small, tmp_path).code == 130
    assert not list(tmp_path.iterdir())
