"""What several ranks are told and what each takes of a batch, without MPI; and what is said where it is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import npnet
from npnet import Dense, SoftmaxCrossEntropy, fit, launch, plan
from npnet.batching import batches
from npnet.blocks import keep_mask
from npnet.chain_costs import MESSAGE_BYTES, buffer_bytes
from npnet.device_ranks import DeviceRanks, take_device
from npnet.failures import _advice
from npnet.layers import mlp
from npnet.optimizers import SGD, Adam
from npnet.random import draws, first_row, one_step, rows_from
from npnet.ranks import Ranks, share_of
from npnet.schedules import none

ROOT = Path(__file__).parents[1]


# Shares.


@given(st.integers(1, 50), st.integers(0, 500))
def test_shares_cover_a_batch_and_differ_by_a_row_at_most(size: int, rows: int) -> None:
    shares = [range(rows)[share_of(rank, size, rows)] for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert max(map(len, shares)) == -(-rows // size)  # what `npnet.plan` plans


@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 23), st.booleans())
def test_parts_of_batches_are_the_batches(size: int, batch: int, start: int, shuffle: bool) -> None:
    x, y = np.arange(23)[:, None], -np.arange(23)[:, None]
    whole = list(batches(x, y, batch, 5, shuffle, start=start))
    parts = [list(batches(x, y, batch, 5, shuffle, start=start, part=(rank, size))) for rank in range(size)]
    joined = [[np.concatenate(arrays) for arrays in zip(*pairs, strict=True)] for pairs in zip(*parts, strict=True)]
    assert [[array.tolist() for array in pair] for pair in joined] == [[a.tolist() for a in pair] for pair in whole]


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 0), (0,), 3, (0.5, 2)])
def test_a_part_that_is_none_is_refused(part: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="part"):
        batches(np.zeros((4, 1)), np.zeros((4, 1)), 2, part=part)


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(0, 70))
def test_numbers_are_left_out_as_if_they_had_been_drawn(key: int, step: int, skip: int) -> None:
    whole = draws(key, step).random(100, np.float32)
    assert np.array_equal(draws(key, step, skip).random(100 - skip, np.float32), whole[skip:])


def test_a_share_has_its_rows_of_the_whole_mask() -> None:
    x = np.ones((10, 7), np.float32)
    with one_step(4):
        whole = keep_mask(x, 9, 0.5)
        with rows_from(3):
            assert first_row() == 3
            assert np.array_equal(keep_mask(x[3:8], 9, 0.5), whole[3:8])
        assert first_row() == 0
        assert not np.array_equal(keep_mask(x[3:8], 9, 0.5), whole[3:8])


# What a rank takes.


def test_buffers_hold_any_layer_and_no_more_than_all() -> None:
    thin, wide = mlp([784, *[30] * 50, 10], rng=0), mlp([1024] * 4, rng=0)
    total = sum(parameter.value.nbytes for parameter in thin.parameters())
    first = (784 * 30 + 30) * 4
    assert buffer_bytes(thin.layers) == [first, first]
    assert first > MESSAGE_BYTES
    assert total > first
    assert buffer_bytes(wide.layers) == [(1024 * 1024 + 1024) * 4] * 2
    assert buffer_bytes(mlp([4, 3], rng=0).layers) == [(4 * 3 + 3) * 4]


def test_a_plan_for_ranks_is_that_of_a_share_and_the_buffers() -> None:
    network = mlp([784, *[30] * 50, 10], rng=0)
    whole, share, shared = plan(network, 1001), plan(network, 251), plan(network, 1001, ranks=4)
    assert shared.batch_size == 251
    assert shared.peak_bytes == share.peak_bytes + sum(buffer_bytes(network.layers)) < whole.peak_bytes
    tight = plan(network, 1001, memory_budget=shared.peak_bytes - 100_000, ranks=4)
    assert tight.extra_forwards > 0
    with pytest.raises(ValueError, match="ranks: expected a whole number, at least 1, got 0"):
        plan(network, 10, ranks=0)


def test_the_budget_that_is_advised_when_memory_runs_out_will_do() -> None:
    network, optimizer = mlp([784, *[128] * 20, 10], rng=0), Adam()
    terms = {"loss": SoftmaxCrossEntropy(), "optimizer": optimizer, "streaming": True, "ranks": 2}
    text = _advice(MemoryError(), network, none(21), np.ones((256, 784), np.float32), terms)
    budget = int(re.findall(r"memory_budget=(\d+)", text)[0])
    assert plan(network, 512, memory_budget=budget, **terms).peak_bytes <= budget  # type: ignore[arg-type]


# Started by mpiexec, or not.

ENVIRONMENTS: list[tuple[dict[str, str], launch.Launch | None]] = [
    ({}, None),
    ({"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALNRANKS": "1"}, None),
    ({"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}, launch.Launch(1, 4, 2)),
    ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}, launch.Launch(3, 4, 2, 1)),
    ({"PMI_RANK": "1", "PMI_SIZE": "4"}, launch.Launch(1, 4, 4)),
    ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, launch.Launch(2, 3, 3)),
    ({"PMI_RANK": "x", "PMI_SIZE": "4"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("environment", "expected"), ENVIRONMENTS)
def test_what_the_launcher_says(
    environment: dict[str, str], expected: launch.Launch | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for names in launch.RANK_SIZE_LOCAL:
        for name in names:
            monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.launched() == expected


def fresh(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, as if mpiexec had started it."""
    own = {name: value for name, value in os.environ.items() if name not in launch.THREADS}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=own | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_ranks_of_a_machine_share_its_cores_unless_told_otherwise() -> None:
    code = "import npnet, os; print([os.environ.get(name) for name in npnet.launch.THREADS])"
    ranks = {"PMI_RANK": "0", "PMI_SIZE": "8", "MPI_LOCALNRANKS": "1000"}
    assert fresh(code, **ranks).stdout.strip() == "['1', '1', '1']"
    assert fresh(code).stdout.strip() == "[None, None, None]"
    assert fresh(code, **ranks, OPENBLAS_NUM_THREADS="7").stdout.strip() == "['7', None, None]"


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mpi4py":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


def test_without_the_extra_nothing_is_imported_and_it_says_what_to_install() -> None:
    used = fresh("import sys, npnet, npnet.cli; npnet.fit; print('mpi4py' in sys.modules)")
    assert used.stdout.strip() == "False", used.stderr
    train = fresh(f"{WITHOUT}\nimport npnet.cli\nsys.exit(npnet.cli.main(['train']))", PMI_RANK="0", PMI_SIZE="2")
    assert train.returncode == 1
    assert train.stderr.startswith(
        "npnet train: npnet was started in 2 processes: it needs the package mpi4py: pip install 'npnet[mpi]'"
    )
    code = (
        f"{WITHOUT}\nfrom npnet.ranks import Ranks\ntry:\n    Ranks(object())\nexcept ImportError as e:\n    print(e)"
    )
    assert fresh(code).stdout.startswith("communicator: it needs the package mpi4py: pip install 'npnet[mpi]'")


def test_another_mpi_than_that_of_mpiexec_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mpi4py")
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setattr(
        "mpi4py.MPI",
        SimpleNamespace(COMM_WORLD=SimpleNamespace(Get_size=lambda: 1), Get_library_version=lambda: "Open MPI 9\nx"),
        raising=False,
    )
    with pytest.raises(
        ImportError, match=r"mpiexec started 2 processes, but mpi4py sees 1: .* mpi4py uses Open MPI 9;"
    ):
        npnet.ranks.world()


def test_what_is_no_communicator_is_refused() -> None:
    pytest.importorskip("mpi4py")
    model, data = mlp([3, 2], rng=0), (np.ones((4, 3), np.float32), np.eye(2, dtype=np.float32)[[0, 1, 0, 1]])
    with pytest.raises(TypeError, match=r"communicator: expected one of mpi4py, such as MPI.COMM_WORLD .* got 4"):
        fit(model, data, loss=SoftmaxCrossEntropy(), optimizer=SGD(0.1), epochs=1, batch_size=2, communicator=4)


def test_a_process_alone_agrees_with_itself() -> None:
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.share(7), ranks.broadcast("x"), ranks.total(3)) == (0, 1, slice(0, 7), "x", 3)
    ranks.alike({"a": 1})
    ranks.wait_for_all()
    with pytest.raises(ZeroDivisionError), ranks.guard(), ranks.together():
        raise ZeroDivisionError


# On GPUs, with a stand-in.


class Recorder:
    """Writes down what is called on it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def event(self, **_: Any) -> Any:
        name = f"event {sum(call.startswith('new') for call in self.calls)}"
        self.calls.append(f"new {name}")
        return SimpleNamespace(
            name=name, done=True, record=lambda stream: self.calls.append(f"{stream.name}: record {name}")
        )

    def stream(self, name: str) -> Any:
        return SimpleNamespace(name=name, wait_event=lambda event: self.calls.append(f"{name}: wait for {event.name}"))


def test_sums_on_gpus_wait_for_each_other_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    current, own = recorder.stream("current"), recorder.stream("own")
    cuda = SimpleNamespace(Event=recorder.event, Stream=lambda non_blocking: own, get_current_stream=lambda: current)
    module = ModuleType("cupyx.distributed")

    def init_process_group(size: int, rank: int, *, use_mpi: bool) -> Any:
        recorder.calls.append(f"group of {size}, rank {rank}, {use_mpi}")
        return SimpleNamespace(
            all_reduce=lambda a, b, op, stream: recorder.calls.append(f"{stream.name}: {op} {a is b}")
        )

    module.init_process_group = init_process_group  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupyx", ModuleType("cupyx"))
    monkeypatch.setitem(sys.modules, "cupyx.distributed", module)
    request = DeviceRanks(SimpleNamespace(cuda=cuda), 1, 2).start_sum(np.zeros(3))
    assert request.Test()
    request.Wait()
    assert [call for call in recorder.calls if not call.startswith("new")] == [
        "group of 2, rank 1, True",
        "current: record event 0",
        "own: wait for event 0",
        "own: sum True",
        "own: record event 1",
        "current: wait for event 1",
    ]


def test_each_rank_of_a_machine_takes_a_gpu_of_its_own() -> None:
    used: list[int] = []
    cuda = SimpleNamespace(
        Device=lambda number: SimpleNamespace(use=lambda: used.append(number)),
        runtime=SimpleNamespace(getDeviceCount=lambda: 2),
    )
    backend = SimpleNamespace(xp=SimpleNamespace(cuda=cuda))
    for local_rank in range(3):
        take_device(backend, launch.Launch(local_rank + 4, 8, 4, local_rank))  # type: ignore[arg-type]
    assert used == [0, 1, 0]
    take_device(backend, None)  # type: ignore[arg-type]
    take_device(npnet.get_backend("numpy"), launch.Launch(0, 2, 2))
    assert used == [0, 1, 0]


def test_without_nccl_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def init_process_group(*_: Any, **__: Any) -> Any:
        raise RuntimeError("NCCL is not available")  # as CuPy

    module = ModuleType("cupyx.distributed")
    monkeypatch.setitem(sys.modules, "cupyx", ModuleType("cupyx"))
    monkeypatch.setitem(sys.modules, "cupyx.distributed", module)
    for _ in range(2):
        with pytest.raises(
            npnet.BackendUnavailable, match=r"need NCCL, which CuPy does not find .*install the package"
        ):
            DeviceRanks(SimpleNamespace(cuda=None), 0, 2)
        module.init_process_group = init_process_group  # type: ignore[attr-defined]


def test_parameters_of_two_dtypes_cannot_be_summed_together() -> None:
    layers = [Dense(3, 2, dtype=np.float64), Dense(2, 2, dtype=np.float32)]
    with pytest.raises(TypeError, match="communicator: expected parameters of one dtype, got float32, float64"):
        npnet.gradient_sums.GradientSums(Ranks(), layers, 4)
