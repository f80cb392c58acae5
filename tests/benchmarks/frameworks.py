"""npnet beside the floor, the classic exercise's code, PyTorch and JAX: time and memory of one training step.

    python -m tests.benchmarks.frameworks [--threads 1,2] [--networks A,C] [--dtypes float32] [--kinds lab]
                                          [--contenders npnet,jax] [--memory] [--json FILE] [--plot FILE]

The same mathematics in all, which is checked first: after three steps all have the same weights, but for rounding. In
each round every contender takes a step (or several short ones) on the same batch, in changing order; a ratio is the
median over rounds of npnet's time by the other's within the round. Contenders whose packages are
missing are left out (pip install 'npnet[bench]', torch, jax). --memory measures the resident memory of each in a
process of its own.
"""

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

NETWORKS = {
    "A": ((784, 100, 10), 100),
    "B": ((784, *[30] * 6, 10), 100),
    "C": ((784, *[30] * 50, 10), 100),
    "C4096": ((784, *[30] * 50, 10), 4096),
    "D": ((784, *[512] * 8, 10), 128),
    "E": ((784, *[1024] * 16, 10), 1024),
}


def compare(problem: Any, names: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """A row per contender."""
    with np.errstate(all="ignore"):
        verify(dataclasses.replace(problem, dtype="float64"), names)
        contenders = verify(problem, names)
        repeats = {name: repeats_of(contender, problem) for name, contender in contenders.items()}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        order, end = list(contenders), time.perf_counter() + seconds
        shuffle = random.Random(0).shuffle
        while time.perf_counter() < end or len(times["npnet"]) < 5:
            batch = problem.batches[len(times["npnet"]) % 2]
            shuffle(order)
            for name in order:
                contender = contenders[name]
                contender(*batch)  # warms the caches that the one before has emptied
                start = time.perf_counter()
                for _ in range(repeats[name]):
                    contender(*batch)
                times[name].append((time.perf_counter() - start) / repeats[name])
    rows = []
    for name, own in times.items():
        low, middle, high = (time * 1e6 for time in statistics.quantiles(own, n=4))
        row = {"network": problem.name, "kind": problem.kind, "dtype": problem.dtype, "contender": name}
        row |= {"us": round(middle, 1), "quartiles": [round(low, 1), round(high, 1)], "rounds": len(own)}
        for variant in (name for name in times if name.startswith("npnet")):
            ratios = [mine / theirs for mine, theirs in zip(times[variant], own, strict=True)]
            row[f"{variant} / it"] = round(statistics.median(ratios), 3)
        rows.append(row)
    return rows


def verify(problem: Any, names: Sequence[str]) -> dict[str, Any]:
    """The contenders, which have the same weights after three steps: refuse to time another mathematics.

    Root mean squares are compared. In float32 loosely, and the same contenders in float64 strictly: where a gradient is
    rounding alone, Adam takes a whole step up here and down there.
    """
    from tests.benchmarks.contenders import MAKERS

    contenders = {name: MAKERS[name](problem) for name in names}
    for contender in contenders.values():
        for _ in range(3):
            contender(*problem.batches[0])
    reference, tolerance = contenders["npnet"].weights(), 1e-9 if problem.dtype == "float64" else 1e-2
    for name, contender in contenders.items():
        for number, (a, b) in enumerate(zip(reference, contender.weights(), strict=False)):
            apart = np.linalg.norm(a - b) / np.linalg.norm(a)
            if not apart < tolerance:
                sys.exit(f"{name} computes something else: weights of layer {number} differ by {apart:.1e}")
    return contenders


def repeats_of(contender: Any, problem: Any) -> int:
    """Steps that take about 5 ms together."""
    start = time.perf_counter()
    contender(*problem.batches[0])
    return max(1, round(0.005 / (time.perf_counter() - start)))


def resident(problem: Any, name: str, threads: int) -> int:
    """Peak of resident memory in a fresh process, above that of the same process with a tiny network: bytes."""
    code = (
        "import dataclasses, sys, numpy as np\n"
        "from tests.benchmarks.contenders import MAKERS, Problem\n"
        "from npnet.memory import _rss_high_water as peak\n"
        "np.seterr(all='ignore')\n"
        "name, sizes, batch, dtype, kind = eval(sys.argv[1])\n"
        "def run(problem):\n"
        "    step = MAKERS[name](problem)\n"
        "    for _ in range(3): step(*problem.batches[0])\n"
        "run(Problem('', (784, 16, 16, 16, 10), 10, dtype, kind))\n"
        "problem = Problem('', sizes, batch, dtype, kind)\n"
        "problem.batches, problem.weights\n"
        "before = peak()\n"
        "run(problem)\n"
        "print(peak() - before)\n"
    )
    task = repr((name, problem.sizes, problem.batch, problem.dtype, problem.kind))
    done = subprocess.run(
        [sys.executable, "-c", code, task], env=environment(threads), capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def environment(threads: int) -> dict[str, str]:
    """Variables that keep every library to so many threads."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" if threads == 1 else ""
    return {**os.environ, **dict.fromkeys(names, str(threads)), "XLA_FLAGS": flags, "NPNET_BENCH_CHILD": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="2", help="numbers of threads: 1,2 for both")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--dtypes", default="float32,float64")
    parser.add_argument("--kinds", default="lab,modern")
    parser.add_argument("--contenders", help="some of them; npnet is always there")
    parser.add_argument("--seconds", type=float, default=10.0, help="of rounds for each table")
    parser.add_argument("--memory", action="store_true", help="resident memory, too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if os.environ.get("NPNET_BENCH_CHILD") == "1":
        child(options)
        return
    found: dict[str, Any] = {"rows": []}
    with tempfile.TemporaryDirectory() as folder:
        for threads in map(int, options.threads.split(",")):  # libraries read their number when they are loaded
            file = Path(folder) / "rows.json"
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(os.getppid()))[:threads])
            own = [*sys.argv[1:], "--threads", str(threads), "--json", str(file)]
            subprocess.run([sys.executable, "-m", __spec__.name, *own], env=environment(threads), check=True)
            part = json.loads(file.read_text())
            found = {"machine": part["machine"], "rows": [*found["rows"], *part["rows"]]}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if options.plot:
        draw(found["rows"], options.plot)


def child(options: argparse.Namespace) -> None:
    """All tables at one number of threads."""
    from tests.benchmarks.classic import machine
    from tests.benchmarks.contenders import Problem, available

    threads = int(options.threads)
    if "torch" in str(options.contenders or "torch"):
        try:
            import torch

            torch.set_num_threads(threads)
        except ImportError:
            pass
    print(f"{machine()}; {threads} threads\n", flush=True)
    rows: list[dict[str, Any]] = []
    for network in options.networks.split(","):
        for kind in options.kinds.split(","):
            for dtype in options.dtypes.split(","):
                problem = Problem(network, *NETWORKS[network], dtype, kind)
                names = available(problem)
                if options.contenders:
                    names = [name for name in names if name == "npnet" or name in options.contenders.split(",")]
                found = compare(problem, names, options.seconds)
                for row in found:
                    row["threads"] = threads
                    if options.memory and row["contender"] != "floor":
                        row["resident bytes"] = resident(problem, row["contender"], threads)
                    print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
                print(flush=True)
                rows += found
                options.json.write_text(json.dumps({"machine": machine(), "rows": rows}))


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """npnet's time by each contender's, plain steps, eager and captured: a group of bars for each problem."""
    from matplotlib.figure import Figure

    problems = list(dict.fromkeys((row["network"], row["kind"], row["dtype"], row["threads"]) for row in rows))
    columns = min(4, len(problems))
    figure = Figure(figsize=(4.5 * columns, 3 * -(-len(problems) // columns)), layout="constrained")
    for number, problem in enumerate(problems, 1):
        axes = figure.add_subplot(-(-len(problems) // columns), columns, number)
        own = [row for row in rows if (row["network"], row["kind"], row["dtype"], row["threads"]) == problem]
        own = [row for row in own if not row["contender"].startswith("npnet")]
        for offset, variant, color in ((-0.2, "npnet", "#9db8d2"), (0.2, "npnet captured", "#3b6ea5")):
            if f"{variant} / it" in own[0]:
                places = [place + offset for place in range(len(own))]
                axes.barh(places, [row[f"{variant} / it"] for row in own], 0.38, color=color, label=variant)
        axes.set_yticks(range(len(own)), [row["contender"] for row in own])
        axes.axvline(1, color="#8c8c8c", lw=1)
        axes.set_title(f"{', '.join(map(str, problem))} thread{'s' * (problem[3] > 1)}", fontsize=9)
        axes.set_xlabel("npnet's time / its time")
        axes.invert_yaxis()
        if number == 1:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
