"""``mpiexec -n 2 npnet train``: one voice, one set of files, one end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from npnet.archive import read_archive
from tests.small_mnist import first_digits, write
from tests.test_ranks import MPIEXEC, ended, pytestmark  # noqa: F401 - skipped where that is

ROOT = Path(__file__).parents[1]
OPTIONS = ["--quiet", "--arch", "784,16x6,10", "--dtype", "float64", "--epochs", "2", "--batch-size", "100"]
OPTIONS += ["--checkpoint-every", "3", "--samples", "601"]  # the last batch is one row: fewer than there are ranks


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small MNIST file."""
    return write(tmp_path_factory.mktemp("small"), first_digits(650, 200)).parent


def npnet(*groups: tuple[int, list[Any]]) -> tuple[int, str, str]:
    """``mpiexec -n ranks npnet arguments``, for one or more groups of ranks with arguments of their own."""
    return ended(begun(*groups), 60)


def begun(*groups: tuple[int, list[Any]]) -> subprocess.Popen[str]:
    """The same, under way."""
    command: list[str] = []
    for ranks, arguments in groups:
        command += [":"] * bool(command) + ["-n", str(ranks), sys.executable, "-m", "npnet", *map(str, arguments)]
    return subprocess.Popen(
        [str(MPIEXEC), *command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_rank_0_alone_speaks_and_writes_and_the_numbers_are_those_of_one_process(small: Path, tmp_path: Path) -> None:
    losses = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        code, printed, err = npnet((ranks, ["train", *OPTIONS, "--data", small, "--out", out, "--save-every", 5]))
        assert (code, err) == (0, "")
        assert printed.count("test accuracy") == 1
        assert (f"rank {ranks - 1} is process " in printed) == (ranks > 1)
        assert (" on 2 ranks, checkpoints: " in printed) == (ranks > 1)
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        assert metrics["ranks"] == ranks
        losses.append([epoch["loss"] for epoch in metrics["epochs"]])
        assert sorted(path.name for path in out.iterdir()) == [
            "metrics.csv",
            "metrics.json",
            "model.npz",
            "save.npz",
            "training.png",
        ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_training_goes_on_with_the_settings_of_its_save(small: Path, tmp_path: Path) -> None:
    first = ["train", *OPTIONS, "--data", small, "--out", tmp_path, "--save-every", 5]
    assert npnet((2, first))[0] == 0
    code, printed, err = npnet((3, ["train", "--quiet", "--data", small, "--out", tmp_path, "--resume"]))
    assert (code, err) == (0, "")
    assert "784,16x6,10 relu, softmax_cross_entropy, adam 0.001, batch 100, float64 on 3 ranks" in printed
    assert "float64 on 3 ranks, checkpoints: every 3\nnothing is left to do: 2 of 2 epochs are done\n" in printed
    code, _, err = npnet((3, ["train", "--quiet", "--data", small, "--out", tmp_path, "--resume", "--epochs", 9]))
    assert code == 2
    assert "was saved with epochs 2, over which the learning rate falls to zero, not 9; leave the option out" in err


def test_a_budget_is_each_ranks_own_and_that_of_the_save_is_kept(small: Path, tmp_path: Path) -> None:
    first = ["train", "--quiet", "--arch", "784,30x8,10", "--batch-size", 600, "--epochs", 2, "--data", small]
    first += ["--out", tmp_path, "--save-every", 5]
    budgets = [(1, [*first, "--memory-budget", size]) for size in ("760 kB", "780 kB")]
    assert npnet(*budgets)[::2] == (0, "")
    for options, said in (([], 760_000), (["--memory-budget", "790 kB"], 790_000)):
        code, printed, err = npnet((2, ["train", "--quiet", "--data", small, "--out", tmp_path, "--resume", *options]))
        assert (code, err) == (0, "")
        assert f"budget {said // 1000} kB" in printed
        assert read_archive(tmp_path / "save.npz")[0]["about"]["settings"]["memory_budget"] == 760_000  # still that one


def test_bad_arguments_are_refused_once(small: Path) -> None:
    code, _, err = npnet((3, ["train", "--epochs", 0]))
    assert code == 2
    assert err.count("npnet train: error: argument --epochs: epochs: expected a whole number, at least 1, got 0") == 1
    assert npnet((2, ["compare", "--quick"]))[2].endswith(
        "npnet: error: npnet compare runs in one process, without mpiexec; npnet train runs in many\n"
    )
    code, _, err = npnet((2, ["train", "--data", small / "nowhere"]))
    assert code == 1
    assert err.startswith("npnet train: no MNIST file at ")
    assert err.count("no MNIST file") == 1


def test_ranks_with_other_arguments_are_refused(small: Path) -> None:
    good = ["train", *OPTIONS, "--data", small]
    code, _, err = npnet((1, good), (1, [*good, "--seed", 3]))
    assert code == 2
    assert err == "npnet train: error: all ranks must train alike: seed is 'None' on rank 0, '3' on rank 1\n"
    code, _, err = npnet((1, good), (1, [*good, "--epochs", -1]))
    assert code != 0
    assert err == "npnet train: rank 1 of 2 failed: ValueError: its arguments are wrong\n"


def test_a_rank_that_is_killed_is_named_and_the_save_goes_on(small: Path, tmp_path: Path) -> None:
    long = ["train", *OPTIONS, "--data", small, "--out", tmp_path, "--save-every", 1, "--resume", "--epochs", 2000]
    process = begun((3, [*long, "--decay", "none"]))
    assert process.stdout is not None
    names = process.stdout.readline()
    victim = int(re.findall(r"rank 1 is process (\d+) on ", names)[0])
    until = time.monotonic() + 60
    while not (tmp_path / "save.npz").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(victim, signal.SIGKILL)
    code, _, err = ended(process, 10)
    assert code != 0
    assert re.search(rf"^rank 1 of 3, process {victim} on .+, was killed \(SIGKILL\)$", err, re.MULTILINE)
    epochs = len(read_archive(tmp_path / "save.npz")[0]["run"]["history"]) + 2
    code, printed, err = npnet(
        (2, ["train", "--quiet", "--data", small, "--out", tmp_path, "--resume", "--epochs", epochs])
    )
    assert (code, err) == (0, "")
    assert f"the last good save is {tmp_path / 'save.npz'}: {epochs} epochs and 0 steps" in printed


def test_without_the_process_that_stays_behind_all_end_too(small: Path, tmp_path: Path) -> None:
    process = begun((2, ["train", *OPTIONS, "--data", small, "--epochs", 2000]))
    assert process.stdout is not None
    worker = psutil.Process(int(re.findall(r"rank 1 is process (\d+) on ", process.stdout.readline())[0]))
    time.sleep(1)
    worker.parent().kill()
    assert ended(process, 10)[0] != 0
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_what_works_in_one_process_only_is_refused_at_once() -> None:
    code, printed, err = npnet((2, ["train", "--capture"]))
    assert (code, printed) == (2, "")
    assert err == (
        "npnet train: error: --capture works in one process only: leave it out (--no-capture, where the save has it), "
        "or start npnet without mpiexec\n"
    )
