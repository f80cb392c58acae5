"""Data-parallel training: real processes under a real mpiexec, against one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mpi4py")

ROOT = Path(__file__).parents[1]
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
pytestmark = pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec")

CASES = (
    "plain",
    "checkpointed, dropout",
    "accumulated",
    "clipped",
    "after the backward pass",
    "momentum, decay of weights",
    "shared, with state, checkpointed",
)


def start(ranks: int, *command: Any, **environment: str) -> subprocess.Popen[str]:
    """Begin ``mpiexec -n ranks python command``."""
    return subprocess.Popen(
        [str(MPIEXEC), "-n", str(ranks), sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    """Its exit code and what it printed; it must end by itself."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"still running after {seconds} s: {process.communicate()}")
    return process.returncode, out, err


def work(ranks: int, job: str, folder: Path, **environment: str) -> Any:
    """What each rank says in a job of tests.rank_work that goes well."""
    code, out, err = ended(start(ranks, "-m", "tests.rank_work", job, folder, **environment))
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def failed(ranks: int, job: str, folder: Path, **environment: str) -> str:
    """What is printed in a job that fails, within seconds."""
    began = time.monotonic()
    code, _, err = ended(start(ranks, "-m", "tests.rank_work", job, folder, **environment), 60)
    assert code != 0
    assert time.monotonic() - began < 30
    return err


# The same numbers.


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of one process."""
    folder = tmp_path_factory.mktemp("alone")
    work(1, "equal", folder)
    return folder


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_weights_are_those_of_one_process_and_the_same_bits_on_all_ranks_and_again(
    ranks: int, alone: Path, tmp_path: Path
) -> None:
    first = work(ranks, "equal", tmp_path)
    assert all(each == first[0] for each in first)
    for case in CASES:
        np.testing.assert_allclose(
            np.load(tmp_path / f"{case}.npy"), np.load(alone / f"{case}.npy"), rtol=0, atol=1e-10, err_msg=case
        )
    if ranks < 4:  # more than there are cores take long
        assert work(ranks, "equal", tmp_path) == first


def test_masks_that_ignore_whose_rows_they_are_give_other_weights(alone: Path, tmp_path: Path) -> None:
    work(2, "own_masks", tmp_path)
    one, two = np.load(alone / "checkpointed, dropout.npy"), np.load(tmp_path / "own masks.npy")
    assert np.abs(one - two).max() > 1e-3


def test_ranks_whose_weights_part_are_ended(tmp_path: Path) -> None:
    err = failed(2, "not_summed", tmp_path)
    assert "ValueError: all ranks must train alike: weights after epoch 1[0] is" in err


def test_sums_begin_while_layers_are_still_to_come_and_once_for_a_window(tmp_path: Path) -> None:
    sums = work(2, "counted", tmp_path)[0]
    last, hidden, first = 16 * 4 + 4, 16 * 16 + 16, 20 * 16 + 16
    # a window of three micro-batches: one sum of each gradient; what fits into a buffer goes together
    assert [size for size, _ in sums] == [last + hidden, 2 * hidden, 2 * hidden, first]
    assert [passed for _, passed in sums] == [2, 4, 6, 7]  # of 7 layers


@pytest.mark.usefixtures("fast_collection")
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_ranks_peak_falls_with_its_share_as_predicted(ranks: int, tmp_path: Path) -> None:
    whole = work(1, "memory", tmp_path)[0][1]
    for predicted, measured, rows in work(ranks, "memory", tmp_path):
        assert rows <= -(-4096 // ranks)
        assert abs(measured - predicted) <= 0.01 * predicted + 2**17
        assert measured < 1.15 * whole / ranks + 2**20  # parameters, optimizer and buffers do not shrink


def test_half_precision_overflows_for_all_ranks_or_none(tmp_path: Path) -> None:
    (scaler, weights), other = work(2, "overflow", tmp_path)
    assert [scaler, weights] == other
    assert scaler["skipped_steps"] > 0
    assert scaler["good_steps"] > 0


def test_what_each_rank_has_drawn_or_remembers_is_rank_0s(tmp_path: Path) -> None:
    hashes = work(3, "unseeded", tmp_path)
    assert hashes[0] == hashes[1] == hashes[2]


def test_what_rank_0_remembers_is_handed_over_in_little_memory(tmp_path: Path) -> None:
    for planned, measured, largest in work(2, "again", tmp_path):
        assert measured <= planned + 3 * largest + 2**17  # an array on its way, twice


# Saves.


def test_a_save_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    one, parts = tmp_path / "one", tmp_path / "parts"
    one.mkdir()
    parts.mkdir()
    work(1, "saved", one)
    for ranks, epochs in ((2, "1"), (3, "3"), (1, "4")):
        work(ranks, "saved", parts, EPOCHS=epochs)
    np.testing.assert_allclose(np.load(parts / "after 4.npy"), np.load(one / "after 4.npy"), rtol=0, atol=1e-10)


def running(folder: Path, ranks: int) -> subprocess.Popen[str]:
    """A training under way: a few saves are made."""
    process = start(ranks, "-m", "tests.rank_work", "slow", folder, NAP="0.02")
    until = time.monotonic() + 60
    while not (folder / "run.npz").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    assert process.poll() is None, process.communicate()
    return process


def kill(folder: Path, rank: int, number: int) -> None:
    """Send a signal to one rank."""
    os.kill(int((folder / f"pid {rank}").read_text(encoding="utf-8")), number)


def resumes_to_the_same_weights(folder: Path, ranks: int, other: Path) -> bool:
    """Whether the save goes on to what an undisturbed training comes to."""
    other.mkdir()
    work(ranks, "slow", other)
    work(ranks, "slow", folder)
    return np.array_equal(np.load(folder / "slow.npy"), np.load(other / "slow.npy"))


def test_a_killed_rank_ends_all_within_seconds_and_the_save_goes_on(tmp_path: Path) -> None:
    process = running(tmp_path, 3)
    kill(tmp_path, 1, signal.SIGKILL)
    assert ended(process, 10)[0] != 0
    assert resumes_to_the_same_weights(tmp_path, 3, tmp_path / "undisturbed")


def test_a_signal_to_one_rank_ends_all_after_the_same_step(tmp_path: Path) -> None:
    process = running(tmp_path, 2)
    kill(tmp_path, 1, signal.SIGTERM)
    code, _, err = ended(process, 10)
    assert code == 128 + signal.SIGTERM
    assert "failed" not in err
    assert resumes_to_the_same_weights(tmp_path, 2, tmp_path / "undisturbed")


# What goes wrong on one rank.


def test_a_rank_that_fails_before_anything_is_summed_is_named_on_all(tmp_path: Path) -> None:
    own, other = "ZeroDivisionError: on purpose", "RankFailed: rank 1 of 3 failed: ZeroDivisionError: on purpose"
    assert work(3, "failing", tmp_path) == [other, own, other]


def test_a_rank_that_fails_when_sums_are_under_way_ends_all(tmp_path: Path) -> None:
    err = failed(3, "failing_backward", tmp_path)
    assert err.count("rank 1 of 3 failed: ZeroDivisionError: on purpose") == 1


def test_a_rank_that_diverges_is_named_with_its_layer_and_nothing_is_updated(tmp_path: Path) -> None:
    for text, unchanged in work(2, "diverging", tmp_path):
        assert "the loss of rank 1 of 2 is inf" in text
        assert "the outputs of all layers are finite" in text  # the square of what the last one gives is not
        assert "epoch 1, step 1 of" in text
        assert unchanged


def test_an_evaluation_that_diverges_on_one_rank_does_on_all(tmp_path: Path) -> None:
    said = work(2, "diverging_tests", tmp_path)
    assert said[0] == said[1]
    assert len(said[0]) == 2  # nobody is left waiting
    assert "rank 1 of 2: an output of the network is not finite" in said[0][0]


def test_a_rank_that_fails_between_two_steps_is_named_on_all(tmp_path: Path) -> None:
    own, other = "ZeroDivisionError: on purpose", "RankFailed: rank 1 of 2 failed: ZeroDivisionError: on purpose"
    assert work(2, "failing_transform", tmp_path) == [other, own]


def test_a_rank_that_waits_for_long_says_so_and_goes_on_when_all_are_there(tmp_path: Path) -> None:
    code, out, err = ended(start(2, "-m", "tests.rank_work", "late", tmp_path))
    assert (code, err) == (
        0,
        "rank 0 of 2 waits for the others: all of them must call npnet.fit, as often, and one after the other\n",
    )
    first, second = json.loads(out)
    assert first == second


def test_ranks_with_different_arguments_data_or_versions_are_refused_and_the_difference_named(tmp_path: Path) -> None:
    said = work(2, "unlike", tmp_path)
    for each in said:
        alike = "ValueError: all ranks must train alike: "
        assert each["batch_size"] == f"{alike}batch_size is 10 on rank 0, 11 on rank 1"
        assert each["optimizer"] == f"{alike}optimizer.learning_rate is 0.01 on rank 0, 0.1 on rank 1"
        assert each["data"].startswith(f"{alike}training data.x is '203 x 20, hash ")
        assert each["model"].startswith(f"{alike}model.config.layers is [")
        assert each["streaming"] == f"{alike}streaming is True on rank 0, False on rank 1"
        assert each["own layer"].endswith("factor is 2.0 on rank 0, 3.0 on rank 1")
        assert each["version"] == "all ranks must train alike: npnet is '0.0' on rank 0, '0.1' on rank 1"
    assert said[1]["argument"] == "ValueError: epochs: expected a whole number, at least 0, got -1"
    assert said[0]["argument"] == f"RankFailed: rank 1 of 2 failed: {said[1]['argument']}"
    assert said[1]["own budget"].startswith("InfeasibleBudget: memory_budget: 1.00 kB is too little")
    assert said[0]["own budget"] == f"RankFailed: rank 1 of 2 failed: {said[1]['own budget']}"
