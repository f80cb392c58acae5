"""Data-parallel training: strong and weak scaling on this machine, communication exposed, and a model carried further.

    python -m tests.benchmarks.ranks [--networks C,D,E] [--ranks 2] [--runs 5] [--seconds 2] [--json FILE]

*Strong*: the same batch on N ranks with a BLAS thread each, against one rank with N threads. *Weak*: a batch for each
rank, against one rank with one batch and one thread. Each figure is the median over runs, which take turns; a run is
the median step of a training in processes of its own. Float32, ReLU, cross-entropy, Adam.

*Exposed* is the time of a step that a rank spends in calls of MPI, waiting or working; *all* is what the same sums take
one after the other when nothing else is done.

The model: a step on p ranks is a forward and a backward pass over b = batch / p rows, a + c b (fitted to one rank),
with a sum for each buffer, which begins when its gradients are there and the sum before it is done, and takes
2 log2(p) alpha + 2 (p-1)/p n beta for n bytes (Thakur, Rabenseifner & Gropp, "Optimization of Collective Communication
Operations in MPICH", 2005, section 4: recursive halving and doubling). alpha and beta are fitted to sums on two ranks
here, and given for a network (--alpha, --beta: assumed, not measured). Where ranks share the cores with MPI, as here,
sums cannot go on beside the arithmetic: there the model is without overlap.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.frameworks import NETWORKS

MESSAGES = (2**10, 2**13, 2**16, 2**19, 2**22)  # bytes
ON_PAPER = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)


# In each rank.


def rank_work(name: str, batch: int, seconds: float) -> dict[str, Any]:
    """Time steps on this rank's share of ``batch``."""
    from mpi4py import MPI

    from npnet import Adam, SoftmaxCrossEntropy, accumulated_step, mlp, schedules
    from npnet.gradient_sums import GradientSums
    from npnet.ranks import Ranks

    ranks = Ranks(MPI.COMM_WORLD)
    sizes, _ = NETWORKS[name]
    model, loss, optimizer = mlp(sizes, "relu", rng=0), SoftmaxCrossEntropy(), Adam(1e-4)
    schedule = schedules.none(len(model.layers))
    sums = GradientSums(ranks, model.layers, batch) if ranks.size > 1 else None
    share = ranks.share(batch)
    rows = share.stop - share.start
    x = np.random.default_rng(ranks.rank).standard_normal((rows, sizes[0])).astype(np.float32)
    y = np.eye(sizes[-1], dtype=np.float32)[np.arange(rows) % sizes[-1]]

    def step() -> None:
        accumulated_step(model, loss, optimizer, schedule, [(x, y)], batch, sums=sums)

    def timed(repeats: int) -> list[float]:
        times = []
        for _ in range(repeats):
            ranks.communicator.Barrier()
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return times

    first = max(timed(3))
    repeats = ranks.broadcast(max(5, int(seconds / first)))
    row: dict[str, Any] = {"step": statistics.median(timed(repeats))}
    if sums is not None:
        spent = Stopwatch(ranks)
        timed(5)
        exposed = []
        for _ in range(repeats):
            before = spent.seconds
            timed(1)
            exposed.append(spent.seconds - before)
        row["exposed"] = statistics.median(exposed)
        row["bytes"] = spent.bytes_of_a_step
        row["all"] = sum(blocking(ranks.communicator, size) for size in spent.bytes_of_a_step)
        row["messages"] = {size: blocking(ranks.communicator, size) for size in MESSAGES}
    return row


class Stopwatch:
    """Time spent in the calls of MPI that a step makes."""

    def __init__(self, ranks: Any) -> None:
        self.seconds, self.bytes_of_a_step = 0.0, list[int]()
        agree, start_sum, wait = ranks.agree, ranks.start_sum, ranks.wait

        def timed_agree(where: Any) -> Any:
            self.bytes_of_a_step = []
            return self._timed(lambda: agree(where))

        def timed_sum(buffer: np.ndarray) -> Any:
            self.bytes_of_a_step.append(buffer.nbytes)
            request = self._timed(lambda: start_sum(buffer))
            return TimedRequest(request, self)

        def timed_wait(request: Any) -> Any:
            own = isinstance(request, TimedRequest)  # else within agree, whose time is taken
            return self._timed(lambda: wait(request.request)) if own else wait(request)

        ranks.agree, ranks.start_sum, ranks.wait = timed_agree, timed_sum, timed_wait

    def _timed(self, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        self.seconds += time.perf_counter() - start
        return result


class TimedRequest:
    """A request whose calls are timed."""

    def __init__(self, request: Any, watch: Stopwatch) -> None:
        self.request = request
        self.Test = lambda: watch._timed(request.Test)


def blocking(communicator: Any, size: int) -> float:
    """Seconds for a sum of so many bytes by itself."""
    from mpi4py import MPI

    buffer, times = np.zeros(size // 4, np.float32), []
    for _ in range(30):
        communicator.Barrier()
        start = time.perf_counter()
        communicator.Allreduce(MPI.IN_PLACE, buffer)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# From outside.


def run(name: str, batch: int, ranks: int, threads: int, seconds: float) -> dict[str, Any]:
    """One training in processes of its own: what rank 0 measured."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    mpiexec = shutil.which("mpiexec", path=beside)
    if mpiexec is None:
        sys.exit("skipped: there is no mpiexec; pip install 'npnet[mpi]'")
    command = [mpiexec, "-n", str(ranks), sys.executable, "-m", "tests.benchmarks.ranks", "--work", name]
    done = subprocess.run(
        [*command, "--batch", str(batch), "--seconds", str(seconds)],
        env=os.environ | {"OPENBLAS_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(name: str, ranks: int, runs: int, seconds: float) -> dict[str, Any]:
    """All that is measured of one network: medians over runs that take turns."""
    batch = NETWORKS[name][1]
    kinds: dict[str, tuple[int, int, int]] = {
        f"1 rank, {ranks} threads": (batch, 1, ranks),
        f"{ranks} ranks": (batch, ranks, 1),
        f"{ranks} ranks, {ranks} batches": (batch * ranks, ranks, 1),
        **{f"1 rank, batch / {part}": (batch // part, 1, 1) for part in (1, 2, 4, 8)},
    }
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(runs):
        for kind, (rows_, count, threads) in kinds.items():
            rows[kind].append(run(name, rows_, count, threads, seconds))
    step = {kind: statistics.median(row["step"] for row in own) for kind, own in rows.items()}
    strong = [
        a["step"] / b["step"] for a, b in zip(rows[f"1 rank, {ranks} threads"], rows[f"{ranks} ranks"], strict=True)
    ]
    weak = [
        a["step"] / b["step"]
        for a, b in zip(rows["1 rank, batch / 1"], rows[f"{ranks} ranks, {ranks} batches"], strict=True)
    ]
    parallel = rows[f"{ranks} ranks"]
    last = parallel[-1]
    return {
        "network": name,
        "batch": batch,
        "ms": {kind: round(1e3 * seconds, 3) for kind, seconds in step.items()},
        "strong speed-up": spread(strong),
        "weak efficiency": spread(weak),
        "sums of a step, bytes": last["bytes"],
        "exposed ms": round(1e3 * statistics.median(row["exposed"] for row in parallel), 3),
        "all ms": round(1e3 * statistics.median(row["all"] for row in parallel), 3),
        "messages": {size: statistics.median(row["messages"][size] for row in parallel) for size in last["messages"]},
    }


def spread(values: list[float]) -> str:
    """Median, minimum and maximum."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


# The model.


def fitted(points: dict[float, float]) -> tuple[float, float]:
    """(a, c) of a + c n, by least squares of relative errors."""
    n, t = np.array(list(points)), np.array(list(points.values()))
    (a, c), *_ = np.linalg.lstsq(np.stack([1 / t, n / t], axis=1), np.ones(len(n)), rcond=None)
    return float(a), float(c)


def step_seconds(
    batch: float, ranks: int, compute: tuple[float, float], sums: list[int], alpha: float, beta: float, overlap: bool
) -> float:
    """The model of the docstring: one step's time on ``ranks`` ranks that share ``batch`` rows."""
    a, c = compute
    work = a + c * batch / ranks
    if ranks == 1:
        return work
    now, done = work / 3, 0.0  # after the forward pass; when the sum before is done
    for size in sums:
        now += 2 / 3 * work * size / sum(sums)  # of the backward pass: a buffer of wide layers takes longer
        cost = 2 * math.log2(ranks) * alpha + 2 * (ranks - 1) / ranks * size * beta
        done = max(now, done) + cost
        if not overlap:
            now = done
    return max(now, done)


def on_paper(result: dict[str, Any], network: tuple[float, float]) -> list[dict[str, Any]]:
    """A row for each number of ranks: speed-up with the batch shared (strong), efficiency with a batch each (weak)."""
    batch, sums = result["batch"], result["sums of a step, bytes"]
    compute = fitted({batch / part: result["ms"][f"1 rank, batch / {part}"] / 1e3 for part in (1, 2, 4, 8)})
    one = step_seconds(batch, 1, compute, sums, *network, True)
    rows = []
    for ranks in ON_PAPER:
        strong = step_seconds(batch, ranks, compute, sums, *network, True)
        weak = step_seconds(batch * ranks, ranks, compute, sums, *network, True)
        rows.append({"ranks": ranks, "strong": round(one / strong, 2), "weak": round(one / weak, 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="C,D,E")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of steps in a run")
    parser.add_argument("--alpha", type=float, default=2e-6, help="seconds a message takes on a network (assumed)")
    parser.add_argument("--beta", type=float, default=1 / 12.5e9, help="and seconds a byte (assumed: 100 Gbit/s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        row = rank_work(options.work, options.batch, options.seconds)
        from mpi4py import MPI

        if MPI.COMM_WORLD.Get_rank() == 0:
            print(json.dumps(row))
        return
    from tests.benchmarks.classic import machine

    print(f"{machine()}; a BLAS thread a rank\n", flush=True)
    results = []
    for name in options.networks.split(","):
        result = measure(name, options.ranks, options.runs, options.seconds)
        results.append(result)
        for key, value in result.items():
            print(f"{key}: {value}")
        half, total = fitted({float(size): seconds for size, seconds in result["messages"].items()})
        alpha, beta = half / 2 / math.log2(options.ranks), total * options.ranks / 2 / (options.ranks - 1)
        print(f"alpha {1e6 * alpha:.1f} us, beta {1e9 * beta:.3f} ns a byte, between ranks of this machine")
        compute = fitted(
            {result["batch"] / part: result["ms"][f"1 rank, batch / {part}"] / 1e3 for part in (1, 2, 4, 8)}
        )
        result |= {"alpha": alpha, "beta": beta, "a": compute[0], "c": compute[1]}
        for overlap in (True, False):
            said = step_seconds(
                result["batch"], options.ranks, compute, result["sums of a step, bytes"], alpha, beta, overlap
            )
            print(f"model, {'with' if overlap else 'without'} overlap: {1e3 * said:.3f} ms on {options.ranks} ranks")
        result["on paper"] = on_paper(result, (options.alpha, options.beta))
        for row in result["on paper"]:
            print("  ".join(f"{key}: {value}" for key, value in row.items()))
        print(flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
